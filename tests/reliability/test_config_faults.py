"""Mistakes in configs and command lines: one line that names the remedy, exit code 2, and nothing done."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import refusals
from composing import composed
from hydra.errors import HydraException
from omegaconf import OmegaConf

from metamask_plugin.cli import knn, linear, pretrain, study
from metamask_plugin.cli.command_line import check_flags
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.hydra_errors import told
from metamask_plugin.config.methods import TaskKwargs
from metamask_plugin.errors import UserError
from metamask_plugin.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"


class Started(BaseException):
    """Training would begin now."""


def config(*overrides, kind="pretrain", name="metamask_barlow"):
    return composed(kind, name, *overrides)


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Runs a config and returns its one line."""

    def start(*args, **kwargs):
        raise Started

    def run(cfg, command=pretrain.run):
        monkeypatch.setattr(pl.Trainer, "fit", start)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            command(cfg)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert lines[-1].startswith("error: ") and sum(line.startswith("error:") for line in lines) == 1
        assert not any("Traceback" in line for line in lines)
        assert not list(tmp_path.rglob("*")), "something was done before the mistake was found"
        return lines[-1]

    return run


SLIPS = {
    "seed=-1": "seed must be an integer >= 0, got -1",
    "seed=4294967296": "seed must be an integer >= 0 and <= 4294967295",
    "seed=True": "seed must be an integer >= 0, got True; a switch is no number",
    "optimizer.lr='3e-3'": "this is text, not a number: write 0.003 without quotes",
    "optimizer.lr=.nan": "optimizer.lr must be a",
    "optimizer.lr=inf": "optimizer.lr must be a finite number, got inf",
    "optimizer.lr=nan": "optimizer.lr must be a finite number, got nan",
    "max_epochs=10.0": "max_epochs must be an integer >= 1, got 10.0; write 10",
    "++max_steps=0": "max_steps must be an integer >= 1 or -1",
    "++gradient_clip_val=-1": "gradient_clip_val must be a number >= 0, got -1",
    "optimizer.batch_size=0": "optimizer.batch_size must be an integer >= 2",
    "optimizer.batch_size=1": "optimizer.batch_size must be an integer >= 2",  # BatchNorm
    "optimizer.batch_size=1e6": "write 1000000",
    "++optimizer.kwargs.betas=[0.9,2]": "optimizer.kwargs",
    "++optimizer.kwargs.beta=[0.9,0.99]": "optimizer.kwargs",
    "++optimizer.kwargs.eps=tiny": "optimizer.kwargs",
    "method_kwargs.task_kwargs.temperature=0": "method_kwargs.task_kwargs.temperature must be a number > 0",
    "++method_kwargs.task_kwargs.temprature=1": "did you mean 'temperature'?",
    "method_kwargs.task_kwargs.proj_hidden_dim=1000000000": "method_kwargs.task_kwargs.proj_hidden_dim",
    "method_kwargs.task_kwargs.proj_hidden_dim=2.5": "must be an integer",
    "method_kwargs.task_kwargs=3": "method_kwargs.task_kwargs must be a block of keys",
    "method_kwargs.meta=5": "method_kwargs.meta must be a block of keys",
    "++method_kwargs.meta.estimator_kwargs.r=1": "method_kwargs.meta.estimator_kwargs",
    "++method_kwargs.meta.optimizer.kwargs.moment=1": "method_kwargs.meta.optimizer",
    "++method_kwargs.alhpa=1": "did you mean 'alpha'?",
    "++alpha=1": "did you mean 'method_kwargs.alpha'?",
    "++backbone.kwargs.widht=4": "did you mean 'width'?",
    "++backbone.kwargs.width=wide": "backbone.kwargs",
    "++backbone.kwargs.width=-4": "backbone.kwargs",
    "backbone.name=vit_tiny_patch16_224 ++backbone.kwargs.depht=2": "backbone.kwargs",
    "++data.kwargs.corelation=1": "did you mean 'correlation'?",
    "data.kwargs.correlation=2": "data.kwargs.correlation must be",
    "++data.kwargs.copies=1000 ++data.kwargs.size=1024": "memory",
    "++data.verify=all": "data.verify must be one of decode, header, none",
    "++data.bits=7": "data.bits must be an integer >= 8",
    "++data.bits=12 ++data.format=dali": "data.bits must be null with data.format=dali",
    "++data.evaluation_resize=31": "data.evaluation_resize must be a whole number of at least the crop",
    "++data.invalid_images=ignore": "data.invalid_images must be one of skip, stop",
    "++deterministic=maybe": "deterministic must be True or False or warn",
    "++checkpoint.every_n_steps=0": "checkpoint.every_n_steps must be an integer >= 1",
    "++numerics.on_nonfinite=ignore": "numerics.on_nonfinite must be one of skip, stop",
    "++numerics.max_skipped_steps=-1": "numerics.max_skipped_steps must be an integer >= 0",
    "++numerics.collapse_below=-1": "numerics.collapse_below must be a number >= 0",
    "++numerics.colapse_below=1": "did you mean 'collapse_below'?",
    "++data.train_path=${nope}": "data.train_path must be an interpolation that resolves",
    "++data.train_path=???": "data.train_path must be set, got ???",
    "++data.num_workers=-1": "data.num_workers must be an integer >= 0",
    "name=a/b": "name must be a folder's name without /",
    "name=..": "name must be a folder's name",
    "name=''": "name must be a folder's name",
    "name=${oc.env:HOME}": "name must be a folder's name without /",
    "augmentations.0.crop_size=8": "16 pixels",
    "++augmentations.0.rrc.crop_min=1": "did you mean 'crop_min_scale'?",
}

