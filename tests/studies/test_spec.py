"""What a study config means: factors, sizes, placeholders, and one line for what cannot be."""

import os

import pytest
from hydra import compose, initialize_config_dir

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.study import shipped_studies, with_pretraining_overrides
from metamask_plugin.errors import UserError
from metamask_plugin.studies.pretraining import command, digest, pretraining_config
from metamask_plugin.studies.spec import study_of


def study(name, *overrides):
    with initialize_config_dir(str((SCRIPTS / "study").resolve()), version_base="1.2"):
        return study_of(compose(name, list(overrides)))


def test_every_combination_of_the_factors_is_a_trial_for_every_seed():
    found = study("metamask_fig10", "seeds=[1,2]")
    assert found.factors == ("encoder", "arm") and len(found.trials) == 2 * 5 * 2
    assert [trial.seed for trial in found.trials] == [1] * 10 + [2] * 10
    assert [trial.index for trial in found.trials] == list(range(20))
    assert found.trials[7].factors == {"encoder": "conv", "arm": "w/o ML"}
    assert found.trials[7].overrides == ("setting=metamask_table1", "backbone.name=conv", "ablation=no_meta")


def test_a_number_of_a_factor_stands_in_the_overrides():
    values = [trial.overrides for trial in study("metamask_fig6", "seeds=[5]").trials]
    assert values[3] == ("method_kwargs.alpha=100",)


def test_size_digits_takes_the_embedded_data_and_drops_the_papers_numbers():
    paper, digits = study("metamask_table2"), study("metamask_table2", "size=digits")
    assert {trial.factors["dataset"] for trial in digits.trials} == {"confounded digits"}
    assert {trial.config for trial in digits.trials} == {"metamask_barlow"}
    assert paper.paper and not digits.paper
    assert digits.folder.name == "metamask_table2-digits"


@pytest.mark.parametrize("name", ["metamask_fig6", "comparison_cpu"])
def test_the_users_levels_win_over_those_of_a_size(name):
    factor = {"metamask_fig6": "alpha", "comparison_cpu": "arm"}[name]
    reduced, asked = study(name, "size=digits"), study(name, "size=digits", f"factors.{factor}=[7]")
    assert len({trial.factors[factor] for trial in reduced.trials}) > 1
    assert {trial.factors[factor] for trial in asked.trials} == {7}


def test_what_stands_behind_the_dashes_wins_over_the_studys_settings():
    argv = with_pretraining_overrides(
        ["main_study.py", "size=digits", "--", "max_epochs=3", "++name=it's", "~optimizer.kwargs"]
    )
    assert argv[:2] == ["main_study.py", "size=digits"] and len(argv) == 3
    trial = study("metamask_fig6", *argv[1:]).trials[0]
    assert trial.overrides[-3:] == ("max_epochs=3", "++name=it's", "~optimizer.kwargs")
    assert trial.overrides.index("max_epochs=2") < trial.overrides.index("max_epochs=3")


def test_a_checkpoint_takes_the_place_of_the_encoders():
    trials = study("metamask_fig2", "checkpoint=[runs/a/last.ckpt,timm:resnet18]").trials
    assert [trial.checkpoint for trial in trials] == ["runs/a/last.ckpt", "timm:resnet18"]
    assert trials[0].factors == {"encoder": "a/last.ckpt"}


def test_longer_training_of_a_level():
    found = study("metamask_table4", "size=smoke", "seeds=[5]")
    epochs = {trial.factors["arm"]: pretraining_config(found, trial).max_epochs for trial in found.trials}
    assert epochs == {"SimCLR": 3, "MetaMask": 1}


def test_the_command_of_a_trial_is_the_trial():
    found = study("metamask_table4", "size=smoke", "seeds=[5]")
    trial = found.trials[0]
    cfg = pretraining_config(found, trial)
    name, *overrides = command(found, trial, cfg).split()[3:]
    with initialize_config_dir(str((SCRIPTS / "pretrain").resolve()), version_base="1.2"):
        by_hand = compose(name, overrides)
    assert digest(found, trial, by_hand) == digest(found, trial, cfg)


def test_the_digest_covers_training_and_measures():
    found = study("metamask_fig6", "size=smoke")
    first = found.trials[0]
    digests = {digest(found, trial, pretraining_config(found, trial)) for trial in found.trials}
    assert len(digests) == len(found.trials)
    other = study("metamask_fig6", "size=smoke", "+measures.accuracy.ks=[7]")
    assert digest(other, other.trials[0], pretraining_config(other, first)) not in digests


@pytest.mark.parametrize("spec", ["{}", "timm:resnet18={}"])
def test_a_checkpoint_that_was_written_anew_is_another_trial(tmp_path, spec):
    file = tmp_path / "last.pth"
    file.write_bytes(b"1")
    found = study("metamask_fig2", f"checkpoint=['{spec.format(file)}']")
    before = digest(found, found.trials[0], None)
    os.utime(file, ns=(1, 1))
    assert digest(found, found.trials[0], None) != before


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["size=large"], "size must be one of digits, paper, smoke, got 'large'"),
        (["seeds=[5,5]"], r"seeds must be a list of different integers like \[5,6,7\], got \[5, 5\]"),
        (["factors.alpha=3"], "factors.alpha must be a list of levels"),
        (["factors.alpha=[1,1]"], r"factors.alpha must be levels with different labels, got \[1\]"),
        (["factors.alpha=[{value:1,override:x}]"], "unknown: override"),
        (["+factors.seed=[1]"], "factors must be named other than seed"),
        (["overrides=3"], "overrides must be a list, got 3; give them behind --"),
    ],
)
def test_what_cannot_be_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        study("metamask_fig6", *overrides)


def test_an_override_that_does_not_compose_is_one_line():
    found = study("metamask_fig6", "overrides=['backbone.nam=x']")
    with pytest.raises(UserError, match="backbone.nam=x seed=5 must compose, got") as error:
        pretraining_config(found, found.trials[0])
    assert "\n" not in str(error.value)


def one_of_each_level(trials):
    """Trials of the first seed that between them have every level of every factor."""
    found, seen = [], set()
    for trial in trials:
        levels = set(trial.factors.items())
        if not levels <= seen:
            found.append(trial)
            seen |= levels
    return found


@pytest.mark.parametrize("size", ["paper", pytest.param("digits", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", shipped_studies())
def test_every_level_of_every_study_has_a_pretraining_config(name, size):
    found = study(name, f"size={size}", "seeds=[5]")
    trials = one_of_each_level(found.trials)
    digests = [digest(found, trial, pretraining_config(found, trial)) for trial in trials]
    assert len(set(digests)) == len(digests), "two trials of a study train and measure the same"
    if size == "paper":
        assert found.baseline == found.config["baseline"], "the baseline is no level of its factor"
        assert len(found.paper) == len(found.config["paper"]), "a number of the paper's belongs to no level"
        assert all({"metric", "value"} < row.keys() for row in found.paper)
