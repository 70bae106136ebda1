"""Every row of the papers' tables, named on the command line: what it composes to."""

import inspect
import subprocess
import sys
from itertools import product

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_configs import CONFIGS, ROOT

from metamask_plugin.methods import METHODS
from metamask_plugin.tasks import TASKS

SMALL = ("cifar", "stl10", "tiny-imagenet")
# table: config, folders, overrides, tasks; the tasks of ICL-MSR's tables without an MSR row are baselines
TABLES = {
    "metamask 1": (
        "metamask_barlow",
        SMALL,
        ("setting=metamask_table1",),
        ("barlow_twins", "swav", "simclr", "cmc", "byol", "simsiam", "dcl", "hcl"),
    ),
    "metamask 2": (
        "metamask_barlow",
        SMALL,
        (),
        ("barlow_twins", "simclr", "byol", "dcl", "hcl", "nnclr"),
    ),
    "icl_msr 1": (
        "icl_msr_simclr",
        SMALL,
        (),
        ("simclr", "byol", "barlow_twins", "wmse", "ressl", "lmcl", "ssl_hsic", "relic"),
    ),
    "icl_msr 2": (
        "icl_msr_simclr",
        ("imagenet-100",),
        (),
        ("simclr", "moco", "cmc", "swav", "dcl", "lmcl"),
    ),
    "icl_msr 3": (
        "icl_msr_simclr",
        ("imagenet",),
        (),
        ("simclr", "moco", "cmc", "swav", "byol", "relic", "ssl_hsic"),
    ),
}
ROWS = [
    (table, f"{folder}/{config}", overrides, task)
    for table, (config, folders, overrides, tasks) in TABLES.items()
    for folder, task in product(folders, tasks)
]


def composed(name, *overrides):
    with initialize_config_dir(str(ROOT), version_base="1.2"):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize(("table", "config", "overrides", "task"), ROWS)
def test_a_row_and_its_plus_row_differ_in_the_method_alone(table, config, overrides, task):
    plus = composed(config, *overrides, f"task={task}")
    bare = composed(config, *overrides, f"task={task}", "method=baseline")
    assert plus.method_kwargs.task == task
    assert {key for key in plus if plus[key] != bare[key]} <= {"method", "name"}
    # all of it is understood: each method accepts the keys, and the task its settings
    for cfg in (plus, bare):
        kwargs = METHODS[cfg.method].add_and_assert_specific_cfg(_counted(cfg)).method_kwargs
        settings = {**OmegaConf.to_container(kwargs.task_kwargs), "proj_hidden_dim": 8}
        TASKS[task](8, **settings)


def _counted(cfg):
    OmegaConf.set_struct(cfg, False)
    cfg.data.num_classes, cfg.data.num_large_crops, cfg.data.num_small_crops = 10, 2, 1
    return cfg


def test_a_task_comes_with_its_own_head():
    for task, cls in TASKS.items():
        own = {name: p.default for name, p in inspect.signature(cls).parameters.items() if "proj_" in name}
        for folder in SMALL:
            given = composed(f"{folder}/metamask_barlow", f"task={task}").method_kwargs.task_kwargs
            heads = {key: value for key, value in given.items() if key in own and value is not None}
            assert heads == {key: own[key] for key in heads} and "proj_output_dim" in heads, task


@pytest.mark.parametrize("config", CONFIGS)
def test_barlow_twins_and_simsiam_inherit_no_other_tasks_width(config):
    width = 256 if "/" not in config else 2048
    simsiam = composed(config, "task=simsiam").method_kwargs.task_kwargs
    assert simsiam.proj_output_dim == simsiam.proj_hidden_dim == width
    width = 8192 if config.startswith("imagenet/") else width
    barlow = composed(config, "task=barlow_twins", "method=baseline").method_kwargs
    assert barlow.task_kwargs.proj_output_dim == barlow.task_kwargs.proj_hidden_dim == width
    assert barlow.get("alpha", 1) * barlow.task_kwargs.scale_loss == 1
    assert barlow.task_kwargs.get("form") == ("uncentred" if "metamask" in config else None)


def test_lambda_and_gamma_of_every_row():
    """ICL-MSR, Section 6.3; COCO's rows (Fig. 4) have no setting of their own, and take Table 1's."""
    table_1 = {"simclr": (1, 1), "byol": (0.1, 1), "lmcl": (0.1, 1), "ressl": (0.01, 1)}
    expected = {
        **dict.fromkeys((*SMALL, "coco"), table_1),
        "imagenet-100": {"simclr": (0.1, 1), "cmc": (0.1, 0.1), "dcl": (1, 1), "lmcl": (1, 1)},
        "imagenet": {"simclr": (0.1, 1), "byol": (0.1, 1)},
    }
    for folder, rows in expected.items():
        for task, (lamb, gamma) in rows.items():
            kwargs = composed(f"{folder}/icl_msr_simclr", f"task={task}").method_kwargs
            assert (kwargs.lamb, kwargs.gamma, kwargs.regularizer.n) == (lamb, gamma, 6), (folder, task)
            assert kwargs.meta.when == "epoch_end"  # Algorithm 1


