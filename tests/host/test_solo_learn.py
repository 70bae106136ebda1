"""The contract, and our methods, on solo-learn itself."""

import numpy as np
import pytest
from PIL import Image
from solo_checkout import REPOSITORY, needs_solo_learn, under_solo

TESTS = REPOSITORY / "tests"
pytestmark = needs_solo_learn


# the host changes nothing in the gradients: the tasks that differ most, with their exact ones, are enough
@pytest.mark.parametrize(
    ("tests", "chosen"),
    [
        pytest.param("host/test_contract.py", "", marks=pytest.mark.slow),
        ("methods/test_metamask.py", "not timm"),
        pytest.param("methods/test_icl_msr.py", "not timm", marks=pytest.mark.slow),
        pytest.param(
            "methods/test_every_task.py", "simclr or byol or swav or cmc", marks=pytest.mark.slow
        ),  # exact gradients among them
    ],
)
def test_our_tests_pass_on_solo_learns_base_method(tests, chosen):
    path = str(TESTS / tests)
    done = under_solo("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "-k", chosen, path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_host_is_solo_learn_and_has_our_encoders():
    done = under_solo(
        "-c",
        "from metamask_plugin.host import name, BaseMethod as ours\n"
        "from solo.methods.base import BaseMethod as theirs\n"
        "print(name, ours is theirs, 'conv4' in theirs._BACKBONES)",
    )
    assert done.stdout.split() == ["solo", "True", "True"], done.stderr[-2000:]


# solo-learn's main_pretrain.py, step by step, as far as it runs on a CPU with the newest torchmetrics
LOADER = """
import sys
import lightning.pytorch as pl, torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from solo.args.pretrain import parse_cfg
from solo.data.pretrain_dataloader import (
    FullTransformPipeline, NCropAugmentation, build_transform_pipeline, prepare_dataloader, prepare_datasets)
from solo.methods import METHODS
import metamask_plugin.methods

configs, images, config, size, *overrides = sys.argv[1:]
torch.set_num_threads(1)
with initialize_config_dir(configs, version_base="1.2"):
    cfg = compose(config, [
        "data.dataset=custom", f"data.train_path={images}", f"data.val_path={images}", "data.num_workers=0",
        "optimizer.batch_size=4", "augmentations.0.crop_size=64", f"augmentations.{size}",
        "max_epochs=1", f"checkpoint.dir={images}",
        "method_kwargs.task_kwargs.proj_hidden_dim=32", "backbone.name=resnet18", *overrides])
OmegaConf.set_struct(cfg, False)
cfg = parse_cfg(cfg)
print("crops", cfg.data.num_large_crops, cfg.data.num_small_crops)
model = METHODS[cfg.method](cfg)
transform = FullTransformPipeline([
    NCropAugmentation(build_transform_pipeline(cfg.data.dataset, node), node.num_crops)
    for node in cfg.augmentations])
loader = prepare_dataloader(
    prepare_datasets(cfg.data.dataset, transform, train_data_path=images, data_format="image_folder"),
    batch_size=4, num_workers=0)
print("views", [view.shape[-1] for view in next(iter(loader))[1]])
before = {name: value.clone() for name, value in model.regularizer.state_dict().items()}
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False)
trainer.fit(model, loader)
after = model.regularizer.state_dict()
print("moved", any(not torch.equal(value, after[name]) for name, value in before.items()))
print("host", next(c.__module__ for c in type(model).__mro__ if c.__name__ == "BaseMethod"))
"""


@pytest.mark.parametrize(
    ("config", "overrides", "views"),
    [
        ("stl10", ("1.crop_size=48",), [64, 64, 48]),
        pytest.param("imagenet-100", ("1.crop_size=112",), [64, 64, 112], marks=pytest.mark.slow),
        pytest.param(
            "imagenet-100",
            ("1.crop_size=48", "task=swav"),
            [64, 64, *[48] * 6, 112],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_icl_msr_gets_its_unaugmented_view_from_solo_learns_own_loader(tmp_path, config, overrides, views):
    rng = np.random.default_rng(0)
    for index in range(8):
        folder = tmp_path / ("cat", "dog")[index % 2]
        folder.mkdir(exist_ok=True)
        size = (72, 80 if config == "imagenet-100" else 72, 3)  # ImageNet's images are not square
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{index}.png")
    scripts = REPOSITORY / "scripts" / "pretrain"
    done = under_solo("-c", LOADER, str(scripts), str(tmp_path), f"{config}/icl_msr_simclr", *overrides)
    assert f"crops 2 {len(views) - 2}" in done.stdout, done.stderr[-2000:]
    assert f"views {views}" in done.stdout, done.stderr[-2000:]
    assert "moved True" in done.stdout and "host solo.methods.base" in done.stdout, done.stdout