TOGETHER = {
    "++data.on_device=True ++data.pipeline=torchvision": "data.on_device must be False or left out",
    "data.dataset=digits ~data.kwargs ++data.region=foreground": "data.region must be full for digits",
    "++data.format=dali ++data.pipeline=kornia": "data.pipeline must be left out with data.format=dali",
    "++data.no_labels=True ++knn_eval.enabled=True": "knn_eval.enabled must be False with data.no_labels",
    "++data.download=True": "data.download must be False for confounded_digits",
    "scheduler.name=step": "scheduler.lr_decay_steps must be a list of epochs",
    "scheduler.name=step ++scheduler.lr_decay_steps=[-5]": "scheduler.lr_decay_steps must be epochs >= 0",
    "evaluation.knn.k=[]": "evaluation.knn.k must be a list like [5, 20]",
    "checkpoint.enabled=False ++checkpoint.every_n_steps=5": "checkpoint.every_n_steps must be null",
    "accelerator=cpu precision=16-mixed": "precision must be another than 16-mixed and 16-true on the CPU",
    "precision=32.0": "got 32.0; write 32",
    "precision=8": "precision must be 16, 32 or 64, or one of Lightning's names, got 8",
    "precision=8-bit": "precision must be one of 16, 16-mixed",
    "accelerator=cpu strategy=dpp": "did you mean 'ddp'?",
    "accelerator=cpu devices=0": "devices must be from 1 to 1024",
    "devices=[0,0]": "devices must be a list like [0, 1]",
    "++deterministic=True ++benchmark=True": "benchmark must be False with deterministic",
    "++gradient_clip_algorithm=norm": "gradient_clip_algorithm must be left out without gradient_clip_val",
    "++limit_train_batches=1.5": "limit_train_batches must be an integer >= 1",
    "++method_kwargs.meta.trial=plain": "meta.inner_lr must be set for trial=plain when the main",
    "++method_kwargs.meta.trial=momentum": "meta.trial must be plain when the main optimiser is AdamW",
    "accelerator=cpu devices=2 ++sync_batchnorm=True": "sync_batchnorm must be False with a meta step",
    "accelerator=cpu devices=2 method_kwargs.meta.estimator=unrolled": "another than unrolled",
    "method_kwargs.meta.when=before_step method_kwargs.meta.batch_share=0.5": "1 with when=before_step",
    "task=cmc augmentations.0.num_crops=3": "2 large crops together for the task cmc",
    "checkpoint.dir=/dev/null/runs": "checkpoint.dir must be a folder, got '/dev/null'",
}


