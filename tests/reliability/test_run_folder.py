"""One owner and one state of a run's folder: what is trained, where, and when it counts as complete."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from composing import composed
from killed_runs import (
    assert_same,
    config,
    folder_of,
    in_step,
    kill_myself,
    read,
    rows,
    run_apart,
    run_folder,
    signal_myself,
)
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from metamask_plugin.cli import pretrain
from metamask_plugin.cli.config import complete, for_method, recorded
from metamask_plugin.cli.machine import device_count
from metamask_plugin.data.splits import MemoryImages, fingerprint
from metamask_plugin.methods import METHODS
from metamask_plugin.methods.base import TaskMethod
from metamask_plugin.studies.pretraining import pretraining_config
from metamask_plugin.studies.spec import study_of
from metamask_plugin.training.callbacks import OnlineKNN
from metamask_plugin.training.checkpoints import BestCheckpoint
from metamask_plugin.training.experiment import experiment_digest, experiment_of
from metamask_plugin.training.run_folder import locked

MEASURED = ("++evaluation.enabled=True", "evaluation.knn.k=[5]", "evaluation.knn.every_n_epochs=1")
UNREPORTED = (*MEASURED, "++evaluation.final_report=False")
REPORTED = (*MEASURED, "++evaluation.linear.protocol=fast")


def contents(folder):
    """Every file of a folder, and what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def ends_with(code, capsys, cfg):
    """What a run says that ends with an exit code."""
    with pytest.raises(SystemExit) as stop:
        pretrain.run(cfg)
    said = capsys.readouterr()
    assert stop.value.code == code and "Traceback" not in said.err
    return said.out + said.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of runs, and in it a finished run of three epochs."""
    runs = tmp_path_factory.mktemp("finished")
    return runs, pretrain.run(config(runs)).path


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, to be tried on."""
    runs = tmp_path / "runs"
    shutil.copytree(finished[0], runs)
    return runs, runs / finished[1].relative_to(finished[0])


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """A finished run of two epochs, of another seed."""
    return pretrain.run(config(tmp_path_factory.mktemp("shorter"), "seed=77", "max_epochs=2")).path


# whose folder it is


@pytest.mark.fault("resume")
def test_a_run_from_a_checkpoint_of_another_has_a_folder_of_its_own(copied, shorter):
    runs, folder = copied
    before = contents(folder)
    cfg = config(runs, "auto_resume.enabled=False", f"++resume_from_checkpoint={shorter / 'last.ckpt'}")
    first, second = pretrain.run(cfg.copy()).path, pretrain.run(cfg).path
    assert second == first.with_name(f"{first.name}-2") and first != folder
    assert contents(folder) == before


@pytest.mark.fault("resume")
def test_a_complete_run_that_began_elsewhere_is_no_answer(copied, shorter, capsys):
    """Nor is one that began with a checkpoint an answer to a command that names none."""
    runs, folder = copied
    before = contents(folder)
    cfg = config(runs, f"++resume_from_checkpoint={shorter / 'last.ckpt'}")
    other = pretrain.run(cfg.copy()).path
    assert other != folder and contents(folder) == before
    assert f"resuming {shorter / 'last.ckpt'}" in capsys.readouterr().out
    assert pretrain.run(cfg).path == other and "This run is complete" in capsys.readouterr().out
    shutil.rmtree(folder)
    assert folder_of(config(runs)) == folder


@pytest.mark.fault("resume")
def test_the_remedy_of_an_interrupted_second_attempt_goes_on_in_its_folder(copied, capsys):
    runs, folder = copied
    before = contents(folder)
    fresh = config(runs, "auto_resume.enabled=False")
    assert run_apart(fresh.copy(), stop_in_step(6, signal.SIGTERM)) == 143
    second = folder.with_name(f"{folder.name}-2")
    fresh.resume_from_checkpoint = str(second / "last.ckpt")
    assert pretrain.run(fresh).path == second
    assert_same(read(second / "last.ckpt"), read(folder / "last.ckpt"))
    assert contents(folder) == before


def stop_in_step(step, number):
    return in_step(step, lambda: signal_myself(number))


