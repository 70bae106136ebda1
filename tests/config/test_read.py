"""What a model says of a config: one line for the first fault; what it leaves to the defaults."""

from typing import Literal

import pytest

from metamask_plugin.config.fields import Block, Count, FolderName, Keywords, Path, Positive, key
from metamask_plugin.config.methods import TaskKwargs
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import keys_of, read, with_defaults
from metamask_plugin.config.signatures import check_keywords, model_of
from metamask_plugin.errors import UserError
from metamask_plugin.tasks import TASKS

CONFIG = {
    "method": "metamask",
    "backbone": {"name": "conv4"},
    "data": {"dataset": "digits"},
    "optimizer": {"name": "adamw", "batch_size": 64, "lr": 1},
    "scheduler": {"name": "none"},
    "augmentations": [{"crop_size": 32, "num_crops": 2}],
}


class Inner(Block):
    """A block."""

    rate: Positive = key(0.5, "a rate")
    word: Literal["cold", "warm"] = key("cold", "a word")
    free: Keywords = key({}, "handed on")


class Model(Block):
    """A config."""

    name: FolderName = key("run", "a name")
    steps: Count | Literal[-1] = key(-1, "steps")
    sizes: list[Count] | None = key(None, "sizes")
    place: Path | None = key(None, "a place")
    needed: Count = key(..., "a number")
    inner: Inner = Inner()
    perhaps: Inner | None = key(None, "a block, or none")


REFUSED = {
    "an unknown key": ({"stesp": 3}, "a key of the config must be one of .*; did you mean 'steps'\\?"),
    "a key of another block": ({"rate": 1}, "did you mean 'inner.rate'"),
    "a key that is no text": (
        {"inner": {"free": {"a": {1: 2}}}},
        "a block whose keys are text",
    ),
    "an unknown key of what may be null": (
        {"perhaps": {"rat": 1}},
        "a key of perhaps must be one of free, rate",
    ),
    "a value of what may be null": ({"perhaps": {"rate": 0}}, "perhaps.rate must be a number > 0"),
    "nothing": ({"needed": None}, "needed must be set, got None"),
    "text for a number": (
        {"steps": "3"},
        "steps must be an integer >= 1 or -1, got '3'.* write 3 without",
    ),
    "a float for an integer": ({"needed": 4.0}, "needed must be an integer >= 1, got 4.0; write 4"),
    "a switch": ({"needed": True}, "a switch is no number"),
    "too much": ({"needed": 10**10}, "needed must be an integer >= 1 and <= 1000000000"),
    "infinity": ({"inner": {"rate": float("inf")}}, "inner.rate must be a finite number"),
    "zero": ({"inner": {"rate": 0}}, "inner.rate must be a number > 0, got 0"),
    "a word": ({"inner": {"word": "wram"}}, "inner.word must be one of cold, warm, got 'wram'; did you mean"),
    "an entry": ({"sizes": [1, 0]}, r"sizes\.1 must be an integer >= 1, got 0"),
    "no list": ({"sizes": 3}, "sizes must be a list, got 3"),
    "no block": ({"inner": 3}, "inner must be a block of keys, got 3"),
    "a path": ({"name": "a/b"}, "name must be a folder's name without / and .*; set checkpoint.dir"),
    "no path": ({"place": ""}, "place must be a path in one line"),
    "a number in kwargs": ({"inner": {"free": {"a": [float("nan")]}}}, "inner.free must be a finite number"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_fault_is_one_line(fault):
    node, message = REFUSED[fault]
    with pytest.raises(UserError, match=message) as caught:
        read(Model, {"needed": 1, **node})
    assert "\n" not in str(caught.value)


def test_a_key_in_the_wrong_block_is_found_in_others():
    with pytest.raises(UserError, match="did you mean 'elsewhere.alpha'"):
        read(Model, {"needed": 1, "alpha": 1}, also=["elsewhere.alpha"])
    with pytest.raises(UserError, match="block.inner.rate must be"):
        read(Model, {"needed": 1, "inner": {"rate": -1}}, where="block")


def test_values_stay_as_given_and_null_is_the_default():
    found = read(Model, {"needed": 2, "steps": None, "inner": {"rate": 1, "word": None}, "sizes": None})
    assert found == {
        "name": "run",
        "steps": -1,
        "sizes": None,
        "place": None,
        "needed": 2,
        "perhaps": None,
        "inner": {"rate": 1, "word": "cold", "free": {}},
    }
    assert type(found["inner"]["rate"]) is int
    assert read(Model, {"needed": 2, "inner": None}) == read(Model, {"needed": 2})


def test_a_default_is_nobodys_own():
    with_defaults(Inner, {})["free"]["a"] = 1
    assert with_defaults(Inner, {})["free"] == {}


def test_keys_are_dotted():
    assert keys_of(Model, "x.")[5:8] == ["x.inner.rate", "x.inner.word", "x.inner.free"]


TOGETHER = {
    "data.region": ({"data": {"region": "foreground"}}, "data.region must be full for digits"),
    "data.download": ({"data": {"download": True}}, "data.download must be False for digits"),
    "benchmark": ({"benchmark": True, "deterministic": True}, "benchmark must be False with deterministic"),
    "views": ({"augmentations": [{"crop_size": 32}]}, "augmentations must be pipelines .* got 1"),
    "a crop": (
        {"augmentations": [{"crop_size": 32, "num_crops": 2, "rrc": {"crop_max_scale": 0.01}}]},
        r"augmentations.0.rrc.crop_min_scale must be at most crop_max_scale \(0.01\), got 0.08",
    ),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_cannot_be_together(name):
    changes, message = TOGETHER[name]
    node = {**CONFIG, **changes, "data": {**CONFIG["data"], **changes.get("data", {})}}
    read(Pretraining, CONFIG)
    with pytest.raises(UserError, match=message):
        read(Pretraining, node)


def test_a_model_is_frozen():
    with pytest.raises(ValueError):
        Pretraining.model_validate(CONFIG).seed = 6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"temperature": 0}, "task_kwargs.temperature must be a number > 0, got 0"),
        ({"features_dim": 3}, "a key of task_kwargs must be one of bank_size"),
        ({"final_norm": 1}, "task_kwargs.final_norm must be True or False"),
        ({"temperature": None}, "task_kwargs.temperature must be a number > 0, got None"),
    ],
)
def test_keywords_are_those_of_the_signature(given, message):
    with pytest.raises(UserError, match=message):
        check_keywords("task_kwargs", given, TASKS["simclr"], TaskKwargs, ("features_dim",))


def test_null_is_a_keyword_where_the_signature_says_so():
    model = model_of(TASKS["byol"], TaskKwargs, ("features_dim",))
    assert model.model_validate({"pred_hidden_dim": None}).pred_hidden_dim is None
    with pytest.raises(UserError, match="proj_hidden_dim must be an integer >= 1, got None"):
        check_keywords("task_kwargs", {"proj_hidden_dim": None}, TASKS["byol"], TaskKwargs, ("features_dim",))
