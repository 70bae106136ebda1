"""Checkpoints and ``args.json`` that somebody has edited: one line that names file and key."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused

from metamask_plugin.cli import foreground, knn, linear, umap
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.encoder import Encoder, load_encoder
from metamask_plugin.modules.encoders import build_encoder

ARGS = {
    "method": "metamask",
    "name": "run",
    "seed": 5,
    "backbone": {"name": "conv4", "kwargs": {"width": 4}},
    "augmentations": [{"crop_size": 16, "num_crops": 2}],
    "data": {"dataset": "confounded_digits", "num_workers": 0, "fraction": 0.1, "kwargs": {"size": 16}},
}
DEEP = 100_000


@pytest.fixture
def run(tmp_path):
    """A run folder, whose checkpoint and args.json can be edited."""
    torch.manual_seed(0)
    encoder = build_encoder("conv4", 16, width=4)
    state = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}

    def write(args=ARGS, **tensors):
        edited = {**state, "mask.weight": torch.ones(32), **tensors}
        torch.save({"state_dict": edited}, tmp_path / "last.ckpt")
        (tmp_path / "args.json").write_text(args if isinstance(args, str) else json.dumps(args))
        return tmp_path

    return write


def linear_main(folder):
    linear.run(
        OmegaConf.create(
            {"pretrained_feature_extractor": folder, "protocol": "fast", "checkpoint": {"enabled": False}}
        )
    )


READERS = {
    "main_knn": lambda folder: knn.main(["--pretrained_checkpoint_dir", folder, "--k", "5"]),
    "main_umap": lambda folder: umap.main(["--pretrained_checkpoint_dir", folder, "--limit", "20"]),
    "main_foreground": lambda folder: foreground.main(
        ["--pretrained_checkpoint_dir", folder, "--protocol", "none"]
    ),
    "main_linear": linear_main,
}


def last_line(reader, folder, capsys):
    return refused(lambda: READERS[reader](str(folder)), capsys)


def edited(key, value):
    args = json.loads(json.dumps(ARGS))
    *parents, last = key.split(".")
    node = args
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
    return args


EDITS = [
    ("augmentations.0.crop_size", "big"),
    ("augmentations.0.crop_size", 10**9),
    ("augmentations.0.crop_size", -5),
    ("augmentations.0.mean", [1, 2]),
    ("augmentations", {"crop_size": 16}),
    ("augmentations", []),
    ("augmentations", [1]),
    ("backbone", "conv4"),
    ("backbone.name", 5),
    ("backbone.kwargs", [1]),
    ("backbone.kwargs.image_size", "x"),
    ("data", "digits"),
    ("data.fraction", "0.1"),
    ("data.fraction", float("nan")),
    ("data.fraction", 10**400),
    ("data.kwargs", [3]),
    ("data.kwargs.copies", 10**9),
    ("data.kwargs.size", -1),
    ("data.num_workers", "two"),
    ("data.region", 7),
    ("method", [1]),
    ("method_kwargs", 7),
    ("name", {}),
    ("seed", "five"),
]


@pytest.mark.fault("config")
@pytest.mark.parametrize(("key", "value"), EDITS, ids=[f"{key}={str(value)[:12]}" for key, value in EDITS])
@pytest.mark.parametrize("reader", ["main_knn", "main_foreground", "main_linear"])
def test_an_edited_key_is_named_with_its_file(run, capsys, reader, key, value):
    line = last_line(reader, run(edited(key, value)), capsys)
    assert re.match(rf"error: {re.escape(key)}(\.0)? in .*args.json must be", line), line


@pytest.mark.fault("config")
@pytest.mark.parametrize("value", ["x", 10**9, -4], ids=["text", "no memory for it", "negative"])
def test_options_of_the_encoder_that_cannot_be(run, capsys, value):
    assert "backbone.kwargs" in last_line("main_knn", run(edited("backbone.kwargs.width", value)), capsys)


@pytest.mark.fault("config")
@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP], ids=range(5)
)
def test_what_is_no_config_is_said_with_its_file(run, capsys, text):
    assert "args.json must be" in last_line("main_knn", run(text), capsys)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_mask_that_is_not_finite_is_refused(run, capsys, weight):
    mask = torch.ones(32)
    mask[3] = weight
    folder = run(**{"mask.weight": mask})
    for reader in ("main_knn", "main_linear", "main_foreground"):
        line = last_line(reader, folder, capsys)
        assert "last.ckpt must be finite, got NaN or infinity for 1 of 32 dimensions" in line
    with pytest.raises(UserError, match="must be finite"):
        load_encoder(folder)


BROKEN = {
    "sparse_coo": lambda weight: weight.to_sparse(),
    "complex": lambda weight: weight.to(torch.complex64),
    "meta device": lambda weight: weight.to("meta"),
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
}


@pytest.mark.fault("config")
@pytest.mark.parametrize("key", ["backbone.layers.0.weight", "mask.weight"])
@pytest.mark.parametrize("kind", BROKEN)
def test_tensors_that_hold_no_dense_numbers(run, capsys, kind, key):
    weight = torch.ones(4, 3, 3, 3) if key.startswith("backbone") else torch.ones(32)
    line = last_line("main_knn", run(**{key: BROKEN[kind](weight)}), capsys)
    assert f"error: {key} in" in line and kind in line


@pytest.mark.fault("config")
@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"model": {"conv1.weight": torch.ones(1)}, "epoch": 3}, "got epoch, model"),
        ({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(1)}}, "got module"),
        ([torch.ones(1)], "a dictionary with a state_dict, got 'list'"),
        (torch.ones(1), "a dictionary with a state_dict, got 'Tensor'"),
        ({}, "got nothing"),
    ],
)
def test_checkpoints_in_other_formats_say_what_they_hold(run, content, found):
    folder = run()
    torch.save(content, folder / "last.ckpt")
    with pytest.raises(UserError, match=found):
        load_encoder(folder)


@pytest.mark.fault("encoders", source="huggingface/pytorch-image-models#597")
def test_an_evaluation_at_a_size_whose_border_is_not_seen(run, tmp_path):
    encoder = build_encoder("test_vit", 64, dynamic_img_size=True)
    state = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
    kwargs = {"dynamic_img_size": True}
    other = build_encoder("conv", 64)
    args = {"backbone": {"name": "test_vit", "kwargs": kwargs}, "augmentations": [{"crop_size": 64}]}
    folder = run(args)
    torch.save({"state_dict": state}, folder / "last.ckpt")
    loaded = load_encoder(folder)
    loaded.check_side(64)
    loaded.check_side(48)
    with pytest.raises(UserError, match="--crop_size must be a size that the encoder takes, got 40: Input"):
        loaded.check_side(40, "--crop_size")
    with pytest.raises(UserError, match="--crop_size must be a size whose border the encoder sees, got 28"):
        Encoder(other, view={"crop_size": 64}).check_side(28, "--crop_size")
    path = tmp_path / "timm.pth"
    torch.save(encoder.state_dict(), path)
    with pytest.raises(UserError, match="crop_size must be a size that the encoder takes, got 72"):
        load_encoder(f"timm:test_vit={path}", image_size=72)