@pytest.mark.fault("resume")
def test_an_interrupted_run_that_began_from_a_checkpoint_goes_on_where_it_was(tmp_path, shorter, capsys):
    cfg = config(tmp_path / "runs", "max_epochs=5", f"++resume_from_checkpoint={shorter / 'last.ckpt'}")
    whole = pretrain.run(config(tmp_path / "whole", *cfg_words(cfg))).path
    assert run_apart(cfg.copy(), stop_in_step(14, signal.SIGTERM)) == 143
    folder = run_folder(tmp_path / "runs")
    assert pretrain.run(cfg.copy()).path == folder
    said = capsys.readouterr().out
    assert f"resuming {folder / 'last.ckpt'}" in said and "the newest of this run" in said
    again = cfg.copy()  # as the interrupted run says it
    again.resume_from_checkpoint = str(folder / "last.ckpt")
    assert pretrain.run(again).path == folder
    assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))
    assert pretrain.run(cfg.copy()).path == folder
    assert "This run is complete" in capsys.readouterr().out


def cfg_words(cfg):
    return [f"max_epochs={cfg.max_epochs}", f"++resume_from_checkpoint={cfg.resume_from_checkpoint}"]


@pytest.mark.fault("resume")
def test_a_metric_of_an_epochs_first_part_stays_in_its_row(tmp_path):
    """The epoch's one meta step comes before the interruption, and none after it."""
    words = ("method_kwargs.meta.every_n_steps=3", "max_epochs=1")
    whole = pretrain.run(config(tmp_path / "whole", *words)).path
    cfg = config(tmp_path / "runs", *words)
    assert run_apart(cfg.copy(), stop_in_step(3, signal.SIGTERM)) == 143
    folder = pretrain.run(cfg).path
    assert rows(folder) == rows(whole) and rows(whole)[0]["train_outer_loss"]


@pytest.mark.fault("resume", source="CellBender#241, #267, DeepTab#411, pytorch/torchtune#481")
def test_a_folder_has_one_writer(copied, capsys):
    runs, folder = copied
    (folder / "finished.json").unlink()
    with locked(folder, "the run folder"):
        before = contents(folder)
        said = ends_with(2, capsys, config(runs))
        assert f"is being written by process {os.getpid()}" in said and contents(folder) == before


# when it is complete


@pytest.mark.fault("resume")
def test_a_complete_run_without_its_checkpoint_is_trained_again(copied, capsys):
    runs, folder = copied
    expected = read(folder / "last.ckpt")
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).unlink()
    pretrain.run(config(runs))
    assert "has no checkpoint: the run is trained anew" in capsys.readouterr().out
    assert_same(read(folder / "last.ckpt"), expected)


