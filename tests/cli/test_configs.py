"""Every shipped pretraining config: composed both ways, and trained for a step or two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.cli.known import shipped
from metamask_plugin.cli.pretrain import run
from metamask_plugin.evaluation.checkpoints import load_mask

ROOT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain"
CONFIGS = shipped("pretrain")
ABLATIONS = {
    "metamask": ("barlow", "fixed_lr", "no_drr", "official", "per_epoch", "random_mask", "simclr"),
    "icl_msr": ("no_msr", "no_uniformity", "semi_supervised"),
    "either": ("finite_difference", "first_order", "no_meta"),
}
APPLICABLE = [
    (method, name) for method in ("metamask", "icl_msr") for name in ABLATIONS[method] + ABLATIONS["either"]
]
ESTIMATORS = ("finite_difference", "first_order")  # the same engine under either method
SHIPPED = {"metamask": "metamask_barlow", "icl_msr": "icl_msr_simclr"}


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of four small random images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return tmp_path


def composed(name, *overrides, folder=""):
    with initialize_config_dir(str(ROOT / folder), version_base="1.2"):
        return compose(name, overrides=list(overrides))


def test_there_is_one_for_every_data_set():
    def folders(config):
        return {Path(name).parent.name for name in CONFIGS if Path(name).name == config}

    both = {"", "cifar", "stl10", "tiny-imagenet", "imagenet-100", "imagenet"}
    assert folders("metamask_barlow") == both
    assert folders("icl_msr_simclr") == both | {"coco"}


def test_every_ablation_is_tried_here():
    shipped = {path.stem for path in (ROOT / "ablation").glob("*.yaml")}
    # in test_rows.py, and below
    elsewhere = {"none", "feature_dropout", "shared_feature_dropout", "frozen_mask"}
    assert {name for names in ABLATIONS.values() for name in names} | elsewhere == shipped


@pytest.mark.parametrize("name", SHIPPED.values())
def test_none_is_no_ablation(name):
    assert composed(name, "ablation=none") == composed(name)


@pytest.mark.parametrize("name", [name for name in CONFIGS if "/" in name])
def test_composes_from_its_own_folder_too(name):
    folder, stem = name.split("/")
    assert composed(stem, folder=folder) == composed(name)
    # ReSSL has views of its own for some data sets, and the others must not get those
    assert composed(stem, "task=ressl", folder=folder) == composed(name, "task=ressl")


def _some_slow(name):
    """Of the configs for files, the command that everybody runs tries the smallest and the largest images."""
    folder = name.rpartition("/")[0]
    return pytest.param(
        name, marks=pytest.mark.slow if folder in ("stl10", "imagenet-100", "imagenet", "coco") else ()
    )


@pytest.mark.parametrize("name", map(_some_slow, CONFIGS))
def test_trains(name, image_folder, tmp_path):
    overrides = [
        "optimizer.batch_size=4",
        "method_kwargs.meta.every_n_steps=1",
        "max_epochs=1",
        "accelerator=cpu",
        "data.num_workers=0",
        f"checkpoint.dir={tmp_path / 'out'}",
        "evaluation.enabled=False",
        "limit_train_batches=2",
    ]
    if "/" in name:
        overrides += [f"data.train_path={image_folder / 'train'}", f"data.val_path={image_folder / 'val'}"]
        if composed(name).augmentations[0].crop_size == 224:  # seconds instead of a minute
            overrides.append("augmentations.0.crop_size=64")
        if composed(name).augmentations[-1].crop_size == 112:
            overrides.append("augmentations.1.crop_size=48")
        overrides += ["data.dataset=custom"]  # of few classes; the rest of the config does not depend on it
    else:
        overrides += ["data.kwargs.test_copies=1"]  # no evaluation looks at them
    # a wide head costs memory and teaches a test nothing
    overrides += ["method_kwargs.task_kwargs.proj_hidden_dim=32"]
    if composed(name).method == "metamask":
        overrides += [f"method_kwargs.redundancy.proj_{width}_dim=32" for width in ("hidden", "output")]
    cfg = composed(name, *overrides)
    folder = run(cfg)
    assert folder.last_checkpoint.exists()
    assert "train_outer_loss" in (folder.path / "metrics.csv").read_text()
    assert (folder.path / "args.json").exists()


@pytest.mark.parametrize(("method", "ablation"), APPLICABLE)
def test_ablations_apply_to_any_config_of_the_method(method, ablation):
    for name in (SHIPPED[method], f"cifar/{SHIPPED[method]}"):
        plain, ablated = composed(name), composed(name, f"ablation={ablation}")
        assert ablated.name == f"{method}-{ablation}"
        del plain.name, ablated.name
        assert OmegaConf.to_container(plain) != OmegaConf.to_container(ablated)


@pytest.mark.parametrize(
    ("method", "ablation"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair[0] == "icl_msr" and pair[1] in ESTIMATORS else ())
        for pair in APPLICABLE
    ],
)
def test_ablations_train(method, ablation, tmp_path):
    cfg = composed(
        SHIPPED[method],
        f"ablation={ablation}",
        "accelerator=cpu",
        "max_epochs=1",
        "optimizer.batch_size=16",
        f"checkpoint.dir={tmp_path}",
        "evaluation.enabled=False",
        "limit_train_batches=2",
    )
    metrics = (run(cfg).path / "metrics.csv").read_text()
    assert ("train_outer_loss" in metrics) == (ablation not in ("no_meta", "simclr", "barlow", "no_msr"))
    assert ("train_redundancy_loss" in metrics) == (
        method == "metamask" and ablation not in ("no_drr", "simclr")
    )
    assert ("train_msr_loss" in metrics) == (method == "icl_msr" and ablation != "no_msr")


def test_a_learned_mask_is_held(tmp_path):
    short = ["accelerator=cpu", "max_epochs=1", "optimizer.batch_size=16", "limit_train_batches=2"]
    short += [f"checkpoint.dir={tmp_path}", "evaluation.enabled=False"]
    learned = run(composed("metamask_barlow", "method_kwargs.meta.every_n_steps=1", *short))
    held = run(
        composed(
            "metamask_barlow", "ablation=frozen_mask", f"method_kwargs.mask.start={learned.path}", *short
        )
    )
    masks = [load_mask(folder.path) for folder in (learned, held)]
    assert torch.equal(*masks) and masks[0].std() > 0
    assert (
        json.loads((held.path / "args.json").read_text())["method_kwargs"]["mask"]["start"]
        == masks[0].tolist()
    )
    with pytest.raises(SystemExit):
        run(composed("metamask_barlow", "ablation=frozen_mask", *short))
    with pytest.raises(SystemExit):
        run(composed("metamask_barlow", f"++method_kwargs.mask.start={tmp_path}/none", *short))


def test_the_papers_lambda_gamma_and_schedule_are_shipped():
    """ICL-MSR, Sections 6.2 and 6.3, for SimCLR + MSR."""
    rates = {"cifar": 3e-3, "stl10": 2e-3, "tiny-imagenet": 2e-3, "imagenet-100": 2e-3}
    epochs = {"cifar": 1000, "stl10": 2000, "tiny-imagenet": 1000, "imagenet-100": 1000}
    for folder, rate in rates.items():
        cfg = composed(f"{folder}/icl_msr_simclr")
        kwargs = cfg.method_kwargs
        assert cfg.optimizer.name == "adam" and cfg.optimizer.weight_decay == 1e-6
        assert cfg.optimizer.lr * cfg.optimizer.batch_size / 256 == pytest.approx(rate)
        assert cfg.max_epochs == epochs[folder]
        assert (cfg.scheduler.warmup_steps, cfg.scheduler.decay_factor) == (500, 0.2)
        assert list(cfg.scheduler.lr_decay_steps) == [-50, -25]
        assert (kwargs.gamma, kwargs.uniformity.t, kwargs.regularizer.n) == (1.0, 2.0, 6)
        assert kwargs.lamb == (0.1 if folder == "imagenet-100" else 1.0)
        assert kwargs.task_kwargs.temperature == 0.5
    assert composed("imagenet/icl_msr_simclr").method_kwargs.lamb == 0.1
