"""Keys that had another name: the old one is accepted, said, and trains the same run."""

import json

import lightning.pytorch as pl
import pytest
from composing import composed
from hydra.core.hydra_config import HydraConfig
from method_config import method_config
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.checked import checked_pretraining
from metamask_plugin.cli.command_line import understood
from metamask_plugin.cli.config import complete, for_method, recorded
from metamask_plugin.cli.hydra_main import run
from metamask_plugin.errors import UserError
from metamask_plugin.methods import METHODS
from metamask_plugin.renamed import OLD_NAMES, RENAMED, in_new_names, with_earlier_names, with_new_names
from metamask_plugin.studies.pretraining import _composed, _settings
from metamask_plugin.training.experiment import experiment_digest, experiment_of, in_words
from metamask_plugin.training.resume import _runs

PRETRAIN = SCRIPTS / "pretrain"
OLD = (
    *("numbers.nonfinite=skip", "numbers.max_skipped=3", "numbers.collapse_below=0.5"),
    *("method_kwargs.meta.schedule=shared", "method_kwargs.meta.follow_schedule=True"),
)
NEW = (
    *("numerics.on_nonfinite=skip", "numerics.max_skipped_steps=3", "numerics.collapse_below=0.5"),
    *("method_kwargs.meta.when=before_step", "method_kwargs.meta.decay_lr=True"),
)
SMALL = ("++evaluation.enabled=False", "accelerator=cpu")


def config(*words, name="metamask_barlow"):
    return composed("pretrain", name, *understood("pretrain", ["--config-name", name, *words])[: len(words)])


def warnings(text):
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def own_of(cfg):
    return METHODS[cfg.method].add_and_assert_specific_cfg(for_method(complete(cfg), 10))


def digest(cfg):
    return experiment_digest(experiment_of(own_of(cfg), 1, "cpu", "torchvision", images_fingerprint="x"))


def test_the_tests_have_every_key():
    assert [word.partition("=")[0] for word in OLD] == list(OLD_NAMES)
    assert [word.partition("=")[0] for word in NEW] == [entry.new for entry in RENAMED]


@pytest.mark.fault("config")
def test_an_old_name_on_the_command_line(capsys):
    found = checked_pretraining(config(*OLD))
    assert warnings(capsys.readouterr().err) == [
        f"warning: {entry.old} is called {entry.new} now; the old name goes with the next version"
        for entry in RENAMED
    ]
    assert found == checked_pretraining(config(*NEW), quiet=True)
    checked_pretraining(config(*OLD), quiet=True)
    checked_pretraining(config(*NEW))
    assert not warnings(capsys.readouterr().err)


@pytest.mark.parametrize(("old", "new"), list(RENAMED[3].values.items()))
@pytest.mark.parametrize("name", ["metamask_barlow", "icl_msr_simclr", "stl10/icl_msr_simclr"])
def test_an_old_name_is_laid_over_what_a_shipped_config_says(name, old, new):
    for word in (f"method_kwargs.meta.schedule={old}", "method_kwargs.meta={schedule: " + old + "}"):
        found = checked_pretraining(config(word, name=name), quiet=True)
        assert found["method_kwargs"]["meta"]["when"] == new
        assert "schedule" not in found["method_kwargs"]["meta"]


def test_what_shipped_configs_say_is_in_the_table():
    """Other values beside an old name are the user's own, and a contradiction."""
    configs = [cfg for cfg in map(OmegaConf.load, PRETRAIN.rglob("*.yaml")) if OmegaConf.is_dict(cfg)]
    for entry in RENAMED:
        said = {OmegaConf.select(cfg, entry.new) for cfg in configs} - {None}
        assert said == set(entry.shipped), entry.new


@pytest.mark.fault("config")
def test_in_a_config_of_ones_own(tmp_path, monkeypatch, capsys):
    def start(*args, **kwargs):
        raise KeyError("training would begin now")

    monkeypatch.setattr(pl.Trainer, "fit", start)
    monkeypatch.chdir(tmp_path)
    text = "defaults: [metamask_barlow, _self_]\nnumbers: {nonfinite: skip}\n"
    (tmp_path / "mine.yaml").write_text(f"{text}method_kwargs: {{meta: {{schedule: epoch}}}}\n")
    words = ["--config-name", str(tmp_path / "mine.yaml"), *SMALL]
    monkeypatch.setattr("sys.argv", ["metamask-ssl"])
    try:
        with pytest.raises(KeyError, match="would begin"):
            run("pretrain", words)
        assert len(warnings(capsys.readouterr().err)) == 2, "each once"
        args = json.loads(next(tmp_path.rglob("args.json")).read_text())
        assert args["numerics"]["on_nonfinite"] == "skip" and "numbers" not in args
        assert args["method_kwargs"]["meta"]["when"] == "epoch_end"
        assert not {"schedule", "follow_schedule"} & set(args["method_kwargs"]["meta"])
        with pytest.raises(SystemExit):  # the command line counts, and does not know of it
            run("pretrain", [*words, "method_kwargs.meta.when=after_step"])
        assert "schedule must be left out beside method_kwargs.meta.when" in capsys.readouterr().err
    finally:
        HydraConfig.instance().cfg = None