@pytest.mark.fault("resume")
def test_a_run_without_checkpoints_does_not_count_for_one_that_wants_them(tmp_path):
    without = pretrain.run(config(tmp_path, "max_epochs=1", "checkpoint.enabled=False")).path
    assert without == pretrain.run(config(tmp_path, "max_epochs=1")).path
    assert (without / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.fault("resume")
def test_a_run_that_was_ended_without_checkpoints_is_gone_on_with(copied, tmp_path):
    """Exactly, and it does not make the earlier checkpoint pass for the last one."""
    expected = read(copied[1] / "last.ckpt")
    other = config(tmp_path / "other")
    assert run_apart(other.copy(), stop_in_step(6, signal.SIGTERM)) == 143
    unsaved = other.copy()
    unsaved.checkpoint.enabled = False
    folder = pretrain.run(unsaved).path
    assert rows(folder)[-1]["train_loss"] == rows(copied[1])[-1]["train_loss"]
    assert read(folder / "last.ckpt")["global_step"] < expected["global_step"]
    pretrain.run(other)
    assert_same(read(folder / "last.ckpt"), expected)


@pytest.mark.fault("resume")
def test_another_evaluation_leaves_the_best_checkpoint_of_a_complete_run(tmp_path):
    folder = pretrain.run(config(tmp_path, *UNREPORTED, "max_epochs=1")).path
    best = folder / "best" / "best.ckpt"
    state = read(best)
    state["callbacks"]["BestCheckpoint"]["value"] = 100.0  # no epoch to come is better
    torch.save(state, best)
    before = best.read_bytes()
    pretrain.run(config(tmp_path, *REPORTED, "max_epochs=1", "evaluation.knn.k=[20]"))
    assert best.read_bytes() == before


@pytest.mark.slow
@pytest.mark.fault("resume")
def test_another_evaluation_of_a_complete_run_is_made(tmp_path, capsys):
    folder = pretrain.run(config(tmp_path, *REPORTED, "max_epochs=1")).path
    trained, table = (folder / "last.ckpt").read_bytes(), (folder / "table.txt").read_text()
    other = config(tmp_path, *REPORTED, "max_epochs=1", "evaluation.knn.k=[1]")
    assert pretrain.run(other.copy()).path == folder
    assert "knn1 " in (folder / "table.txt").read_text() and "knn5" in table
    assert (folder / "last.ckpt").read_bytes() == trained
    capsys.readouterr()
    pretrain.run(other.copy())
    assert "This run is complete" in capsys.readouterr().out

    (folder / "summary.json").write_text("")
    pretrain.run(other)
    assert "summary.json is damaged" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["table"]


@pytest.mark.fault("data")
def test_other_images_are_another_run_which_says_so(tmp_path, capsys):
    images(tmp_path / "images")
    cfg = config(tmp_path / "runs", *custom(tmp_path / "images"), "max_epochs=1")
    first = pretrain.run(cfg.copy()).path
    shutil.copy(tmp_path / "images/train/cat/0.png", tmp_path / "images/train/cat/new.png")
    capsys.readouterr()
    assert pretrain.run(cfg.copy()).path != first
    said = capsys.readouterr().out
    assert f"another run of this name has ended, {first}" in said and "data.images_fingerprint" in said


def images(root, count=24):
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 90, (36, 36, 3)) + 40 + 60 * label
                Image.fromarray(pixels.astype("uint8")).save(root / split / name / f"{number}.png")


def custom(root):
    return (
        "data.dataset=custom",
        "~data.kwargs",
        "~data.fraction",
        f"++data.train_path={root}/train",
        f"++data.val_path={root}/val",
        "optimizer.batch_size=12",
    )


@pytest.mark.fault("data", source="vamb#425, vturrisi/solo-learn#112")
def test_no_optimiser_step_is_no_training(tmp_path, capsys, monkeypatch):
    """Whatever the cause: here a loader without batches."""
    monkeypatch.setattr("metamask_plugin.data.loaders.EpochShuffle.__len__", lambda self: 3)
    said = ends_with(2, capsys, config(tmp_path, *REPORTED))
    assert "must make an optimiser step" in said
    assert not [path for path in tmp_path.rglob("*") if path.name in ("finished.json", "table.txt")]


@pytest.mark.fault("resume")
def test_a_checkpoint_that_is_asked_for_and_gone_is_no_new_run(tmp_path, capsys):
    cfg = config(tmp_path)
    cfg.resume_from_checkpoint = str(folder_of(cfg) / "last.ckpt")
    said = ends_with(2, capsys, cfg)
    assert "which does not exist" in said and not list(tmp_path.iterdir())


@pytest.mark.fault("config")
def test_labels_are_not_learnt_where_there_are_none(tmp_path, capsys):
    said = ends_with(2, capsys, config(tmp_path, "method=supervised", "++data.no_labels=True"))
    assert "data.no_labels must be False with method=supervised" in said


@pytest.mark.slow
@pytest.mark.fault("resume")
def test_more_epochs_of_a_run_that_has_made_its_steps_leave_a_checkpoint(tmp_path):
    steps = ("++max_steps=4", "max_epochs=2")
    shorter = pretrain.run(config(tmp_path, *steps)).path
    longer = pretrain.run(config(tmp_path, *steps, "max_epochs=3")).path
    assert longer != shorter and read(longer / "last.ckpt")["global_step"] == 4


