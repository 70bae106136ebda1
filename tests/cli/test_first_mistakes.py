"""What everybody types wrongly at first: one line, at once, with a remedy that can be pasted."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.command_line import understood
from metamask_plugin.cli.main import COMMAND, COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ("pretrain", "--config-name", "metamask_barlow")
STUDY = ("study", "--config-name", "metamask_fig6")

ANSWERED = {
    "no config": (["pretrain", "max_epochs=1"], "add --config-name metamask_barlow"),
    "no config for a task": (["pretrain", "task=byol"], "add --config-name metamask_barlow"),
    "no linear config": (["linear", "seed=6"], "add --config-name confounded_digits"),
    "no encoder": (
        ["linear", "--config-name", "confounded_digits", "pretrained_feature_extractor=x"],
        "pretrained_feature_extractor must be a path that is there",
    ),
    "no study": (["study", "size=smoke"], "add --config-name metamask_fig6"),
    "nothing for a study": (["study"], "add --config-name metamask_fig6"),
    "a name alone": (["pretrain", "metamask_barlow"], "did you mean --config-name metamask_barlow?"),
    "list as a word": (["pretrain", "list"], "write --list"),
    "a name as a command": (["cifar/metamask_barlow"], "'pretrain --config-name cifar/metamask_barlow'?"),
    "a slip in a command": (["pretrian"], "did you mean 'pretrain'?"),
    "no -m": ([*PRETRAIN, "task=simclr,byol"], "add -m to run each of them in turn"),
    "method for task": ([*PRETRAIN, "method=simclr"], "write task=simclr method=baseline"),
    "another's ablation": ([*PRETRAIN, "ablation=no_mask"], "take 'no_meta'"),
    "another's epochs": ([*PRETRAIN, "epochs=3"], "did you mean 'max_epochs'?"),
    "another's temperature": ([*PRETRAIN, "temperature=0.1"], "'method_kwargs.task_kwargs.temperature'?"),
    "another's precision": ([*PRETRAIN, "precision=fp16"], "did you mean '16-mixed'?"),
    "another's pretrained": (
        ["linear", "--config-name", "confounded_digits", "pretrained=x"],
        "did you mean 'pretrained_feature_extractor'?",
    ),
    "case": ([*PRETRAIN, "task=simCLR"], "did you mean 'simclr'?"),
    "a config of the other kind": (
        ["linear", "--config-name", "metamask_barlow"],
        "--config-name must be one of cifar/icl_msr_simclr, cifar/metamask_barlow",
    ),
    "a block as a key": ([*PRETRAIN, "backbone=resnet18"], "did you mean backbone.name=resnet18?"),
    "data as a key": ([*PRETRAIN, "data=cifar10"], "did you mean data.dataset=cifar10?"),
    "a folder as a group": (
        [*PRETRAIN, "cifar=metamask_barlow"],
        "did you mean --config-name cifar/metamask_barlow?",
    ),
    "a study's training": ([*STUDY, "method_kwargs.alpha=3"], "put it behind --: -- method_kwargs.alpha=3"),
    "a launcher that is missing": (
        [*STUDY, "hydra/launcher=submitit_slurm"],
        "pip install hydra-submitit-launcher",
    ),
    "no such folder": ([*PRETRAIN, "--config-path", "cifr"], "must be a folder that is there, got 'cifr'"),
    "half a flag": (["pretrain", "--config", "metamask_barlow"], "write --config-name <name>"),
    "no such checkpoint": (["knn", "--pretrained_checkpoint_dir", "gone"], "must be a path that is there"),
    "no such data": ([*PRETRAIN, "data.train_path=gone"], "data.train_path must be a path that is there"),
    "no such run": (
        [*PRETRAIN, "resume_from_checkpoint=gone.ckpt"],
        "resume_from_checkpoint must be a path that is there",
    ),
    "no run to audit": (["audit"], "metamask-ssl audit <run>"),
    "no such section": (["list", "task"], "invalid choice: 'task'"),
    "no folder to verify": (["verify", "gone"], "must be a path that is there, got 'gone'"),
    "a slip in a key": ([*PRETRAIN, "optimzer.lr=1"], "did you mean 'optimizer.lr'?"),
    "no encoder at all": (
        ["linear", "--config-name", "confounded_digits"],
        "add pretrained_feature_extractor=<run>",
    ),
    "no such run to audit": (["audit", "gone"], "checkpoint must be a path that is there"),
    "a list for a part": ([*PRETRAIN, "augmentations=[{crop_size: 3}]"], "write augmentations=<name>"),
    "null for a part": ([*PRETRAIN, "task=null"], "write task=<name>"),
    "null for a study's part": ([*STUDY, "--", "task=null"], "write task=<name>"),
    "a part of a probe": (
        ["linear", "--config-name", "confounded_digits", "pretrained_feature_extractor=.", "task=byol"],
        "a key on the command line must be one of the config's, got 'task'",
    ),
    "no key": ([*PRETRAIN, "=5"], "an override must be key=value, got '=5'"),
    "a switch with a value": ([*PRETRAIN, "-m=3"], "write -m"),
    "an unknown kind of info": ([*PRETRAIN, "--info", "foo"], "invalid choice: 'foo'"),
    "an unknown shell": (
        ["pretrain", "-sc", "install=foo"],
        "--shell-completion install must be one of bash, fish, zsh, got 'foo'",
    ),
    "no shell": ([*PRETRAIN, "-sc"], "add install=bash"),
    "a shell's question": (["pretrain", "-sc", "query=bash"], "must be asked by a shell"),
    "no such run to repeat": (
        [*PRETRAIN, "--experimental-rerun", "gone"],
        "--experimental-rerun must be a config that Hydra has pickled, got 'gone'",
    ),
    "text for a pickle": (["pretrain", "--experimental-rerun", __file__], "that Hydra has pickled"),
    "an unknown short flag": ([*PRETRAIN, "-x"], "a flag must be one of"),
    "an unknown method": ([*PRETRAIN, "method=nope"], "method must be one of baseline, icl_msr, metamask"),
}


@pytest.fixture
def typed(monkeypatch, capfd):
    """What a command line says, and with which exit code it ends."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(COMMAND, "")

    def say(*words):
        monkeypatch.setattr(sys, "argv", ["metamask-ssl", *words])
        code = 0
        try:
            main(list(words))
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    yield say
    HydraConfig.instance().cfg = None  # else who composes a config by hand is taken for Hydra's job


