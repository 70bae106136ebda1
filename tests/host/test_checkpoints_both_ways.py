"""solo-learn reads our checkpoints, we read solo-learn's: the same features, bit by bit on the CPU."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from solo_checkout import REPOSITORY, ROOT, needs_solo_learn, under_solo

from metamask_plugin.cli import foreground, knn, linear
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import find_checkpoint, read_args, recorded_host
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.host.solo_networks import IN_TIMM

pytestmark = needs_solo_learn

# method, encoder, its options, data set; "cifar10" is what makes solo-learn build its small stem
RUNS = {
    "metamask": ("metamask", "resnet18", {}, "cifar10"),
    "metamask-conv": ("metamask", "conv", {}, "custom"),
    "simclr": ("simclr", "resnet18", {"zero_init_residual": True}, "cifar10"),
    "barlow_twins": ("barlow_twins", "resnet50", {}, "cifar10"),
    "byol": ("byol", "resnet18", {}, "custom"),
    "swav": ("swav", "resnet18", {}, "custom"),
    "simsiam": ("simsiam", "resnet18", {}, "custom"),  # its checkpoints hold more than tensors
    "vicreg": ("vicreg", "convnext_tiny", {}, "custom"),
    "simclr-vit": ("simclr", "vit_tiny", {"img_size": 32, "patch_size": 8}, "custom"),
    "mocov3": ("mocov3", "vit_tiny", {"img_size": 32, "patch_size": 8}, "custom"),
    "simclr-poolformer": ("simclr", "poolformer_s12", {}, "custom"),
    "simclr-wide": ("simclr", "wide_resnet28w2", {}, "custom"),
}
ONLY_THERE = ("simclr-poolformer", "simclr-wide")
"""On networks that exist in solo-learn alone."""

# Trains each for two steps, then lets solo-learn's main_linear.py and main_knn.py read what its Checkpointer
# wrote, as far as the line at which data come in.
TRAIN = """
import json, sys
from pathlib import Path
import lightning.pytorch as pl, torch
from omegaconf import OmegaConf
import main_knn, main_linear
from solo.methods import METHODS
from solo.utils.checkpointer import Checkpointer
from metamask_plugin.methods import MetaMask

torch.set_num_threads(1)
root, images, runs = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
generator = torch.Generator().manual_seed(0)
batches = [[torch.arange(6), [torch.randn(6, 3, 32, 32, generator=generator) for _ in range(2)],
            torch.arange(6) % 2] for _ in range(2)]
probe = torch.randn(3, 3, 32, 32, generator=generator)


def config(method, backbone, kwargs, dataset):
    heads = {"proj_hidden_dim": 24, "proj_output_dim": 16}
    own = {**heads, "pred_hidden_dim": 8, "temperature": 0.2, "queue_size": 12, "num_prototypes": 10}
    return OmegaConf.create({
        "name": "run", "method": method, "seed": 5, "max_epochs": 1, "devices": "1", "strategy": "auto",
        "backbone": {"name": backbone, "kwargs": kwargs},
        "data": {"dataset": dataset, "train_path": images + "/train", "val_path": images + "/val",
                 "format": "dali" if dataset == "custom" else "image_folder", "no_labels": False,
                 "fraction": -1, "num_workers": 0, "num_classes": 2,
                 "num_large_crops": 2, "num_small_crops": 0},
        "augmentations": [{"crop_size": 32, "num_crops": 2, "rrc": {"enabled": True}}],
        "optimizer": {"name": "sgd", "batch_size": 6, "lr": 0.01, "classifier_lr": 0.1,
                      "weight_decay": 1e-4, "kwargs": {"momentum": 0.9}},
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 0},
        "performance": {"disable_channel_last": True},
        "momentum": {"base_tau": 0.9},
        "method_kwargs": {"task_kwargs": heads, "redundancy": heads} if method == "metamask" else own,
    })


def train(cfg, logdir):
    pl.seed_everything(cfg.seed)
    model = METHODS[cfg.method](cfg)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False,
                         callbacks=[Checkpointer(cfg, logdir)])
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return model.eval()