@pytest.mark.fault("config")
def test_the_config_that_a_run_has_written_is_the_same_run():
    once = complete(config("runs"))
    built = METHODS[once.method](for_method(once, 10)).cfg
    again = complete(recorded(once, built))
    assert METHODS[again.method](for_method(again, 10)).cfg == built
    assert again.optimizer.lr == once.optimizer.lr == config("runs").optimizer.lr != built.optimizer.lr


@pytest.mark.fault("config")
def test_a_config_with_counted_views_has_scaled_rates():
    """As solo-learn, and runs of earlier versions, write them."""
    cfg = config("runs", "++data.num_large_crops=2", "++data.num_small_crops=0")
    found = complete(cfg)
    assert for_method(found).optimizer.lr == cfg.optimizer.lr
    assert recorded(found, for_method(found)).data.num_large_crops == 2


def test_a_complete_config_is_frozen_and_the_users_own_stays_as_it_is():
    cfg = config("runs")
    before = cfg.copy()
    found = complete(cfg)
    assert cfg == before
    with pytest.raises(OmegaConfBaseException):
        found.seed = 6


# that a run knows itself


SAME = [
    ("devices=1",),
    ("devices=auto",),
    ("devices=[0]",),
    ("accelerator=auto",),
    ("precision=32",),
    ("strategy=ddp",),
    ("accumulate_grad_batches=null",),
    ("++gradient_clip_val=null",),
    ("++gradient_clip_val=0",),
    ("++limit_train_batches=1.0",),
    ("++data.verify=decode",),
    ("++data.invalid_images=skip",),
    ("++data.on_device=False",),
    ("++data.train_path=/elsewhere",),
    ("data.num_workers=7",),
    ("++numerics.max_skipped_steps=20",),
    ("++numerics.on_nonfinite=skip",),
    ("++process_timeout=60",),
    ("++optimizer.weight_decay=0.0001",),
    ("evaluation.knn.every_n_epochs=1",),
    ("++method_kwargs.meta.batch_share=1.0",),
]
OTHERS = [
    ("precision=bf16-mixed",),
    ("++gradient_clip_val=1",),
    ("devices='2'", "strategy=ddp"),
    ("++data.pipeline=torchvision",),
    ("++performance.compile=True",),
    ("++limit_train_batches=1",),
    ("++limit_train_batches=2",),
]


@pytest.fixture(scope="module")
def completed():
    """A config that is checked and filled in."""
    cfg = for_method(complete(config("runs")), 10)  # as the images say
    return METHODS[cfg.method](cfg).cfg


def digest(completed, overrides=(), images="the same"):
    cfg = completed.copy()
    for override in overrides:
        key, value = override.lstrip("+").split("=", 1)
        OmegaConf.update(cfg, key, yaml.safe_load(value), force_add=True)
    known = (device_count(cfg), "cpu", cfg.data.get("pipeline") or "kornia", images)
    return experiment_digest(experiment_of(cfg, *known))


@pytest.fixture(scope="module")
def own(completed):
    return digest(completed)


@pytest.mark.fault("auto-resume", source="nnUNet#2367, fairchem#777, #803, Lightning#16639")
@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_what_cannot_change_the_training_leaves_the_run_the_same(completed, own, overrides):
    assert digest(completed, overrides) == own


@pytest.mark.fault("auto-resume")
@pytest.mark.parametrize("overrides", OTHERS, ids=" ".join)
def test_what_changes_the_training_is_another_run(completed, own, overrides):
    assert digest(completed, overrides) != own != digest(completed, images="others")


@pytest.mark.fault("auto-resume")
def test_boxes_are_part_of_the_images():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3]], dtype=torch.int32)
    splits = [MemoryImages(images, labels, ["a", "b"], found) for found in (None, boxes, boxes + 1)]
    assert len({fingerprint(split) for split in splits}) == 3


