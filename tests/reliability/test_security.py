"""Files and configs of somebody else's: nothing in them runs, and one line says what is wrong with them."""

import json
import os
import pickle

import pytest
import torch
from composing import composed, tiny
from malicious_files import BROKEN, RUNNING, Payload
from refusals import refused

from metamask_plugin.cli import foreground, knn, linear, pretrain, umap
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import read_checkpoint
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.modules.encoders import build_encoder

ARGS = {
    "method": "metamask",
    "backbone": {"name": "conv4", "kwargs": {"width": 4}},
    "augmentations": [{"crop_size": 16, "num_crops": 2}],
    "data": {"dataset": "digits", "num_workers": 0, "kwargs": {"size": 16}},
}
security = pytest.mark.fault("security")


def short(folder, *overrides):
    return tiny(folder, "max_epochs=1", "++evaluation.enabled=False", *overrides)


@pytest.fixture
def canary(tmp_path):
    """A file that is not there; after the test it is still not."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "a file's code was run"


def placed(tmp_path, content, file="last.ckpt"):
    folder = tmp_path / "somebody's"
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / file).write_bytes(content)
    return folder / file


@pytest.mark.parametrize("shape", RUNNING)
def test_the_files_are_as_dangerous_as_they_are_said_to_be(tmp_path, shape):
    """Else the tests below would pass for nothing: loaded without care, each makes the canary."""
    path, canary = tmp_path / "file", tmp_path / "canary"
    path.write_bytes(RUNNING[shape](canary))
    try:
        if "plain" in shape:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
    except Exception as error:  # the tar is loaded no further, and what ran returned no state
        assert shape == "tar" or "archive" in str(error) or "hash" in str(error), error
    assert canary.exists()


@security
@pytest.mark.parametrize("shape", RUNNING)
def test_no_shape_of_a_checkpoint_runs(tmp_path, canary, shape):
    path = placed(tmp_path, RUNNING[shape](canary))
    with pytest.raises(UserError) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


@security
@pytest.mark.parametrize("shape", BROKEN)
def test_what_is_no_checkpoint_is_one_line(tmp_path, shape):
    path = placed(tmp_path, BROKEN[shape])
    with pytest.raises(UserError) as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


COMMANDS = {
    "main_knn.py": lambda path, out: knn.main(["--pretrained_checkpoint_dir", str(path)]),
    "main_umap.py": lambda path, out: umap.main(["--pretrained_checkpoint_dir", str(path)]),
    "main_foreground.py": lambda path, out: foreground.main(
        ["--pretrained_checkpoint_dir", str(path), "--dataset", "confounded_digits", "--output", str(out)]
    ),
    "main_linear.py": lambda path, out: linear.run(
        composed(
            "linear", "confounded_digits", f'pretrained_feature_extractor="{path}"', f"checkpoint.dir={out}"
        )
    ),
    "main_pretrain.py": lambda path, out: pretrain.run(short(out, f'++resume_from_checkpoint="{path}"')),
}


@security
@pytest.mark.parametrize("shape", ["plain pickle", "callbacks", "names of a schedule"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_checkpoint(tmp_path, canary, monkeypatch, capsys, command, shape):
    monkeypatch.setattr(umap, "require_umap", lambda: None)  # it takes seconds to import, and is not come to
    path = placed(tmp_path, RUNNING[shape](canary))
    line = refused(lambda: COMMANDS[command](path, tmp_path / "out"), capsys)
    assert str(path) in line
    assert not list(tmp_path.glob("out/**/*.ckpt"))


@security
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_no_weights_for_timm_run(tmp_path, canary, suffix):
    path = placed(tmp_path, RUNNING["zip"](canary), f"weights{suffix}")
    with pytest.raises(UserError) as caught:
        load_encoder(f"timm:test_vit={path}")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return pretrain.run(short(tmp_path_factory.mktemp("run")))


@security
@pytest.mark.parametrize("shape", ["plain pickle", "loops", "names of a schedule"])
def test_auto_resume_runs_no_checkpoint_put_in_the_place_of_the_last(run_folder, canary, capsys, shape):
    root, last = run_folder.path.parents[1], run_folder.last_checkpoint
    good = last.read_bytes()
    run_folder.finished.unlink(missing_ok=True)
    run_folder.previous_checkpoint.unlink(missing_ok=True)
    last.write_bytes(RUNNING[shape](canary))
    try:
        line = refused(lambda: pretrain.run(short(root, "auto_resume.enabled=True")), capsys)
        assert str(last) in line
    finally:
        last.write_bytes(good)


@security
@pytest.mark.parametrize(
    "key", ["callbacks", "optimizer_states", "hyper_parameters", "rng", "a key of its own"]
)
def test_a_payload_beside_good_weights_is_not_resumed_from(run_folder, tmp_path, canary, capsys, key):
    state = torch.load(run_folder.last_checkpoint, weights_only=True)
    path = tmp_path / "resumed.ckpt"
    torch.save({**state, key: Payload(canary)}, path)
    root = tmp_path / "runs"
    refused(lambda: pretrain.run(short(root, f"++resume_from_checkpoint={path}")), capsys)
    assert not canary.exists() and not root.exists()


FROM_ELSEWHERE = {
    "checkpoint_path": str,
    "pretrained_cfg": lambda path: {"file": str(path)},
    "pretrained_cfg_overlay": lambda path: {"file": str(path)},
    "cache_dir": lambda path: str(path.parent),
}


@security
@pytest.mark.parametrize("host", ["embedded", "solo"])
@pytest.mark.parametrize("key", FROM_ELSEWHERE)
def test_a_run_folders_args_json_names_no_other_file_to_load(tmp_path, canary, key, host):
    """timm reads it before the checkpoint's own weights are looked at, before 1.0.28 as a pickle."""
    other = tmp_path / "other.pth"
    other.write_bytes(RUNNING["zip"](canary))
    path = placed(tmp_path, b"")
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, path)
    kwargs = {key: FROM_ELSEWHERE[key](other), "pretrained": True}
    args = {**ARGS, "host": host, "backbone": {"name": "test_efficientnet", "kwargs": kwargs}}
    (path.parent / "args.json").write_text(json.dumps(args))
    with pytest.raises(UserError, match=f"backbone.kwargs must be without .*{key}"):
        load_encoder(path)