OTHERS = ("stop", 4, 0.6, "epoch", False)


@pytest.mark.fault("config")
@pytest.mark.parametrize(("entry", "new", "other"), list(zip(RENAMED, NEW, OTHERS)))
def test_both_names(entry, new, other):
    cfg = config(new)
    OmegaConf.update(cfg, entry.old, other, force_add=True)
    with pytest.raises(
        UserError, match=f"{entry.old} must be left out beside {entry.new}, its new name, got"
    ):
        checked_pretraining(cfg)


def test_both_names_that_say_the_same():
    assert checked_pretraining(config(*OLD, *NEW)) == checked_pretraining(config(*NEW))


def test_an_old_run_is_found():
    """Its digest is of the old names, and a message about it has the new ones."""
    assert digest(config(*OLD)) == digest(config(*NEW)) != digest(config())
    experiment = experiment_of(own_of(config(*NEW)), 1, "cpu", "torchvision", images_fingerprint="x")
    assert experiment["method_kwargs"]["meta"]["schedule"] == "shared"
    assert experiment["method_kwargs"]["meta"]["follow_schedule"] is True
    assert not {"when", "decay_lr"} & set(experiment["method_kwargs"]["meta"])
    found = {"method_kwargs.meta.schedule": ("shared", "epoch")}
    assert in_words(found) == "method_kwargs.meta.when 'before_step' there, 'epoch_end' here"


def test_a_trial_of_a_study_is_found():
    old = _composed("metamask_barlow", OLD)
    new = _composed("metamask_barlow", (*NEW[:-1], f"++{NEW[-1]}"))
    assert _settings(old) == _settings(new)
    found = [_settings(new)[f"numerics.{key}"] for key in ("on_nonfinite", "max_skipped_steps")]
    assert found == ["skip", 3]


def test_there_and_back():
    node = OmegaConf.to_container(config(*NEW))
    new = OmegaConf.to_container(config(*NEW))
    assert with_new_names(with_earlier_names(node), quiet=True) == new != {}


def test_from_python(capsys):
    """As in solo-learn's scripts, which hold no config against the model."""
    settings = {"method_kwargs__meta": {"schedule": "shared", "follow_schedule": True}}
    model = METHODS["metamask"](method_config(**settings, numbers={"nonfinite": "skip", "max_skipped": 3}))
    assert model.meta.shared and model.meta.cfg.decay_lr is True
    assert model.guard.skips and model.guard.max_skipped == 3 and "numbers" not in model.cfg
    assert len(warnings(capsys.readouterr().err)) == 4
    checkpoint = {"method_kwargs": with_earlier_names(OmegaConf.to_container(model.cfg))["method_kwargs"]}
    assert checkpoint["method_kwargs"]["meta"]["schedule"] == "shared"
    model.cfg.resume_from_checkpoint = None
    model.on_load_checkpoint(checkpoint)  # of an earlier version: it is no other experiment's
    assert not capsys.readouterr().err


def test_an_old_runs_config_is_taken_again(capsys):
    cfg = complete(config(*NEW))
    args = with_earlier_names(OmegaConf.to_container(recorded(cfg, own_of(config(*NEW)))))
    assert {"numbers"} <= set(args) and "numerics" not in args
    again = complete(OmegaConf.create(args))
    assert again.numerics == cfg.numerics and again.method_kwargs.meta.when == "before_step"
    assert len(warnings(capsys.readouterr().err)) == len(RENAMED)


@pytest.mark.fault("config")
def test_a_method_by_its_earlier_name(tmp_path, capsys):
    found = checked_pretraining(config("method=bare"))
    assert warnings(capsys.readouterr().err) == [
        "warning: method=bare is called method=baseline now; the old name goes with the next version"
    ]
    assert found == checked_pretraining(config("method=baseline")) and found["method"] == "baseline"
    assert not warnings(capsys.readouterr().err)
    assert METHODS["bare"] is METHODS["baseline"]
    assert digest(config("method=bare")) == digest(config("method=baseline"))
    assert with_earlier_names({"method": "baseline"}) == {"method": "bare"}
    assert in_new_names("method", "bare") == ("method", "baseline")


def test_runs_of_the_earlier_name_are_found(tmp_path):
    cfg = OmegaConf.create({"method": "baseline", "checkpoint": {"dir": str(tmp_path)}})
    assert _runs(cfg, "run") == tmp_path / "baseline"
    (tmp_path / "bare" / "run").mkdir(parents=True)
    assert _runs(cfg, "run") == tmp_path / "bare" and _runs(cfg, "another") == tmp_path / "baseline"