@pytest.mark.fault("auto-resume", source="nnUNet#2367, lightning-hydra-template#146")
def test_images_may_move_also_within_an_epoch(tmp_path):
    """As onto a job's own disk; saved by a signal in the middle of an epoch."""
    images(tmp_path / "job1")

    def there(job, runs="runs"):
        return config(tmp_path / runs, *custom(tmp_path / job))

    whole = pretrain.run(there("job1", "whole")).path
    assert run_apart(there("job1"), stop_in_step(6, signal.SIGUSR1)) == 138
    (tmp_path / "job1").rename(tmp_path / "job2")
    folder = pretrain.run(there("job2")).path
    assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))
    assert len(list((tmp_path / "runs/metamask").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.fault("auto-resume", source="nnUNet#2367")
def test_the_number_of_workers_may_be_lowered(tmp_path, capsys):
    images(tmp_path / "images")

    def there(workers):
        words = ("++data.pipeline=torchvision", f"data.num_workers={workers}")
        return config(tmp_path / "runs", *custom(tmp_path / "images"), *words)

    assert run_apart(there(1), stop_in_step(6, signal.SIGTERM)) == 143
    pretrain.run(there(0))
    said = capsys.readouterr().out
    assert "data.num_workers has changed: views are drawn differently" in said and "epoch 1/3" not in said
    assert read(run_folder(tmp_path / "runs") / "last.ckpt")["global_step"] == 12


@pytest.mark.fault("auto-resume", source="Lightning#2823, #4184")
def test_a_run_may_be_made_longer(copied, tmp_path, capsys):
    """The same command with more epochs goes on from the finished run, which stays as it is."""
    runs, folder = copied
    before = contents(folder)
    longer = pretrain.run(config(runs, "max_epochs=5")).path
    said = capsys.readouterr().out
    assert "which differs in max_epochs 3 there, 5 here" in said and "epoch 3/5" not in said
    assert longer != folder and contents(folder) == before
    assert pretrain.run(config(runs, "max_epochs=5")).path == longer
    assert "This run is complete" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(longer)] == list("01234")
    anew = pretrain.run(config(tmp_path / "other", "max_epochs=5")).path
    one, other = (read(path / "last.ckpt") for path in (longer, anew))
    rates = [state["optimizer_states"][0]["param_groups"][0]["lr"] for state in (one, other)]
    assert rates[0] == rates[1]


@pytest.mark.slow
@pytest.mark.fault("auto-resume")
def test_a_longer_run_that_ends_before_its_first_checkpoint_goes_on_as_it_did(copied, capsys):
    runs, folder = copied
    longer = config(runs, "max_epochs=6", "checkpoint.frequency=10")
    assert run_apart(longer.copy(), stop_in_step(18, signal.SIGKILL)) == -signal.SIGKILL
    capsys.readouterr()
    pretrain.run(longer)
    said = capsys.readouterr().out
    assert f"going on from {folder / 'last.ckpt'}" in said and "epoch 1/6" not in said


@pytest.mark.slow
@pytest.mark.fault("auto-resume")
def test_a_sweep_and_a_study_begin_each_run_anew(copied, capsys):
    runs, folder = copied
    pretrain.run(config(runs, "max_epochs=4", "++auto_resume.extend=False"))
    said = capsys.readouterr().out
    assert "epoch 1/4" in said and "going on" not in said
    longer = pretrain.run(config(runs, "max_epochs=5")).path
    anew = pretrain.run(config(runs, "max_epochs=5", "++auto_resume.extend=False")).path
    assert longer != anew, "what a study trains must not be what was gone on with"
    study = study_of(composed("study", "metamask_fig10", "size=smoke"))
    assert pretraining_config(study, study.trials[0]).auto_resume.extend is False


@pytest.mark.fault("auto-resume", source="fairchem#777")
def test_a_new_run_beside_an_unfinished_one_says_how_they_differ(copied, capsys):
    runs, folder = copied
    (folder / "finished.json").unlink()
    pretrain.run(config(runs, "seed=6", "max_epochs=1"))
    said = capsys.readouterr().out
    assert f"another run of this name stands at epoch 3, {folder}" in said
    assert "it differs in max_epochs 3 there, 1 here; seed 5 there, 6 here" in said
    assert f"resume_from_checkpoint={folder / 'last.ckpt'}" in said


# what goes on from a checkpoint


def rates(monkeypatch):
    """The learning rate of each step."""
    seen, plain = [], TaskMethod.on_before_optimizer_step

    def note(self, optimizer):
        seen.append(optimizer.param_groups[0]["lr"])
        plain(self, optimizer)

    monkeypatch.setattr(TaskMethod, "on_before_optimizer_step", note)
    return seen


SCHEDULES = {
    "none": ("scheduler.name=none",),
    "warmup_cosine": ("scheduler.name=warmup_cosine", "scheduler.warmup_epochs=1"),
    "step": ("scheduler.name=step", "++scheduler.lr_decay_steps=[1,2]"),
    "warmup_step": ("scheduler.name=warmup_step", "++scheduler.lr_decay_steps=[2]"),
}


@pytest.mark.fault("resume")
@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=() if name == "warmup_cosine" else pytest.mark.slow) for name in SCHEDULES],
)
def test_another_learning_rate_is_the_one_that_is_used(tmp_path, monkeypatch, capsys, schedule):
    words = ("max_epochs=3", *SCHEDULES[schedule])
    seen = rates(monkeypatch)
    pretrain.run(config(tmp_path / "expected", *words, "optimizer.lr=1e-6"))
    expected = seen[8:]
    folder = pretrain.run(config(tmp_path / "first", *words)).path
    seen.clear()
    there = f"++resume_from_checkpoint={folder / 'previous.ckpt'}"
    lower = pretrain.run(config(tmp_path / "lower", *words, "optimizer.lr=1e-6", there)).path
    assert seen == pytest.approx(expected, rel=1e-6)
    assert json.loads((lower / "args.json").read_text())["optimizer"]["lr"] == 1e-6
    assert "optimizer.lr" in capsys.readouterr().out