class NoTraining:
    def __init__(self, **kwargs):
        pass

    def fit(self, model, *args, **kwargs):
        self.__class__.model = model


def by_main_linear(folder, args):
    main_linear.Trainer = NoTraining
    main_linear.prepare_data = lambda *args, **kwargs: (None, None)
    main_linear.main.__wrapped__(OmegaConf.create({
        "name": "linear", "max_epochs": 1, "devices": "1", "performance": {"disable_channel_last": True},
        "pretrain_method": args["method"], "pretrained_feature_extractor": str(next(folder.glob("*.ckpt"))),
        "backbone": args["backbone"], "data": {**args["data"], "format": "image_folder"},
        "optimizer": args["optimizer"], "scheduler": {"name": "none"}}))
    return NoTraining.model.backbone.eval()


def by_main_knn(folder, args):
    found = []
    main_knn.parse_args_knn = lambda: OmegaConf.create({
        "pretrained_checkpoint_dir": str(folder), "dataset": "cifar10", "train_data_path": "",
        "val_data_path": "", "data_format": "", "batch_size": 1, "num_workers": 0, "feature_type": []})
    main_knn.prepare_datasets = main_knn.prepare_dataloaders = lambda *args, **kwargs: (None, None)
    main_knn.extract_features = lambda loader, model: found.append(model) or (None, None, None)
    main_knn.main()
    return found[0].eval()


with torch.no_grad():
    for name, run in runs.items():
        with torch.enable_grad():
            model = train(config(*run), root / name)
        (folder,) = (root / name).iterdir()
        args = json.loads((folder / "args.json").read_text())
        trained = model(probe)
        read = by_main_knn(folder, args)(probe)
        old, new = next(folder.glob("*.ckpt")), root / name / "weights.pth"
        torch.save({"state_dict": torch.load(old, weights_only=False)["state_dict"]}, new)
        torch.save({"probe": probe, "feats": trained["feats"]}, root / name / "reference.pt")
        print("RESULT", json.dumps({
            "name": name,
            "folder": folder.name,
            "main_linear": torch.equal(by_main_linear(folder, args)(probe), trained["feats"]),
            "main_knn": all(torch.equal(read[key], trained[key]) for key in ("feats", "z")),
        }))
"""

LOAD = """
import json, sys
import torch
from metamask_plugin.evaluation.encoder import load_encoder
import metamask_plugin.host

torch.set_num_threads(1)
with torch.no_grad():
    for folder in sys.argv[1:]:
        reference = torch.load(folder + "/../reference.pt")
        feats = load_encoder(folder).backbone(reference["probe"])
        print("RESULT", torch.equal(feats, reference["feats"]))
"""


def results(done):
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and found, done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of each run, and what solo-learn's own programs made of it."""
    root, images = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(16):
        folder = images / ("train", "val")[index // 8] / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    done = under_solo(
        *("-c", TRAIN, str(root), str(images), json.dumps(RUNS)),
        cwd=images,  # main_knn and main_linear are solo-learn's, not ours
        PYTHONPATH=f"{ROOT}{os.pathsep}{REPOSITORY}",
        # solo-learn reads files that hold more than tensors, which torch since 2.6 refuses unless it is told
        TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1",
    )
    found = {}
    for line in results(done):
        result = json.loads(line)
        found[result["name"]] = {**result, "folder": root / result["name"] / result["folder"]}
    yield found
    shutil.rmtree(root)


def features(folder, **options):
    reference = torch.load(folder.parent / "reference.pt")
    with torch.no_grad():
        return load_encoder(folder, **options).backbone(reference["probe"]), reference["feats"]


@pytest.mark.parametrize("name", RUNS)
def test_solo_learns_programs_read_the_checkpoint(runs, name):
    assert runs[name]["main_linear"] and runs[name]["main_knn"]


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ONLY_THERE])
def test_without_solo_learn_the_features_are_the_same_bits(runs, name):
    feats, expected = features(runs[name]["folder"])
    assert torch.equal(feats, expected)


@pytest.mark.slow
def test_with_solo_learn_all_of_them_are(runs):
    folders = [str(run["folder"]) for run in runs.values()]
    assert results(under_solo("-c", LOAD, *folders, METAMASK_HOST="embedded")) == ["True"] * len(RUNS)


