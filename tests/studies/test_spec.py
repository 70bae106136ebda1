"""What a study config means: factors, sizes, placeholders, and one line for what cannot be."""

import os
import shlex

import pytest
from composing import composed

from metamask_plugin.cli.command_line import with_pretraining_overrides
from metamask_plugin.cli.known import shipped
from metamask_plugin.errors import UserError
from metamask_plugin.studies.pretraining import command, digest, pretraining_config
from metamask_plugin.studies.reference import reference
from metamask_plugin.studies.spec import study_of


def study(name, *overrides):
    return study_of(composed("study", name, *overrides))


def test_every_combination_of_the_factors_is_a_trial_for_every_seed():
    found = study("metamask_fig10", "seeds=[1,2]")
    assert found.factors == ("encoder", "arm") and len(found.trials) == 2 * 6 * 2
    assert [trial.seed for trial in found.trials] == [1] * 12 + [2] * 12
    assert [trial.index for trial in found.trials] == list(range(24))
    assert found.trials[8].factors == {"encoder": "conv", "arm": "w/o ML"}
    paths = ("data.train_path=./datasets", "data.val_path=./datasets")
    overrides = ("setting=metamask_table1", "backbone.name=conv", "ablation=no_meta")
    assert found.trials[8].overrides == (*overrides, *paths)


def test_a_number_of_a_factor_stands_in_the_overrides():
    values = [trial.overrides for trial in study("metamask_fig6", "seeds=[5]").trials]
    assert values[3][0] == "method_kwargs.alpha=100"


def test_size_digits_takes_the_embedded_data_and_drops_the_papers_numbers():
    paper, digits = study("metamask_table2"), study("metamask_table2", "size=digits")
    assert {trial.factors["dataset"] for trial in digits.trials} == {"confounded digits"}
    assert {trial.config for trial in digits.trials} == {"metamask_barlow"}
    assert paper.paper and not digits.paper
    assert digits.folder.name == "metamask_table2-digits"


@pytest.mark.parametrize("name", ["metamask_fig6", "comparison_cpu"])
def test_the_users_levels_win_over_those_of_a_size(name):
    factor, levels = {
        "metamask_fig6": ("alpha", "[7]"),
        "comparison_cpu": ("arm", "[{label: 7, overrides: []}]"),
    }[name]
    reduced, asked = study(name, "size=digits"), study(name, "size=digits", f"factors.{factor}={levels}")
    assert len({trial.factors[factor] for trial in reduced.trials}) > 1
    assert {trial.factors[factor] for trial in asked.trials} == {7}


@pytest.mark.fault("studies")
def test_a_bare_value_that_changes_nothing_is_refused_with_a_remedy_that_can_be_pasted():
    with pytest.raises(UserError) as refused:
        study("metamask_table5", "size=smoke", "factors.dropout=[0.1]")
    message = str(refused.value)
    assert message.startswith(
        "factors.dropout must be levels that change something, got 0.1; name one of none, "
    )
    change = "method_kwargs.feature_dropout.rate=0.1"
    pasted = shlex.split(message.replace("key=value", change))[-1]
    found = study("metamask_table5", "size=smoke", pasted)
    assert found.trials[0].factors == {"dropout": 0.1} and change in found.trials[0].overrides
    nothing = study("metamask_table5", "size=smoke", "factors.dropout=[{label: 0.1, overrides: []}]")
    assert nothing.trials[0].factors == {"dropout": 0.1}


@pytest.mark.fault("studies")
@pytest.mark.parametrize("size", ["smoke", "digits", "paper"])
def test_a_bare_label_of_the_study_is_its_level_of_that_name(size):
    (trial,) = study("metamask_table5", f"size={size}", "seeds=[5]", "factors.dropout=['0.1 shared']").trials
    assert trial.factors == {"dropout": "0.1 shared"}
    assert "ablation=shared_feature_dropout" in trial.overrides
    arms = study("icl_msr_table2", f"size={size}", "seeds=[5]", "factors.arm=[SimCLR]").trials
    assert {"task=simclr", "method=baseline"} <= set(arms[0].overrides)