@pytest.mark.fault("config")
@pytest.mark.parametrize("mistake", ANSWERED)
def test_a_first_mistake_is_answered(typed, mistake):
    words, remedy = ANSWERED[mistake]
    code, out, err = typed(*words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert remedy in err and not out


@pytest.mark.fault("config")
def test_an_ablation_of_the_other_method(typed, tmp_path):
    small = ["max_epochs=1", f"checkpoint.dir={tmp_path}"]
    for name, ablation, owner in (
        ("metamask_barlow", "no_msr", "icl_msr"),
        ("icl_msr_simclr", "no_drr", "metamask"),
    ):
        code, _, err = typed("pretrain", "--config-name", name, f"ablation={ablation}", *small)
        assert code == 2 and f"got '{ablation}'; it is of {owner}" in err
    assert not list(tmp_path.iterdir())


def test_no_key_needs_a_plus(typed):
    """Of those that there are: what a message says can be pasted."""
    words = ["data.fraction=0.1", "backbone.kwargs.width=4", "data.download=True", "data.no_labels=True"]
    code, out, err = typed(*PRETRAIN, *words, "--cfg", "job")
    assert code == 0, err
    assert "fraction: 0.1" in out and "width: 4" in out and "download: true" in out


def test_words_stand_in_any_order(typed):
    words = [
        "pretrain",
        "seed=5",
        "--config-name",
        "metamask_barlow",
        "max_epochs=3",
        "--cfg",
        "job",
        "name=x",
    ]
    code, out, err = typed(*words)
    assert code == 0, err
    assert "max_epochs: 3" in out and "seed: 5" in out and "name: x" in out
    code, out, err = typed("study", "--config-name", "metamask_fig6", "--cfg", "job", "--", "task=byol")
    assert code == 0 and "- task=byol" in out, err


def test_blocks_and_paths_of_the_home_folder(typed):
    words = [
        "method_kwargs.redundancy={lamb: 2}",
        "optimizer.kwargs={betas: [0.9, 0.99]}",
        "checkpoint.dir=~/x",
    ]
    code, out, err = typed(*PRETRAIN, *words, "--cfg", "job")
    assert code == 0, err
    assert "lamb: 2" in out and "- 0.99" in out and "dir: ~/x" in out


def test_a_config_of_ones_own(typed, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [metamask_barlow, _self_]\nmax_epochs: 7\n")
    (tmp_path / "metamask_barlow.yaml").write_text("max_epochs: 7\n")
    code, out, err = typed("pretrain", "--config-dir", str(tmp_path), "--config-name", "mine", "--cfg", "job")
    assert code == 0 and "max_epochs: 7" in out, err
    code, out, err = typed("pretrain", "--config-name", str(tmp_path / "mine.yaml"), "--cfg", "job")
    assert code == 0 and "max_epochs: 7" in out, err
    code, _, err = typed(*PRETRAIN, "--config-dir", str(tmp_path))
    assert code == 2 and "rename your file" in err


def test_completion(typed, monkeypatch):
    code, out, err = typed("pretrain", "-sc", "install=bash")
    assert code == 0 and "COMP_LINE" in out and not err
    monkeypatch.setenv("COMP_LINE", "metamask-ssl task=by")
    code, out, err = typed(*PRETRAIN, "-sc", "query=bash")
    assert code == 0 and "task=byol" in out and not err


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", "pretrain"),
        ("lin", "linear"),
        ("pretrain --config-name ci", "cifar/metamask_barlow"),
        ("pretrain --config-name metamask_barlow task=", "task=byol"),
        ("linear epo", None),
        ("study --config-name metamask_fig6 se", "seeds="),
        ("list ", "tasks"),
        ("nothing ", None),
    ],
)
def test_the_command_completes_its_own_words(line, offered):
    line = f"metamask-ssl {line}"
    command = [sys.executable, "-m", "metamask_plugin", "-sc", "query=bash"]
    environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    assert offered is None or offered in done.stdout.split()