@pytest.mark.fault("resume")
@pytest.mark.parametrize("override", ["optimizer.name=sgd", "++method_kwargs.meta.optimizer.name=sgd"])
def test_another_optimiser_is_refused(tmp_path, shorter, capsys, override):
    words = (override, "++method_kwargs.meta.inner_lr=0.01", f"++resume_from_checkpoint={shorter}/last.ckpt")
    said = ends_with(2, capsys, config(tmp_path, *words))
    assert "must be of a run with the same" in said and override.strip("+").partition("=")[0] in said


@pytest.mark.fault("resume")
@pytest.mark.parametrize(
    "override, said", [("max_epochs=2", "set max_epochs=3"), ("++max_steps=8", "set max_steps=9")]
)
def test_what_is_over_before_it_begins_is_refused(tmp_path, shorter, capsys, override, said):
    words = (override, f"++resume_from_checkpoint={shorter}/last.ckpt")
    assert said in ends_with(2, capsys, config(tmp_path, *words))
    assert not list(tmp_path.glob("*/*/args.json"))


@pytest.mark.fault("resume", source="anemoi-training#183, speculators#898, Lightning#11979")
@pytest.mark.parametrize("when", ["after_step", pytest.param("epoch_end", marks=pytest.mark.slow)])
def test_max_steps_within_an_epoch(tmp_path, when, capsys):
    """The epoch is evaluated, and a run that goes on is the uninterrupted one to the last bit."""
    words = (*UNREPORTED, "scheduler.name=none", f"method_kwargs.meta.when={when}")
    words = (*words, "evaluation.knn.every_n_epochs=5", "max_epochs=9")
    cut = pretrain.run(config(tmp_path / "runs", *words, "++max_steps=6")).path
    assert (cut / "best" / "best.ckpt").exists() and rows(cut)[-1]["knn5"]
    assert "epoch 2/2" in capsys.readouterr().out
    on = pretrain.run(config(tmp_path / "runs", *words, "++max_steps=11")).path
    whole = pretrain.run(config(tmp_path / "whole", *words, "++max_steps=11")).path
    assert "max_steps 6 there, 11 here" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(on)] == ["0", "1", "2"]
    assert_same(read(on / "last.ckpt")["state_dict"], read(whole / "last.ckpt")["state_dict"])