def test_a_label_of_other_data_is_none_of_a_size_that_has_its_own():
    with pytest.raises(UserError, match="factors.dataset must be levels .* name one of confounded digits"):
        study("metamask_table2", "size=digits", "factors.dataset=[CIFAR-10]")


@pytest.mark.fault("studies")
def test_the_users_options_of_a_measure_and_all_levels_win_over_those_of_a_size():
    assert study("metamask_fig6", "size=smoke").measures["accuracy"]["protocol"] == "fast"
    found = study(
        "metamask_fig6", "size=smoke", "measures.accuracy.protocol=solo", "+measures.accuracy.ks=[3]"
    )
    assert found.measures["accuracy"] == {"protocol": "solo", "ks": [3]}
    levels = study("metamask_fig6", "size=smoke", "seeds=[5]", "factors.alpha=[1,2,3,4]").trials
    assert [trial.factors["alpha"] for trial in levels] == [1, 2, 3, 4]


@pytest.mark.fault("studies")
def test_an_override_of_what_every_level_sets_is_refused():
    with pytest.raises(
        UserError, match=r"every level of alpha sets, got 'method_kwargs.alpha=7'; .*factors.alpha"
    ):
        study("metamask_fig6", "overrides=['method_kwargs.alpha=7']")
    with pytest.raises(UserError, match="every level of encoder sets, got 'backbone.name=resnet18'"):
        study("metamask_fig10", "size=digits", "overrides=['backbone.name=resnet18']")
    assert study("metamask_fig6", "overrides=['++method_kwargs.task_kwargs.proj_output_dim={alpha}']").trials


def test_what_stands_behind_the_dashes_wins_over_the_studys_settings():
    argv = with_pretraining_overrides(
        ["main_study.py", "size=digits", "--", "max_epochs=3", "++name=it's", "~optimizer.kwargs"]
    )
    assert argv[:2] == ["main_study.py", "size=digits"] and len(argv) == 3
    trial = study("metamask_fig6", *argv[1:]).trials[0]
    assert trial.overrides[-3:] == ("++max_epochs=3", "++name=it's", "~optimizer.kwargs")
    assert trial.overrides.index("max_epochs=2") < trial.overrides.index("++max_epochs=3")


def test_a_checkpoint_takes_the_place_of_the_encoders():
    trials = study("metamask_fig2", "checkpoint=[runs/a/last.ckpt,timm:resnet18]").trials
    assert [trial.checkpoint for trial in trials] == ["runs/a/last.ckpt", "timm:resnet18"]
    assert trials[0].factors == {"encoder": "a/last.ckpt"}


def test_longer_training_of_a_level():
    found = study("metamask_table4", "size=smoke", "seeds=[5]")
    epochs = {trial.factors["arm"]: pretraining_config(found, trial).max_epochs for trial in found.trials}
    assert epochs == {"SimCLR": 3, "MetaMask": 1}


def test_smoke_tries_the_first_levels_and_the_last():
    arms = [trial.factors["arm"] for trial in study("icl_msr_table3", "size=smoke", "seeds=[5]").trials]
    assert arms == ["SimCLR", "SimCLR + MSR", "SSL-HSIC"]


def paths_of(found):
    return {
        trial.dataset: tuple(
            str(pretraining_config(found, trial).data.get(key)) for key in ("train_path", "val_path")
        )
        for trial in found.trials
    }