def test_table_1_of_metamask_has_its_batch_bank_and_encoder():
    for task, (folder, encoder) in product(("simclr", "cmc", "dcl", "hcl"), product(SMALL, ("conv", "fc"))):
        cfg = composed(
            f"{folder}/metamask_barlow", "setting=metamask_table1", f"task={task}", f"backbone.name={encoder}"
        )
        assert (cfg.optimizer.batch_size, cfg.backbone.name) == (64, encoder)
        assert cfg.method_kwargs.task_kwargs.bank_size == 4096


def test_negative_sample_size_of_icl_msr_table_2():
    for task in ("simclr", "moco", "cmc", "dcl", "lmcl"):
        settings = composed("imagenet-100/icl_msr_simclr", f"task={task}").method_kwargs.task_kwargs
        assert settings.get("bank_size", settings.get("queue_size")) == 4096


def test_views_that_a_task_needs_come_with_it():
    for config in ("metamask_barlow", "icl_msr_simclr", "cifar/metamask_barlow", "stl10/icl_msr_simclr"):
        weak, strong, original = composed(config, "task=ressl").augmentations
        assert weak.color_jitter.prob == 0 < strong.color_jitter.prob
        assert weak.crop_size == strong.crop_size != original.crop_size
    for config in ("imagenet/icl_msr_simclr", "imagenet-100/icl_msr_simclr"):
        large, small, _ = composed(config, "task=swav").augmentations
        assert (large.num_crops, large.crop_size, small.num_crops, small.crop_size) == (2, 224, 6, 96)


def test_every_task_has_its_config_and_no_file_is_left_over():
    assert {path.stem for path in (ROOT / "task").glob("*.yaml")} == set(TASKS)
    sections = OmegaConf.load(ROOT / "base" / "task_settings.yaml")
    for section, tasks in sections.items():
        assert set(tasks) <= set(TASKS), section
        used = [path for path in ROOT.rglob("*.yaml") if f"/task_settings/{section}:" in path.read_text()]
        assert used or section == "metamask_table1", section  # that one by setting=


def test_every_key_of_a_task_stands_in_its_config():
    """None needs a plus sign, in solo-learn's scripts neither."""
    for name, task in TASKS.items():
        written = OmegaConf.load(ROOT / "task" / f"{name}.yaml").task_kwargs
        assert set(written) == set(inspect.signature(task).parameters) - {"features_dim"}, name


@pytest.mark.parametrize("ablation", ["feature_dropout", "shared_feature_dropout"])
def test_feature_dropout_is_table_5_of_metamask(ablation):
    cfg = composed("cifar/metamask_barlow", "task=barlow_twins", f"ablation={ablation}")
    assert cfg.method == "baseline" and cfg.method_kwargs.task == "barlow_twins"
    assert cfg.method_kwargs.feature_dropout == {"rate": 0.05, "shared": ablation.startswith("shared")}


TABLE_1 = """
import resource, sys, torch
from hydra import compose, initialize_config_dir
from metamask_plugin.methods import MetaMask
from omegaconf import OmegaConf

torch.set_num_threads(1)
folder, size = sys.argv[1], int(sys.argv[2])
with initialize_config_dir(sys.argv[3], version_base="1.2"):
    cfg = compose(f"{folder}/metamask_barlow", ["setting=metamask_table1"])
OmegaConf.set_struct(cfg, False)
cfg.data.num_classes, cfg.data.num_large_crops, cfg.data.num_small_crops = 10, 2, 0
model = MetaMask(cfg)
assert len(model.task.bank) == 4096 and cfg.optimizer.batch_size == 64 and cfg.backbone.name == "conv"
views = [torch.randn(64, 3, size, size) for _ in range(2)]
parameters = [p for group in model.learnable_params for p in group["params"]]
optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
model.meta.start(model.meta_parameters(), optimizer)
for _ in range(2):
    loss, _, z, _ = model.regular_loss({"feats": [model.backbone(x) for x in views]}, None)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    trial = model.meta.inner_step(optimizer)
    gradient = model.meta.estimator.gradient(model.meta_problem(views), trial).outer_params[0]
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and gradient.abs().max() > 0
    model.task.after_batch(z, None)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # kB to GB
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "size"), [("cifar", 32), pytest.param("tiny-imagenet", 64, marks=pytest.mark.slow)]
)
def test_table_1_of_metamask_steps_within_4_gb(folder, size):
    done = subprocess.run(
        [sys.executable, "-c", TABLE_1, folder, str(size), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 4, done.stdout