@pytest.mark.fault("numbers")
@pytest.mark.parametrize(
    "words, said",
    [
        (("method_kwargs.meta.every_n_steps=1000",), "makes no meta step in the run's 12 steps"),
        (
            ("method_kwargs.meta.when=epoch_end", "method_kwargs.meta.every_n_steps=5"),
            "makes no meta step in an epoch's 4 batches",
        ),
        (("method_kwargs.meta.when=epoch_end", "++max_steps=6"), "ends within an epoch of 4 steps"),
        ((), None),
    ],
)
def test_a_mask_that_will_not_be_learnt_is_said(tmp_path, capsys, words, said):
    folder = pretrain.run(config(tmp_path, *words)).path
    warned = [line for line in capsys.readouterr().out.splitlines() if "meta step" in line]
    assert [said in line for line in warned] == ([] if said is None else [True])
    cut = rows(folder)[-1]  # an epoch without meta steps has no value of the epoch before
    assert bool(cut.get("train_outer_loss")) == (said is None)


# the best checkpoint


def before_best(then):
    plain, count = BestCheckpoint._improved, [0]

    def improved(self, trainer):
        found = plain(self, trainer)
        count[0] += found
        if found and count[0] == 1:
            then()
        return found

    def patch():
        BestCheckpoint._improved = improved

    return patch


def in_measurement(epoch, then):
    plain, count = OnlineKNN._measure, [0]

    def measure(self, pl_module):
        count[0] += 1
        if count[0] == epoch:
            then()
        plain(self, pl_module)

    def patch():
        OnlineKNN._measure = measure

    return patch


def broken():
    raise RuntimeError("the evaluation is broken")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return pretrain.run(config(tmp_path_factory.mktemp("measured"), *UNREPORTED)).path


ENDS = {
    "killed before the best is saved": (before_best(kill_myself), -signal.SIGKILL, 1),
    "killed while measuring": (in_measurement(2, kill_myself), -signal.SIGKILL, 2),
    "killed while measuring the last": (in_measurement(3, kill_myself), -signal.SIGKILL, 3),
    "an evaluation that fails": (in_measurement(2, broken), 1, 2),
}


@pytest.mark.fault("resume")
@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=pytest.mark.slow if "measuring" in end else ()) for end in ENDS]
)
def test_the_best_checkpoint_is_as_if_nothing_had_happened(tmp_path, measured, end):
    fault, code, epochs = ENDS[end]
    cfg = config(tmp_path, *UNREPORTED)
    assert run_apart(cfg.copy(), fault) == code
    # what was trained before it was measured is not lost
    assert read(run_folder(tmp_path) / "last.ckpt")["epoch"] == epochs - 1
    assert run_apart(cfg.copy()) == 0
    folder = run_folder(tmp_path)
    assert rows(folder) == rows(measured)
    for name in ("last.ckpt", "best/best.ckpt"):
        assert_same(read(folder / name), read(measured / name))


@pytest.mark.slow
@pytest.mark.fault("resume")
def test_the_best_checkpoint_is_of_one_measure_and_comes_along(tmp_path, measured):
    longer = (*UNREPORTED, "max_epochs=4", f"++resume_from_checkpoint={measured / 'last.ckpt'}")
    folder = pretrain.run(config(tmp_path / "longer", *longer)).path
    values = [float(row["knn5"]) for row in rows(folder)]
    assert read(folder / "best" / "best.ckpt")["epoch"] == values.index(max(values))
    other = pretrain.run(config(tmp_path / "other", *longer, "evaluation.knn.k=[1]")).path
    best = read(other / "best" / "best.ckpt")["callbacks"]["BestCheckpoint"]
    assert best["metric"] == "knn1" and best["epoch"] in (2, 3)


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    "words, name",
    [
        (("data.dataset=custom",), "metamask_barlow-custom"),
        (("data.dataset=custom", "name=a-tiny-imagenet"), "a-custom"),
        (("data.dataset=tiny_imagenet", "name=a-tiny-imagenet"), "a-tiny-imagenet"),
        (("data.dataset=custom", "name=mine"), "mine"),
    ],
)
def test_a_runs_name_says_what_it_is_trained_on(tmp_path, words, name):
    images(tmp_path / "images", count=1)
    assert complete(config(tmp_path, *custom(tmp_path / "images"), *words)).name == name