def test_every_data_set_has_its_own_root(tmp_path):
    for folder in ("stl/train", "stl/test", "it's/train2017", "it's/val2017"):
        (tmp_path / folder).mkdir(parents=True)
    roots = [f"roots.stl10={tmp_path}/stl", "roots.cifar100=/c100"]
    arm = "factors.arm=[{label: SimCLR, overrides: ['method=baseline']}]"
    found = paths_of(study("icl_msr_table1", "seeds=[5]", arm, *roots))
    assert found["cifar10"] == ("./datasets", "./datasets")
    assert found["cifar100"] == ("/c100", "/c100")
    assert found["stl10"] == (f"{tmp_path}/stl/train", f"{tmp_path}/stl/test")
    assert found["tiny_imagenet"] == ("./datasets/tiny-imagenet-200",) * 2
    class_folders = [f"roots.{name}={tmp_path}/stl" for name in ("stl10", "cifar10")]
    with pytest.raises(UserError, match="roots.stl10 must be another folder than roots.cifar10"):
        study("icl_msr_table1", "seeds=[5]", arm, *class_folders)
    quoted = "roots.coco='" + f"{tmp_path}/it's'".replace("it's", r"it\'s")
    found = paths_of(study("icl_msr_fig1", "seeds=[5]", quoted))
    assert found == {"coco": (f"{tmp_path}/it's/train2017", f"{tmp_path}/it's/val2017")}
    (tmp_path / "it's/annotations").mkdir()
    trial = study("icl_msr_fig1", "seeds=[5]", quoted).trials[0]
    boxes = pretraining_config(study("icl_msr_fig1", "seeds=[5]", quoted), trial).data["kwargs"]
    assert boxes.val_annotations == f"{tmp_path}/it's/annotations/instances_val2017.json"
    assert paths_of(study("icl_msr_fig5a", "size=digits", "seeds=[5]")) == {None: ("None", "None")}


def test_trials_of_some_data_sets_alone():
    found = study("icl_msr_table1", "datasets=[stl10,cifar10]", "seeds=[5]")
    assert found.datasets == ["cifar10", "stl10"]
    assert [trial.index for trial in found.trials] == list(range(24))
    assert study("icl_msr_table1", "size=digits", "datasets=[stl10]").trials, "embedded data have no root"


def test_one_path_for_one_data_set_alone():
    path = "overrides=['data.train_path=/d','data.val_path=/d']"
    assert set(paths_of(study("metamask_fig6", "factors.alpha=[1]", path)).values()) == {("/d", "/d")}
    assert study("icl_msr_table1", "datasets=[cifar100]", path).datasets == ["cifar100"]
    with pytest.raises(
        UserError, match="overrides must be without paths in a study of several data sets"
    ) as e:
        study("icl_msr_table1", "datasets=[cifar10,cifar100]", path)
    assert "give roots.cifar10=<folder> roots.cifar100=<folder>, or take datasets=[cifar10]" in str(e.value)


def test_the_command_of_a_trial_is_the_trial():
    found = study("metamask_table4", "size=smoke", "seeds=[5]")
    trial = found.trials[0]
    cfg = pretraining_config(found, trial)
    name, *overrides = command(found, trial, cfg).split()[3:]
    by_hand = composed("pretrain", name, *overrides)
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
    assert digest(found, found.trials[0], None) == before, "a date is no content"
    file.write_bytes(b"2")
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
        (["datasets=[cifar]"], "datasets must be one of cifar10, got 'cifar'; did you mean 'cifar10'"),
        (["paper={columns:{metric:[a,b]},alpha:{1:[2]}}"], r"paper, alpha 1 must be 2 numbers, .*got \[2\]"),
        (["paper={metric:3}"], "paper must be a grid like"),
        (["overrides=3"], "overrides must be a list, got 3; give them behind --"),
    ],
)
def test_what_cannot_be_is_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        study("metamask_fig6", *overrides)


def test_an_override_that_does_not_compose_is_one_line():
    found = study("metamask_fig6", "overrides=['backbone.nam=x']")
    with pytest.raises(UserError, match="backbone.nam=x must compose, got") as error:
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
@pytest.mark.parametrize("name", shipped("study"))
def test_every_level_of_every_study_has_a_pretraining_config(name, size):
    found = study(name, f"size={size}", "seeds=[5]")
    trials = one_of_each_level(found.trials)
    digests = [digest(found, trial, pretraining_config(found, trial)) for trial in trials]
    assert len(set(digests)) == len(digests), "two trials of a study train and measure the same"
    if size == "paper":
        assert found.baseline == found.config["baseline"], "the baseline is no level of its factor"
        numbers = reference(None, name)
        assert len(found.paper) == len(numbers), "a number of the paper's belongs to no level"
        assert all({"metric", "value"} < row.keys() for row in found.paper)