@security
def test_a_config_names_no_file_of_weights_to_load(tmp_path, canary, capsys):
    other = tmp_path / "other.pth"
    other.write_bytes(RUNNING["zip"](canary))
    cfg = short(tmp_path / "runs", "backbone.name=test_efficientnet")
    cfg.backbone.kwargs = {"checkpoint_path": str(other)}
    line = refused(lambda: pretrain.run(cfg), capsys)
    assert "checkpoint_path" in line


@security
@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
def test_a_data_set_in_pickles_is_read_only_if_it_is_the_published_one(tmp_path, canary, capsys, file):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    for name in names:
        (folder / name).write_bytes(RUNNING["plain pickle"](canary) if name == file else b"")
    overrides = ["data.dataset=cifar10", f"++data.train_path={tmp_path / 'data'}"]
    refused(lambda: pretrain.run(short(tmp_path / "runs", *overrides)), capsys)
    assert not canary.exists() and not (tmp_path / "runs").exists()


@security
def test_stand_ins_are_not_the_functions_they_stand_for(tmp_path):
    """A schedule of solo-learn's is left out of what is read, and nothing of it is called."""
    path = tmp_path / "schedule.ckpt"
    torch.save({"state_dict": {"backbone.x": torch.ones(1)}, "f": [dict, getattr]}, path)
    content = read_checkpoint(path)
    assert torch.equal(content["state_dict"]["backbone.x"], torch.ones(1))
    assert not any(stand_in in (dict, getattr, os.system) for stand_in in content["f"])


def test_the_encoders_of_timm_are_built_as_ever():
    assert build_encoder("test_efficientnet", 32).num_features > 0