def test_a_run_is_repeated_from_its_pickle(tmp_path):
    file = tmp_path / "config.pickle"
    file.write_bytes(pickle.dumps(OmegaConf.create({"hydra": {}})))
    words = ["--experimental-rerun", str(file)]
    assert understood("pretrain", words) == words


def test_a_run_by_its_folder(typed, tmp_path):
    run = tmp_path / "a run, \U0001f389"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"name": "\U0001f389", "max_epochs": 7}))
    for name in (run, run / "args.json"):
        code, out, err = typed("pretrain", "--config-name", str(name), "--cfg", "job")
        assert code == 0 and "max_epochs: 7" in out and "\U0001f389" in out, err
    code, _, err = typed("pretrain", "--config-name", str(run), "task=byol")
    assert code == 2 and "task must be left out with a run's args.json" in err
    for text in ("[1]", "{", "[" * 100_000):
        (run / "args.json").write_text(text)
        code, _, err = typed("pretrain", "--config-name", str(run))
        assert code == 2 and err.count("must be a run's args.json") == 1
    shipped = SCRIPTS / "pretrain" / "cifar" / "metamask_barlow.yaml"
    code, out, err = typed("pretrain", "--config-name", str(shipped), "--cfg", "job")
    assert code == 0 and "dataset: cifar10" in out, err


def test_help_and_lists(typed):
    code, out, err = typed("--help")
    assert code == 0 and all(name in out for name in COMMANDS) and not err
    for name, command in COMMANDS.items():
        code, out, _ = typed(name, "--help")
        assert code == 0 and len(out.splitlines()) > 4
        if command.config:
            assert f"metamask-ssl {name}" in out and command.about in out
    for section in ("configs", "ablations", "settings"):
        code, out, _ = typed("list", section)
        assert code == 0 and out.strip()
    lines = typed("list", "ablations")[1].splitlines()
    assert "of icl_msr" in next(line for line in lines if "no_msr" in line)
    code, out, err = typed()
    assert code == 2 and "usage" in err


FAST = {
    "help": ["--help"],
    "a command's help": ["knn", "--help"],
    "list": ["list", "configs"],
    "a slip in a key": [*PRETRAIN, "optimzer.lr=1"],
    "a slip in a value": [*PRETRAIN, "task=byool"],
    "another word": [*PRETRAIN, "data.dataset=cifar11"],
    "another kind of value": [*PRETRAIN, "optimizer.lr=fast"],
    "an added key": [*PRETRAIN, "++wandb.projct=mine"],
    "what cannot be together": [*PRETRAIN, "scheduler.name=step"],
    "a path that is not there": [*PRETRAIN, "data.train_path=gone"],
    "no such checkpoint": ["knn", "--pretrained_checkpoint_dir", "gone"],
}
TIMED = """
import atexit, os, sys
from metamask_plugin.cli.main import main
atexit.register(lambda: print("torch" in sys.modules, sum(os.times()[:2]), file=sys.stderr))
main(sys.argv[1:])
"""


@pytest.mark.parametrize("what", FAST)
def test_an_answer_takes_less_than_a_second_of_processor_time(tmp_path, what):
    command = [sys.executable, "-c", TIMED, *FAST[what]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    torch_is_there, seconds = done.stderr.splitlines()[-1].split()
    assert torch_is_there == "False" and float(seconds) < 1


@pytest.mark.parametrize("start", [["-m", "metamask_plugin", "pretrain"], [str(ROOT / "main_pretrain.py")]])
def test_other_ways_in(tmp_path, start):
    command = [sys.executable, *start, "--config-name", "metamask_barlow", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "max_epochs: 50" in done.stdout


def test_nothing_does_nothing_and_succeeds(tmp_path):
    done = subprocess.run([sys.executable, "-m", "metamask_plugin"], capture_output=True, cwd=tmp_path)
    assert done.returncode == 2
    script = [sys.executable, "-m", "metamask_plugin", "main_gone.py"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "the script must be there" in done.stderr