# what else may happen to a folder


@pytest.mark.fault("config", source="hydra#1647, syncthing#1924, ParlAI#3690")
@pytest.mark.parametrize("place", ["~/runs", "$HOME/runs"])
def test_home_is_expanded(tmp_path, monkeypatch, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.merge(config(tmp_path, "max_epochs=1"), {"checkpoint": {"dir": place}})
    assert folder_of(cfg).parents[1] == tmp_path / "runs"


@pytest.mark.fault("security")
def test_a_planted_link_is_not_written_through(copied, tmp_path):
    runs, folder = copied
    (folder / "finished.json").unlink()
    (folder / "last.ckpt").unlink()
    (tmp_path / "victim").write_text("precious")
    (folder / "last.ckpt.part").symlink_to(tmp_path / "victim")
    pretrain.run(config(runs))
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.fault("resume")
def test_a_folder_that_is_deleted_while_the_run_trains(tmp_path, capsys):
    log = tmp_path / "log"
    fault = in_step(6, lambda: shutil.rmtree(tmp_path / "runs"))
    assert run_apart(config(tmp_path / "runs", "max_epochs=9"), fault, log) == 2
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "was deleted" in line


@pytest.mark.fault("resume")
def test_a_link_that_leads_nowhere_is_said(copied, capsys):
    runs, folder = copied
    (folder / "finished.json").unlink()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to("gone")
    pretrain.run(config(runs))
    assert "must be a file, got a link to gone" in capsys.readouterr().out


@pytest.mark.fault("resume")
def test_a_checkpoint_that_says_nothing_of_its_run_is_warned_of(copied, capsys):
    runs, folder = copied
    (folder / "finished.json").unlink()
    state = read(folder / "previous.ckpt")
    del state["identity"]
    torch.save(state, folder / "last.ckpt")
    pretrain.run(config(runs))
    assert "does not say of which run it is" in capsys.readouterr().out


# the world outside


@pytest.mark.fault("resume")
def test_a_reader_that_ends_does_not_end_the_run(tmp_path):
    """As ``| head -1``: standard output is a pipe that nobody reads any more."""

    def close():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        os.sys.stdout = os.fdopen(1, "w")

    assert run_apart(config(tmp_path, "max_epochs=2"), close) == 0
    assert read(run_folder(tmp_path) / "last.ckpt")["epoch"] == 1


@pytest.mark.fault("resume")
@pytest.mark.parametrize(
    "code", ["EIO", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ESTALE", "ENOTCONN", "EBUSY"))]
)
@pytest.mark.parametrize("name", ["last.ckpt", pytest.param("metrics.csv", marks=pytest.mark.slow)])
def test_a_file_system_that_fails_once_is_asked_again(tmp_path, monkeypatch, code, name):
    plain, failed = os.replace, []

    def replace(source, target):
        if str(target).endswith(name) and not failed:
            failed.append(target)
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(source))
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    folder = pretrain.run(config(tmp_path, "max_epochs=1")).path
    assert failed and read(folder / "last.ckpt")["epoch"] == 0 and rows(folder)


@pytest.mark.fault("resume", source="fairchem#777, #803")
def test_a_resumed_run_is_one_run_for_weights_and_biases(tmp_path, monkeypatch):
    seen = []

    class Recorder(pretrain.TensorBoardLogger):
        def __init__(self, save_dir, id, resume, **_):
            seen.append((id, resume))
            super().__init__(save_dir, name="", version="wandb")

    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", Recorder)
    words = ("++wandb.enabled=True", "++wandb.project=p")
    folder = pretrain.run(config(tmp_path, *words, "max_epochs=1")).path
    (folder / "finished.json").unlink()
    pretrain.run(config(tmp_path, *words, "max_epochs=1"))
    assert seen[0] == seen[1] and seen[0][1] == "allow"
