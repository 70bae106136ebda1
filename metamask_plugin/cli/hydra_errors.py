"""What Hydra says of a command line or a config file, in one line and with exit code 2.

Hydra catches what happens while it composes a config, prints several lines and ends with exit code 1. Its
switch ``HYDRA_FULL_ERROR`` makes it let the exception through, and here it becomes one of our lines. Who sets
the switch himself gets Hydra's tracebacks.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.known import CHOICES, KEYS, PARTS, keys, shipped
from metamask_plugin.errors import UserError, check, choose, nearest, shown

SWITCH = "HYDRA_FULL_ERROR"


@contextmanager
def hydra_errors(kind: str, argv: Sequence[str]) -> Iterator[None]:
    """Around a function that ``hydra.main`` has decorated: errors of composing end with one line.

    Args:
        kind: ``pretrain``, ``linear`` or ``study``: whose configs they are.
        argv: the command line.

    Raises:
        SystemExit: with code 2, for what the user can mend.
    """
    if os.environ.get(SWITCH):
        with one_line_errors():
            yield
        return
    os.environ[SWITCH] = "1"
    try:
        with one_line_errors():
            try:
                with bounded_aliases():
                    yield
            except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
                raise told(error, kind, argv) from None
            except ValueError as error:  # of two flags that exclude each other
                if isinstance(error, UserError) or "--" not in str(error):
                    raise
                raise UserError(f"the command line must be one that Hydra takes, got: {error}") from None
    finally:
        os.environ.pop(SWITCH, None)


def told(error: Exception, kind: str, argv: Sequence[str] = ()) -> UserError:
    """The one line for an exception of Hydra, OmegaConf or YAML.

    Args:
        error: the exception.
        kind: whose configs they are.
        argv: the command line, for the name of the config.
    """
    if isinstance(error, MissingConfigException):
        return _missing(error, kind)
    if isinstance(error, OverrideParseException):
        said = [line for line in str(error).splitlines() if line.strip(" ^") and "hydra.cc" not in line]
        reason = said[-1] if said else "nothing"
        override = shown(str(error.override).lstrip("+"))
        return UserError(
            f"the override {override} must be key=value as Hydra reads it, got: {reason}; put "
            "quotes round a value with special characters: \"key='value'\""
        )
    if isinstance(error, yaml.YAMLError):
        return UserError(f"a config file must be valid YAML, got: {error}")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"a config file must be text in UTF-8, got: {error}")
    ambiguous = re.search(r"Ambiguous value for argument '([^']+)'", str(error))
    if ambiguous:
        several = ambiguous.group(1).lstrip("+")
        return UserError(
            f"{several} must have one value, got several; add -m to run each of them in turn, or put "
            "brackets round a list"
        )
    override = re.match(r"Could not (?:override|append|delete).*?'([^']+)'", str(error))
    unknown_group = re.search(r"No match in the defaults list|Could not find '(?P<name>[^']+)'", str(error))
    if override and ("not in struct" in f"{error} {error.__cause__}" or unknown_group):
        return _unknown(override.group(1), kind, argv)
    cause = "" if error.__cause__ is None else f" ({str(error.__cause__).splitlines()[0]})"
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return UserError(f"the config must compose, got: {' '.join(lines[:3])}{cause}")


def _missing(error: MissingConfigException, kind: str) -> UserError:
    """A config's name, or a group's choice."""
    name = (error.missing_cfg_file or "").removesuffix(".yaml")
    if "primary config" in str(error):
        try:
            choose("--config-name", name, shipped(kind))
        except UserError as told:
            return told
        return UserError(f"--config-name must be found, got {name!r}; check --config-path")
    group, _, choice = name.rpartition("/")
    if group == "hydra/launcher" and choice in LAUNCHERS:
        return UserError(f"{group} must be installed, got {choice!r}; pip install {LAUNCHERS[choice]}")
    known = CHOICES.get(group, {}).get(choice)
    if known in (error.options or ()):
        return UserError(f"{group} must be one of {', '.join(error.options)}, got {choice!r}; take {known!r}")
    try:
        choose(group or "a config", choice, error.options or ())
    except UserError as told:
        return told
    return UserError(f"{group} must be a config that is there, got {choice!r}")


LAUNCHERS = {
    "submitit_slurm": "hydra-submitit-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "joblib": "hydra-joblib-launcher",
    "ray": "hydra-ray-launcher",
    "rq": "hydra-rq-launcher",
}
"""Packages that bring a launcher of Hydra's."""


def _unknown(key: str, kind: str, argv: Sequence[str]) -> UserError:
    """An override of a key that the config does not have."""
    known = keys(kind)
    value = next((word.partition("=")[2] for word in argv if word.lstrip("+").startswith(f"{key}=")), "...")
    if kind == "pretrain" and key in PARTS and value != "...":
        return UserError(f"{key} is a group that this config does not mention: add it with +{key}={value}")
    if key in known:
        return UserError(f"{key} is a key that this config does not mention: add it with ++{key}=...")
    message = f"a key on the command line must be one of the config's, got {shown(key)}"
    if f"{key}/{value}" in shipped(kind):
        return UserError(f"{message}; did you mean --config-name {key}/{value}?")
    if kind == "study" and (key in keys("pretrain") or key.split(".")[0] in ("method_kwargs", "task")):
        return UserError(f"{message}; for the pretraining of every trial, put it behind --: -- {key}={value}")
    hint = KEYS.get(key)
    if hint not in known:
        hint = nearest(key, known) or next(
            (full for full in sorted(known, key=len) if full.rpartition(".")[2] == key.rpartition(".")[2]),
            None,
        )
    remedy = f"did you mean {hint!r}?" if hint else "docs/keys.md has all keys"
    return UserError(f"{message}; {remedy}")


MOST_VALUES = 10_000
"""Values of one file, with every alias unfolded. OmegaConf copies each, some milliseconds apiece."""


@contextmanager
def bounded_aliases() -> Iterator[None]:
    """Within it, ``OmegaConf.load``, which Hydra reads every file with, counts the values first."""
    load = OmegaConf.load

    def counted(file: Any) -> Any:
        if hasattr(file, "seek"):
            text = file.read()
            file.seek(0)
            if "*" in text and "&" in text:
                name = getattr(file, "name", "a config file")
                remedy = "write the values out, or take aliases away"
                values = unfolded(text)
                check(values <= MOST_VALUES, str(name), f"of at most {MOST_VALUES} values", values, remedy)
        return load(file)

    OmegaConf.load = staticmethod(counted)
    try:
        yield
    finally:
        OmegaConf.load = staticmethod(load)


def unfolded(text: str) -> float:
    """How many values a YAML text has with its aliases unfolded; infinity for an alias within itself."""
    known: dict[int, float] = {}

    def count(node: yaml.Node | None) -> float:
        if node is None or isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in known:
            known[id(node)] = float("inf")  # while it is counted
            entries = node.value
            if isinstance(node, yaml.MappingNode):
                entries = [entry for pair in node.value for entry in pair]
            known[id(node)] = sum(map(count, entries))
        return known[id(node)]

    return count(yaml.compose(text, Loader=yaml.SafeLoader))
