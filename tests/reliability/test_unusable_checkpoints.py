"""Checkpoints that were cut, altered or are of something else: seen as such, and the one before is used."""

import random
import shutil

import pytest
import torch
from killed_runs import assert_same, config, folder_of, read, run_folder
from refusals import refused

from metamask_plugin.cli import pretrain
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, whose checkpoints after the second and third epoch are there."""
    return pretrain.run(config(tmp_path_factory.mktemp("whole"))).path


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """The same network, trained with other settings."""
    changed = ("method_kwargs.alpha=7", "optimizer.weight_decay=1e-3")
    return pretrain.run(config(tmp_path_factory.mktemp("another"), *changed)).path


@pytest.fixture
def unfinished(tmp_path, whole):
    """A copy of the finished run, as it was before its last checkpoint was known to be good."""
    cfg = config(tmp_path)
    folder = folder_of(cfg)
    shutil.copytree(whole, folder)
    (folder / "finished.json").unlink()
    (folder / "summary.json").unlink(missing_ok=True)
    return cfg, folder


def cut(share):
    def damage(path, **_):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def flip(path, **_):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def overwrite(text):
    return lambda path, **_: path.write_bytes(text)


def of_another_experiment(path, another, **_):
    shutil.copy(another / "last.ckpt", path)


def of_another_architecture(path, **_):
    state = read(path)
    state["state_dict"]["classifier.weight"] = torch.zeros(10, 3)
    torch.save(state, path)


def of_another_method(path, **_):
    state = read(path)
    state["identity"]["method"] = "bare"
    torch.save(state, path)


def of_other_images(path, **_):
    state = read(path)
    state["identity"]["data"]["images_fingerprint"] = "0"
    torch.save(state, path)


def without_optimiser(path, **_):
    state = read(path)
    del state["optimizer_states"]
    torch.save(state, path)


DAMAGES = {
    "cut in half": (cut(0.5), "checkpoint"),
    "cut at its end": (cut(0.999), "checkpoint"),
    "cut to nothing": (cut(0), "checkpoint"),
    "one bit flipped": (flip, "does not match its checksum"),
    "zeroed": (overwrite(b"\0" * 5000), "cannot be read"),
    "a text": (overwrite(b"404 not found"), "cannot be read"),
    "of another experiment": (of_another_experiment, "method_kwargs.alpha 7 there, 100 here"),
    "of another architecture": (of_another_architecture, "of another architecture: classifier.weight is"),
    "of another method": (of_another_method, "method 'baseline' there, 'metamask' here"),
    "of other images": (of_other_images, "data.images_fingerprint '0' there"),
    "weights alone": (without_optimiser, "must be a training checkpoint"),
}


@pytest.mark.fault("resume")
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_previous_one_is_used(unfinished, whole, another, capsys, damage):
    cfg, folder = unfinished
    spoil, reason = DAMAGES[damage]
    spoil(folder / "last.ckpt", another=another)
    pretrain.run(cfg)
    out = capsys.readouterr().out
    assert "warning:" in out and reason in out and "previous.ckpt, the one before" in out
    assert (folder / "last.ckpt.unusable").exists()
    assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))


@pytest.mark.fault("resume")
def test_with_none_that_is_usable_the_run_does_not_begin_anew(unfinished, capsys):
    cfg, folder = unfinished
    for name in ("last.ckpt", "previous.ckpt"):
        flip(folder / name)
    assert "auto_resume.enabled=False" in refused(lambda: pretrain.run(cfg), capsys)
    assert (folder / "last.ckpt").exists() and (folder / "previous.ckpt").exists()


@pytest.mark.fault("resume")
def test_every_bit_counts(whole, tmp_path, record_property):
    """A flipped bit is either noticed, or in a place that carries nothing."""
    intact, content = read(whole / "last.ckpt"), (whole / "last.ckpt").read_bytes()
    draw, noticed, tries = random.Random(5), 0, 300
    for _ in range(tries):
        spoilt = bytearray(content)
        spoilt[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.ckpt").write_bytes(spoilt)
        try:
            found = read_checkpoint(tmp_path / "flipped.ckpt")
        except UserError as error:
            assert "\n" not in str(error)
            noticed += 1
        else:
            assert_same(found, intact)
    assert noticed > tries // 2  # a third of so small a file is padding
    record_property("inputs", tries)
    record_property("tracebacks", 0)


@pytest.mark.fault("resume")
def test_a_checkpoint_that_is_asked_for_is_compared_with_what_it_was_trained_with(
    tmp_path, whole, another, capsys
):
    pretrain.run(config(tmp_path, f"++resume_from_checkpoint={another / 'previous.ckpt'}"))
    out = capsys.readouterr().out
    assert "was trained with other settings: method_kwargs.alpha 7 there, 100 here" in out
    assert "optimizer.weight_decay 0.001 there, 0.0001 here" in out

    bare = ["method=bare", f"++resume_from_checkpoint={whole / 'last.ckpt'}"]
    refused(lambda: pretrain.run(config(tmp_path, *bare)), capsys)


@pytest.mark.fault("resume")
def test_within_an_epoch_the_batches_must_be_the_same(tmp_path, whole, capsys):
    state = read(whole / "previous.ckpt")
    torch.save({**state, "batches_done": 2}, tmp_path / "within.ckpt")
    overrides = ["optimizer.batch_size=16", f"++resume_from_checkpoint={tmp_path / 'within.ckpt'}"]
    line = refused(lambda: pretrain.run(config(tmp_path, *overrides)), capsys)
    assert "optimizer.batch_size 32 there, 16 here" in line and "saved within an epoch" in line


def test_the_last_two_are_kept_and_say_of_which_run_they_are(whole, tmp_path):
    last, previous = read(whole / "last.ckpt"), read(whole / "previous.ckpt")
    assert (last["global_step"], previous["global_step"]) == (12, 8)
    experiment = pretrain.prepared(pretrain.complete(config(tmp_path)))[2]
    assert last["identity"] == experiment and experiment["data"]["images_fingerprint"]
    assert sorted(path.name for path in run_folder(whole.parents[1]).glob("*.ckpt*")) == [
        "last.ckpt",
        "previous.ckpt",
    ]
