"""Every shipped pretraining config: composed both ways, and trained for a step or two."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.cli.pretrain import run

ROOT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain"
CONFIGS = sorted(
    str(path.relative_to(ROOT).with_suffix(""))
    for path in [*ROOT.glob("*.yaml"), *ROOT.glob("*/metamask_*.yaml")]
)
ABLATIONS = sorted(path.stem for path in (ROOT / "ablation").glob("*.yaml"))


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
    folders = {Path(name).parent.name for name in CONFIGS}
    assert folders == {"", "cifar", "stl10", "tiny-imagenet", "imagenet-100", "imagenet"}


@pytest.mark.parametrize("name", [name for name in CONFIGS if "/" in name])
def test_composes_from_its_own_folder_too(name):
    folder, stem = name.split("/")
    assert composed(stem, folder=folder) == composed(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_trains(name, image_folder, tmp_path):
    overrides = [
        "optimizer.batch_size=4",
        "method_kwargs.meta.every_n_steps=1",
        "max_epochs=1",
        "accelerator=cpu",
        "data.num_workers=0",
        f"checkpoint.dir={tmp_path / 'out'}",
        "++evaluation.enabled=False",
        "++limit_train_batches=2",
    ]
    if "/" in name:
        overrides += [f"data.train_path={image_folder / 'train'}", f"data.val_path={image_folder / 'val'}"]
        if composed(name).data.dataset == "stl10":  # read by torchvision or from class folders alike
            overrides += ["data.dataset=custom"]
    # a wide head costs memory and teaches a test nothing
    overrides += [
        "method_kwargs.redundancy.proj_hidden_dim=32",
        "method_kwargs.redundancy.proj_output_dim=32",
    ]
    cfg = composed(name, *overrides)
    folder = run(cfg)
    assert folder.last_checkpoint.exists()
    assert "train_outer_loss" in (folder.path / "metrics.csv").read_text()
    assert (folder.path / "args.json").exists()


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_apply_to_any_config(ablation):
    for name in ("metamask_barlow", "cifar/metamask_barlow"):
        plain, ablated = composed(name), composed(name, f"ablation={ablation}")
        assert ablated.name == f"metamask-{ablation}"
        del plain.name, ablated.name
        assert OmegaConf.to_container(plain) != OmegaConf.to_container(ablated)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_train(ablation, tmp_path):
    cfg = composed(
        "metamask_barlow",
        f"ablation={ablation}",
        "accelerator=cpu",
        "max_epochs=1",
        "optimizer.name=sgd",  # the official trial step needs a momentum buffer
        "optimizer.batch_size=16",
        f"checkpoint.dir={tmp_path}",
        "++evaluation.enabled=False",
        "++limit_train_batches=2",
    )
    metrics = (run(cfg).path / "metrics.csv").read_text()
    assert ("train_outer_loss" in metrics) == (ablation not in ("no_meta", "simclr", "barlow"))
    assert ("train_redundancy_loss" in metrics) == (ablation not in ("no_drr", "simclr"))
