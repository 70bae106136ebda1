"""solo-learn's own, untouched scripts, with this package installed and nothing else done."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from solo_checkout import REPOSITORY, ROOT, needs_solo_learn, under_solo

pytestmark = needs_solo_learn

SMALL = (
    "data.num_workers=0",
    "accelerator=cpu",
    "optimizer.batch_size=8",
    "backbone.name=conv4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the scripts run; in it, JPEG crops of two photographs in five classes of four."""
    root = tmp_path_factory.mktemp("solo")
    photographs = load_sample_images().images
    for split, shift in (("train", 0), ("val", 9)):
        for label in range(5):
            where = root / split / f"class{label}"
            where.mkdir(parents=True)
            for index in range(4):
                top, left = 60 * label + shift, 130 * index + 7 * shift
                crop = photographs[label % 2][top : top + 70, left : left + 80]
                Image.fromarray(np.ascontiguousarray(crop)).save(where / f"{index}.jpg")
    return root


def script(folder, name, *args):
    """One of solo-learn's scripts, as a user of its clone would type it."""
    env = {key: value for key, value in os.environ.items() if key not in ("METAMASK_HOST", "PYTHONPATH")}
    env |= {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    if (folder / "train").exists() and name.startswith("main_"):
        paths = (f"data.train_path={folder / 'train'}", f"data.val_path={folder / 'val'}")
        args = (*args, "data.dataset=custom", *paths, *SMALL)
    return subprocess.run(
        [sys.executable, str(ROOT / name), *args], capture_output=True, text=True, env=env, cwd=folder
    )


def checkpoint(folder, method, epoch):
    (found,) = (folder / "trained_models" / method).glob(f"*/*-ep={epoch}.ckpt")
    return found


@pytest.fixture(scope="module")
def pretrained(folder):
    """A run of main_pretrain.py."""
    done = script(folder, "main_pretrain.py", "--config-name", "metamask_barlow", "max_epochs=1")
    assert done.returncode == 0, done.stderr[-2000:]
    return checkpoint(folder, "metamask", 0)


def test_metamask_barlow_means_cifar_and_trains(folder, pretrained):
    args = json.loads((pretrained.parent / "args.json").read_text())
    assert args["name"] == "metamask_barlow-cifar10" and args["method"] == "metamask"
    assert args["host"] == "solo" and args["method_kwargs"]["alpha"] == 100
    state = torch.load(pretrained, weights_only=True)["state_dict"]
    assert not torch.equal(state["mask.weight"], torch.ones_like(state["mask.weight"]))


def test_a_run_is_resumed(folder, pretrained):
    # a file name of solo-learn's has "=" in it, which Hydra wants quoted
    resumed = f"resume_from_checkpoint='{pretrained}'"
    done = script(folder, "main_pretrain.py", "--config-name", "metamask_barlow", "max_epochs=2", resumed)
    assert done.returncode == 0, done.stderr[-2000:]
    bars = done.stdout + done.stderr  # Lightning's own, or rich's where that is installed
    assert re.search(r"Epoch 1[:/]", bars) and not re.search(r"Epoch 0[:/]", bars)
    before, after = (torch.load(path, weights_only=True) for path in (pretrained, _second(folder)))
    assert after["global_step"] == 2 * before["global_step"] > 0
    assert after["meta_optimizer"]["state"][0]["step"] == 2 * before["meta_optimizer"]["state"][0]["step"]


def _second(folder):
    return checkpoint(folder, "metamask", 1)


@pytest.mark.slow
def test_solo_learns_auto_resume_cannot_take_another_experiment(folder, pretrained):
    """It looks for a run of the same method and optimiser, whatever its method_kwargs."""
    done = script(
        folder,
        "main_pretrain.py",
        "--config-name",
        "metamask_barlow",
        "max_epochs=1",
        "method_kwargs.alpha=7",
    )
    assert done.returncode != 0
    assert "must be of this run, with its method_kwargs.alpha, got {'alpha': 100" in done.stderr
    assert "auto_resume.enabled=False" in done.stderr


def test_a_probe_on_the_checkpoint(folder, pretrained):
    done = script(
        folder,
        "main_linear.py",
        *("--config-name", "metamask_barlow", f"pretrained_feature_extractor='{pretrained}'"),
        *("max_epochs=1", "+data.augmentations.crop_size=32"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    args = json.loads(next((folder / "trained_models" / "linear").glob("*/args.json")).read_text())
    assert args["name"] == "metamask_barlow-cifar10-linear"


@pytest.mark.slow
def test_solo_learns_own_method_as_the_task_with_its_own_settings(folder):
    done = script(
        folder,
        "main_pretrain.py",
        *("--config-name", "metamask_barlow", "max_epochs=1", "checkpoint.dir=simsiam"),
        *("method_kwargs.task=solo:simsiam", "method_kwargs.task_kwargs.proj_hidden_dim=64"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("simsiam/metamask/*/args.json")
    kwargs = json.loads(path.read_text())["method_kwargs"]
    # SimCLR's settings, which the config composes (temperature 0.5), are gone; the user's stays
    assert kwargs["task"] == "solo:simsiam" and kwargs["task_kwargs"]["temperature"] == 0.2
    assert kwargs["task_kwargs"]["proj_hidden_dim"] == 64
    assert kwargs["task_kwargs"]["pred_hidden_dim"] == 512
    # the predictor's constant rate is a function in solo-learn's schedule, and would make the file unsafe
    (saved,) = path.parent.glob("*.ckpt")
    rates = torch.load(saved, weights_only=True)["lr_schedulers"][0]["_last_lr"]
    assert len({*rates}) == 2 and min(rates) == 0


@pytest.mark.slow
def test_icl_msr_trains(folder):
    done = script(folder, "main_pretrain.py", "--config-name", "icl_msr_simclr", "max_epochs=1")
    assert done.returncode == 0, done.stderr[-2000:]
    state = torch.load(checkpoint(folder, "icl_msr", 0), weights_only=True)["state_dict"]
    assert any(name.startswith("regularizer.") for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["main_knn.py", "main_umap.py"])
def test_scripts_without_hydra_get_as_far_as_their_own_needs(folder, pretrained, name):
    """CUDA for both, UMAP's libraries for one; our scripts of the same names need neither."""
    arguments = ["--dataset=custom", "--data_format=image_folder"]
    arguments += [f"--train_data_path={folder / 'train'}", f"--val_data_path={folder / 'val'}"]
    arguments += [f"--pretrained_checkpoint_dir={pretrained.parent}"]
    if name == "main_knn.py":
        arguments += ["--k=1", "--temperature=0.1", "--distance_function=cosine", "--feature_type=backbone"]
    done = under_solo("-m", "metamask_plugin", str(ROOT / name), *arguments, cwd=folder)
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert "CUDA" in last or "NVIDIA" in last or "No module named" in last, done.stderr[-2000:]
        assert "KeyError" not in done.stderr


EVERY_CONFIG = """
import sys
import solo.methods
from hydra import compose, initialize
from omegaconf import OmegaConf
from solo.args.pretrain import parse_cfg
from solo.methods import METHODS
images, *names = sys.argv[1:]
for name in names:
    with initialize(version_base="1.2", config_path=None):
        custom = ["data.dataset=custom", f"data.train_path={images}", f"data.val_path={images}"]
        cfg = compose(name, custom if name.partition("/")[0] in ("coco", "tiny-imagenet") else [])
    OmegaConf.set_struct(cfg, False)
    cfg = parse_cfg(cfg)
    METHODS[cfg.method].add_and_assert_specific_cfg(cfg)
    print(name, cfg.method, cfg.data.num_large_crops, cfg.data.num_small_crops)
"""


@pytest.mark.slow
def test_every_config_composes_there(folder):
    scripts = REPOSITORY / "scripts" / "pretrain"
    names = sorted(
        str(path.relative_to(scripts).with_suffix(""))
        for pattern in ("*/metamask_*.yaml", "*/icl_msr_*.yaml")
        for path in scripts.glob(pattern)
        if path.parent.name != "setting"
    )
    done = under_solo("-c", EVERY_CONFIG, str(folder / "train"), "metamask_barlow", "icl_msr_simclr", *names)
    lines = done.stdout.splitlines()
    assert len(lines) == len(names) + 2, done.stderr[-2000:]
    for line in lines:
        name, method, large, small = line.split()
        assert name.rpartition("/")[2].startswith(method) and large == "2", line
        assert small == ("1" if method == "icl_msr" else "0"), line


@pytest.mark.slow
def test_importing_solo_learn_imports_nothing_of_ours():
    show = "import sys, solo.methods; print([name for name in sys.modules if 'metamask' in name])"
    assert under_solo("-c", show).stdout.strip() == "[]"


@pytest.mark.slow
def test_registration_is_idempotent_and_refuses_another_class_of_that_name():
    show = (
        "import importlib, solo.methods as solo, metamask_plugin.methods as ours\n"
        "ours_before = {name: solo.METHODS[name] for name in ('bare', 'metamask', 'icl_msr')}\n"
        "importlib.reload(ours)\n"
        "print(all(solo.METHODS[name] is cls for name, cls in ours_before.items()))\n"
        "solo.METHODS['metamask'] = solo.METHODS['byol']\n"
        "importlib.reload(ours)\n"
    )
    done = under_solo("-c", show)
    assert done.stdout.strip() == "True"
    assert "method 'metamask' is already registered by solo.methods.byol.BYOL" in done.stderr


@pytest.mark.slow
def test_a_solo_learn_that_has_the_methods_itself_is_left_alone():
    """As once they are contributed: its own are not ours, and its configs are its own."""
    show = (
        "import solo.methods as solo\n"
        "from hydra import compose, initialize\n"
        "class Upstream(solo.METHODS['byol']): __module__ = 'solo.methods.metamask'\n"
        "solo.METHODS['metamask'] = Upstream\n"
        "with initialize(version_base='1.2', config_path=None):\n"
        "    try: compose('metamask_barlow')\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "print(solo.METHODS['metamask'] is Upstream, 'icl_msr' in solo.METHODS)\n"
    )
    assert under_solo("-c", show).stdout.split() == ["MissingConfigException", "True", "False"]


def test_another_hydra_application_is_left_alone(tmp_path):
    (tmp_path / "app.py").write_text(
        "import hydra, sys\n"
        "@hydra.main(version_base='1.2', config_path=None)\n"
        "def main(cfg):\n"
        "    from hydra.core.hydra_config import HydraConfig\n"
        "    sources = HydraConfig.get().runtime.config_sources\n"
        "    print([s.provider for s in sources if 'metamask' in s.provider], 'torch' in sys.modules)\n"
        "main()\n"
    )
    done = under_solo(str(tmp_path / "app.py"), cwd=tmp_path)
    assert done.stdout.strip() == "[] False", done.stderr[-2000:]