@pytest.mark.parametrize("overrides", SLIPS)
@pytest.mark.fault("config")
def test_a_slip(refused, overrides):
    assert SLIPS[overrides] in refused(config(*overrides.split(" ")))


@pytest.mark.parametrize("overrides", TOGETHER)
@pytest.mark.fault("config")
def test_what_cannot_be_together(refused, overrides):
    assert TOGETHER[overrides] in refused(config(*overrides.split(" ")))


@pytest.mark.skipif(__import__("torch").cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.fault("config")
def test_a_gpu_that_is_not_there(refused):
    assert "accelerator must be auto or cpu where no GPU is found" in refused(config("accelerator=gpu"))


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", "a\nb", "back\\slash", "."])
@pytest.mark.fault("config")
def test_names_that_are_no_folder(refused, name):
    cfg = config()
    cfg.name = name
    assert "error: name must be" in refused(cfg)


@pytest.mark.parametrize(
    "value", ["$(touch shell)", "`touch shell`", "; touch shell", "| touch shell", "&& x"]
)
@pytest.mark.fault("security")
def test_no_value_is_executed(monkeypatch, tmp_path, value):
    def start(*args, **kwargs):
        raise Started

    monkeypatch.setattr(pl.Trainer, "fit", start)
    monkeypatch.chdir(tmp_path)
    cfg = config("accelerator=cpu", "++evaluation.enabled=False")
    cfg.name = value
    cfg.checkpoint.dir = f"runs {value}"
    with pytest.raises(Started):
        pretrain.run(cfg)
    assert not (tmp_path / "shell").exists()
    (args,) = tmp_path.rglob("metamask/*/args.json")
    assert args.parents[2].name == f"runs {value}" and args.parent.name.startswith(value)


OTHER_SLIPS = {
    "linear": {
        "++protcol=fast": "did you mean 'protocol'?",
        "head=mpl": "did you mean 'mlp'?",
        "data.fraction=2": "data.fraction must be between 0 and 1",
        "++seed=-1": "seed must be an integer >= 0",
        "++data.kwargs.corelation=1": "did you mean 'correlation'?",
        "name=../x": "name must be a folder's name without /",
        "++optimizer.lr=nan": "optimizer.lr must be a finite number",
        "++data.augmentations.rrc.crop_min=1": "did you mean 'crop_min_scale'?",
    },
    "study": {
        "++sedes=[5]": "did you mean 'seeds'?",
        "size=digit": "did you mean 'digits'?",
        "seeds=[a]": "seeds.0 must be an integer",
        "name=../x": "name must be a folder's name without /",
        "++measures.acuracy={}": "did you mean 'accuracy'?",
        "++measures.accuracy.protcol=fast": "did you mean 'protocol'?",
        "minutes=-1": "minutes must be a number >= 0",
    },
}
COMMANDS = {
    "linear": ("confounded_digits", linear.run),
    "study": ("metamask_fig6", lambda cfg: study.sweep(cfg, lambda jobs, first: [])),
}


@pytest.mark.parametrize(
    ("kind", "override"), [(kind, override) for kind, slips in OTHER_SLIPS.items() for override in slips]
)
@pytest.mark.fault("config")
def test_the_other_commands(refused, kind, override):
    name, command = COMMANDS[kind]
    assert OTHER_SLIPS[kind][override] in refused(config(override, kind=kind, name=name), command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pretrained_checkpoint_dir", ".", "--temprature", "1"], "did you mean '--temperature'?"),
        (["--pretrained_checkpoint_dir", ".", "--temperature", "nan"], "must be a finite number"),
        (["--pretrained_checkpoint_dir", ".", "--k", "five"], "invalid int value: 'five'"),
        ([], "--pretrained_checkpoint_dir"),
    ],
)
@pytest.mark.fault("config")
def test_flags(capsys, flags, message):
    assert message in refusals.refused(lambda: knn.main(flags), capsys, alone=True)


