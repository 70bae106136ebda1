"""The command line: a whole run, going on after an interruption, and what the user sees of mistakes."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composing import tiny
from refusals import refused

from metamask_plugin.bilevel import ESTIMATORS
from metamask_plugin.cli import pretrain
from metamask_plugin.cli.catalogue import catalogue
from metamask_plugin.data.registry import ABOUT, DATASETS
from metamask_plugin.modules.encoders import ENCODERS
from metamask_plugin.tasks import TASKS
from metamask_plugin.training.callbacks import Progress

ROOT = Path(__file__).resolve().parents[2]


def config(tmp_path, *overrides, name="metamask_barlow"):
    evaluated = ("linear.protocol=fast", "knn.k=[5]", "knn.every_n_epochs=1")
    return tiny(tmp_path, *(f"++evaluation.{word}" for word in evaluated), *overrides, name=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = pretrain.run(config(tmp_path_factory.mktemp("runs")))
    return folder


def epochs(folder):
    """The rows of metrics.csv, without what a clock measured."""
    rows = csv.DictReader((folder.path / "metrics.csv").open())
    times = ("data_wait_share", "train_seconds", "train_cpu_seconds")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.path.iterdir()}
    pictures = {"curves.png", "mask.png", "feature_correlation.png"}
    files = {"args.json", "metrics.csv", "summary.json", "table.txt", "last.ckpt", "best", "tensorboard"}
    assert pictures | files <= names
    assert not any(name.endswith(".part") for name in names)
    assert (finished.path / "best" / "best.ckpt").exists() and (finished.path / "best" / "args.json").exists()


def test_where_there_are_boxes_there_is_a_table_of_regions(finished):
    rows = json.loads(finished.summary.read_text())["regions"]
    assert [row["classifier"] for row in rows] == ["knn5", "linear"] * 2
    assert all(0 <= row[region] <= 100 for row in rows for region in ("full", "foreground", "background"))
    table = json.loads(finished.summary.read_text())["table"]
    assert rows[2]["full"] == pytest.approx(table[2]["knn5"])
    assert "learnt on full, tested on" in (finished.path / "table.txt").read_text()


@pytest.fixture(scope="module")
def finished_msr(tmp_path_factory):
    overrides = ["method_kwargs.regularizer.kwargs.width=8", "data.region=foreground"]
    return pretrain.run(config(tmp_path_factory.mktemp("msr"), *overrides, name="icl_msr_simclr"))


def test_a_run_of_icl_msr(finished_msr):
    names = {path.name for path in finished_msr.path.iterdir()}
    assert {"curves.png", "feature_correlation.png", "semantic_gram.png", "semantic_maps.png"} <= names
    assert "mask.png" not in names
    rows = list(csv.DictReader((finished_msr.path / "metrics.csv").open()))
    for key in ("train_msr_loss", "train_outer_loss", "train_uniformity_loss", "msr_overlap", "knn5"):
        assert all(row[key] for row in rows), key
    summary = json.loads(finished_msr.summary.read_text())
    assert [row["features"] for row in summary["table"]][1:] == ["random initialisation", "trained encoder"]
    # the classifiers learnt on what the encoder was trained on, and so did those of the table above
    assert summary["regions"][2]["foreground"] == pytest.approx(summary["table"][2]["knn5"])
    state = torch.load(finished_msr.last_checkpoint, weights_only=True)
    assert state["meta_optimizer"] and "regularizer.to_weights.weight" in state["state_dict"]


@pytest.mark.parametrize(
    ("when", "task"), [("after_step", "simclr"), ("epoch_end", "simclr"), ("after_step", "moco")]
)
def test_icl_msr_interrupted_and_resumed_is_as_if_nothing_had_happened(tmp_path, monkeypatch, when, task):
    overrides = [
        "method_kwargs.regularizer.kwargs.width=8",
        "++evaluation.enabled=False",
        f"method_kwargs.meta.when={when}",
        f"task={task}",
    ]

    def weights(folder):
        return torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]

    straight = pretrain.run(config(tmp_path / "a", *overrides, name="icl_msr_simclr"))
    plain = Progress.on_train_epoch_start

    def interrupt(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt
        plain(self, trainer, pl_module)

    cfg = config(tmp_path / "b", *overrides, name="icl_msr_simclr")
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_epoch_start", interrupt)
        with pytest.raises(SystemExit):
            pretrain.run(cfg.copy())
    resumed = pretrain.run(cfg)
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_metrics_have_a_row_an_epoch(finished):
    rows = list(csv.DictReader((finished.path / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    for key in (
        "train_task_loss",
        "train_redundancy_loss",
        "train_outer_loss",
        "knn5",
        "knn5_masked",
        "mask_std",
    ):
        assert all(row[key] for row in rows), key
    assert len(rows[0]["mask_largest_movers"].split()) == 5


def test_summary_holds_the_table_and_both_epochs(finished):
    summary = json.loads(finished.summary.read_text())
    names = [row["features"] for row in summary["table"]]
    assert names == ["raw pixels", "random initialisation", "trained encoder", "trained encoder, masked"]
    assert summary["last_epoch"]["epoch"] == 2
    assert summary["best_epoch"]["knn5"] >= summary["last_epoch"]["knn5"]
    # the same encoder, evaluated online and at the end
    assert summary["table"][2]["knn5"] == pytest.approx(summary["last_epoch"]["knn5"])


def test_checkpoint_is_weights_only_safe_and_complete(finished):
    state = torch.load(finished.last_checkpoint, weights_only=True)
    assert {"mask.weight", "classifier.weight"} <= state["state_dict"].keys()
    assert any(name.startswith("backbone.") for name in state["state_dict"])
    for key in ("optimizer_states", "lr_schedulers", "meta_optimizer", "rng", "callbacks"):
        assert state[key], key


def test_the_same_command_again_shows_the_finished_run(finished, capsys):
    root = finished.path.parents[1]
    before = finished.last_checkpoint.stat().st_mtime_ns
    again = pretrain.run(config(root))
    assert again.path == finished.path
    assert finished.last_checkpoint.stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert "complete" in out and "trained encoder" in out and "auto_resume.enabled=False" in out


def test_another_setting_is_another_run(finished):
    root = finished.path.parents[1]
    other = pretrain.run(config(root, "method_kwargs.alpha=7", "max_epochs=1"))
    assert other.path != finished.path


def test_interrupted_and_resumed_is_as_if_nothing_had_happened(finished, tmp_path, monkeypatch, capsys):
    plain = Progress.on_train_epoch_start

    def interrupt(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt
        plain(self, trainer, pl_module)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_epoch_start", interrupt)
        with pytest.raises(SystemExit) as stop:
            pretrain.run(config(tmp_path))
    assert stop.value.code == 130
    assert "interrupted in epoch 3 of 3" in capsys.readouterr().out

    resumed = pretrain.run(config(tmp_path))
    ours, theirs = (torch.load(f.last_checkpoint, weights_only=True) for f in (resumed, finished))
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    assert epochs(resumed) == epochs(finished)
    meta, meta_finished = (c["meta_optimizer"]["state"][0]["exp_avg"] for c in (ours, theirs))
    assert torch.equal(meta, meta_finished)


def test_a_run_limited_by_steps_is_complete_and_saved(tmp_path):
    folder = pretrain.run(
        config(tmp_path, "++max_steps=2", "checkpoint.frequency=5", "evaluation.knn.every_n_epochs=5")
    )
    assert torch.load(folder.last_checkpoint, weights_only=True)["global_step"] == 2
    assert folder.summary.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=metamsk"],
            "error: method must be one of baseline, icl_msr, metamask, supervised, got 'metamsk'; "
            "did you mean 'metamask'?",
        ),
        (["method_kwargs.task=simcrl"], "did you mean 'simclr'?"),
        (["backbone.name=resnt18"], "did you mean 'resnet18'"),
        (["++method_kwargs.meta.estimator=exat"], "error: method_kwargs.meta.estimator must be one of exact"),
        (["data.dataset=digit"], "error: data.dataset must be one of"),
        (["method_kwargs.alpha=-1"], "error: method_kwargs.alpha must be a number >= 0, got -1"),
        (["optimizer.batch_size=5000"], "error: optimizer.batch_size must be at most"),
        (["data.dataset=custom", "++data.train_path=/no/such/place"], "/no/such/place"),
        (["++resume_from_checkpoint=/no/such.ckpt"], "which does not exist"),
        (["optimizer.name=sdg"], "did you mean 'sgd'"),
        (["max_epochs=0"], "error: max_epochs must be an integer >= 1, got 0"),
        (["devices=many"], "error: devices must be a number, a list or 'auto', got 'many'"),
        (["precision=8-bit"], "error: precision must be one of"),
        (["optimizer.lr=fast"], "error: optimizer.lr must be a number >= 0, got 'fast'"),
        (["augmentations.0.num_crops=1"], "at least 2 large crops"),
    ],
)
def test_mistakes_cost_one_line(tmp_path, capsys, overrides, message):
    assert message in refused(lambda: pretrain.run(config(tmp_path, *overrides)), capsys)


def test_a_checkpoint_of_another_architecture_is_refused(finished, tmp_path, capsys):
    other = ("backbone.kwargs.width=8", f"++resume_from_checkpoint={finished.last_checkpoint}")
    assert "of another architecture" in refused(lambda: pretrain.run(config(tmp_path, *other)), capsys)


def test_the_list_names_everything_that_is_registered():
    text = catalogue()
    lines = [line.split() for line in text.splitlines()]
    for name in [
        *TASKS,
        *ENCODERS,
        *DATASETS,
        *ESTIMATORS,
        "baseline",
        "metamask",
        "icl_msr",
        "metamask_table1",
    ]:
        assert any(line and line[0] == name for line in lines), name
    for task in TASKS.values():
        assert task.source in text
    assert "cifar/metamask_barlow" in text and "cifar/icl_msr_simclr" in text
    assert set(ABOUT) == set(DATASETS)


@pytest.mark.parametrize(
    "override",
    [pytest.param(word, marks=pytest.mark.slow) for word in ("task=byol", "method_kwargs.task=byol")],
)
def test_either_way_to_name_a_task_brings_its_settings(tmp_path, override):
    command = [sys.executable, str(ROOT / "main_pretrain.py"), "--config-name", "metamask_barlow", override]
    small = ["max_epochs=1", "++limit_train_batches=2", "++evaluation.enabled=False", "accelerator=cpu"]
    done = subprocess.run(
        [*command, *small, f"checkpoint.dir={tmp_path}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (args,) = tmp_path.glob("metamask/*/args.json")
    kwargs = json.loads(args.read_text())["method_kwargs"]
    assert kwargs["task"] == "byol" and kwargs["task_kwargs"]["base_momentum"] == 0.97
    assert "temperature" not in kwargs["task_kwargs"]