@pytest.mark.parametrize("name", ONLY_THERE)
def test_networks_of_solo_learns_own_are_asked_for(runs, name):
    with pytest.raises(UserError, match="solo-learn for backbone.name=.* must be importable"):
        load_encoder(runs[name]["folder"])


def test_the_hosts_networks_differ_and_args_json_tells_them_apart(runs):
    folder = runs["metamask"]["folder"]
    args = read_args(find_checkpoint(folder))
    assert args["host"] == "solo" and recorded_host(args) == "solo"
    assert "host" not in read_args(find_checkpoint(runs["simclr"]["folder"]))
    feats, expected = features(folder, host="embedded")
    assert not torch.equal(feats, expected)


def test_what_a_schedule_with_a_fixed_rate_leaves_is_not_read(runs):
    folder = runs["simsiam"]["folder"]
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(find_checkpoint(folder), weights_only=True)
    ours = load_encoder(folder).backbone.state_dict()
    # written as the error for other objects advises
    theirs = torch.load(folder.parent / "weights.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, theirs[f"backbone.{key}"]) for key, value in ours.items())


def test_main_knn_reads_a_run_of_solo_learns(runs):
    rows = knn.run(
        knn.parse_args(["--pretrained_checkpoint_dir", str(runs["swav"]["folder"]), "--k", "1", "8"])
    )
    assert [(row["features"], row["k"]) for row in rows] == [("backbone", 1), ("backbone", 8)]
    assert all(0 <= row["acc@1"] <= 100 for row in rows)


def test_main_linear_reads_a_run_of_solo_learns(runs, tmp_path):
    cfg = OmegaConf.create(
        {
            "pretrained_feature_extractor": str(find_checkpoint(runs["byol"]["folder"])),
            "protocol": "fast",
            "accelerator": "cpu",
            "checkpoint": {"dir": str(tmp_path)},
        }
    )
    linear.run(cfg)
    (path,) = tmp_path.glob("linear/linear-*/summary.json")
    summary = json.loads(path.read_text())
    assert (summary["pretrain_method"], summary["dim"]) == ("byol", 512)


def test_main_foreground_reads_a_run_of_solo_learns(runs, tmp_path):
    flags = ["--dataset", "confounded_digits", "--protocol", "none", "--output", str(tmp_path)]
    summary = foreground.run(
        foreground.parse_args(["--pretrained_checkpoint_dir", str(runs["swav"]["folder"]), *flags])
    )
    assert [row["tested on"] for row in summary["runs"]] == ["full", "foreground", "background"]
    assert summary["runs"][0]["name"] == "run"


@pytest.mark.slow
def test_every_name_in_the_table_is_the_same_network_there():
    script = """
from unittest import mock
import torch
from metamask_plugin.evaluation.encoder import network_of
from metamask_plugin.host.solo_networks import IN_TIMM, solo_factories

torch.set_num_threads(1)
side = {"vit": 32, "swin": 64, "convnext": 32}
for name in IN_TIMM:
    kind, size = name.split("_")
    if size != "tiny":  # the same, only more of it
        continue
    options = {"swin": {"img_size": 64, "window_size": 2}, "vit": {"img_size": 32}}.get(kind, {})
    for method in ("simclr", "mocov3", "mae") if kind == "vit" else ("simclr",):
        theirs = solo_factories()[name](method, **options).eval()
        with mock.patch("metamask_plugin.host.solo_networks.solo_factories", dict):
            ours = network_of(name, side[kind], options, "solo", method, {}).eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(2, 3, side[kind], side[kind])
        with torch.no_grad():
            feats, expected = ours(x), theirs(x)
        # MAE shuffles its patches: the same sums in another order
        same = torch.allclose(feats, expected, atol=1e-5) if method == "mae" else torch.equal(feats, expected)
        print("RESULT", name, method, same)
"""
    found = results(under_solo("-c", script))
    assert len(found) == len([name for name in IN_TIMM if name.endswith("tiny")]) + 2
    assert all(line.endswith("True") for line in found), found