HYDRA_SLIPS = {
    "no such choice": ("task=byool", "task must be one of", "did you mean 'byol'?"),
    "no such key": ("optimzer.lr=1", "did you mean 'optimizer.lr'?"),
    "not in this config": ("dali.device=cpu", "add it with ++dali.device=..."),
    "grammar": ("a==b", "must be key=value as Hydra reads it"),
    "open bracket": ("evaluation.knn.k=[5", "must be key=value as Hydra reads it"),
    "no such group": ("ablatio=none", "did you mean 'ablation'?"),
}


@pytest.mark.parametrize("slip", HYDRA_SLIPS)
@pytest.mark.fault("config")
def test_hydras_own_errors_in_one_line(slip):
    override, *messages = HYDRA_SLIPS[slip]
    with pytest.raises(HydraException) as caught:
        config(override)
    line = str(told(caught.value, "pretrain"))
    assert all(message in line for message in messages), line


@pytest.mark.parametrize("words", [["--confg-name=x"], ["--config-name"], ["--cfg", "jobs"], ["--lst"]])
def test_hydras_flags(words):
    with pytest.raises(UserError):
        check_flags(words)


def script(folder, *words):
    environment = {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=folder, env=environment
    )


@pytest.mark.slow
@pytest.mark.fault("config")
def test_the_scripts_end_with_exit_code_2(tmp_path):
    for kind, name, near in (
        ("pretrain", "metamask_barlo", "metamask_barlow"),
        pytest.param("linear", "confounded_digit", "confounded_digits", marks=pytest.mark.slow).values,
    ):
        done = script(tmp_path, ROOT / f"main_{kind}.py", "--config-name", name)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"did you mean '{near}'?" in done.stderr


def test_hydras_own_ways_stay(tmp_path):
    shown = script(tmp_path, ROOT / "main_pretrain.py", "--config-name", "metamask_barlow", "--cfg", "job")
    assert shown.returncode == 0 and "max_epochs: 50" in shown.stdout
    assert script(tmp_path, ROOT / "main_pretrain.py", "--help").returncode == 0


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES"])
def test_a_disk_at_fault_is_one_line(capsys, code):
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "runs/last.ckpt")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: 'runs/last.ckpt' cannot be read or written")
    assert error.count("\n") == 1


@pytest.mark.fault("config")
def test_a_really_full_disk_is_one_line(capsys):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with pytest.raises(SystemExit) as end, one_line_errors(), open("/dev/full", "w") as file:
        file.write("x" * 10_000_000)
    assert end.value.code == 2 and "free space, and the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [KeyError("x"), TypeError("x"), RuntimeError("x"), FileNotFoundError(2, "x")])
def test_a_bug_is_not_hidden(bug):
    with pytest.raises(type(bug)), one_line_errors():
        raise bug


def test_every_keyword_of_every_task_has_a_type():
    for task in TASKS.values():
        import inspect

        own = set(inspect.signature(task).parameters) - {"features_dim"}
        assert own <= set(TaskKwargs.model_fields), task


def test_what_is_solo_learns_is_accepted_and_said(monkeypatch, tmp_path, capsys):
    def start(*args, **kwargs):
        raise Started

    monkeypatch.setattr(pl.Trainer, "fit", start)
    monkeypatch.chdir(tmp_path)
    cfg = config("accelerator=cpu", "++evaluation.enabled=False", "auto_resume.max_hours=24")
    cfg = OmegaConf.merge(
        OmegaConf.create(OmegaConf.to_container(cfg)),
        {
            "dali": {"encode_indexes_into_labels": True},
            "debug_augmentations": False,
            "checkpoint": {"keep_prev": True},
            "momentum": {"base_tau": 0.99},
            "check_val_every_n_epoch": 2,
            "wandb": None,
        },
    )
    with pytest.raises(Started):
        pretrain.run(cfg)
    note = capsys.readouterr().err
    assert "note: " in note and "auto_resume.max_hours" in note and "check_val_every_n_epoch" in note
