"""What Hydra says of a command line or a config file, in one line and with exit code 2.

Hydra catches what happens while it composes a config, prints several lines and ends with exit code 1. Its
switch ``HYDRA_FULL_ERROR`` makes it let the exception through, and here it becomes one of our lines. Who sets
the switch himself gets Hydra's tracebacks.

This module imports nothing heavy: ``--help`` and the shell's completion pass through it.
"""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.yaml_aliases import bounded_aliases
from metamask_plugin.errors import UserError, choose, nearest, shown

SWITCH = "HYDRA_FULL_ERROR"

FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run"),
    *("-r", "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
"""Hydra's own."""


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
            check_flags(argv[1:])
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


def check_flags(words: Sequence[str]) -> None:
    """Refuses unknown flags, and known ones without their value: Hydra's parser says it in several lines."""
    for word in words:
        name = word.partition("=")[0]
        if word.startswith("--") and len(word) > 2 and not any(flag.startswith(name) for flag in FLAGS):
            hint = nearest(name, FLAGS)
            remedy = f"did you mean {hint!r}?" if hint else "keys are written without dashes: key=value"
            raise UserError(f"a flag must be one of {', '.join(FLAGS)}, got {shown(word)}; {remedy}")
    parser = _Parser(add_help=False)
    for flags in (("--config-name", "-cn"), ("--config-path", "-cp"), ("--config-dir", "-cd")):
        parser.add_argument(*flags)
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    parser.add_argument("--package", "-p")
    parser.parse_known_args(list(words))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"the command line must be complete, got: {message}")


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
        said = [line for line in str(error).splitlines() if line.strip() and "hydra.cc" not in line]
        reason = said[-1] if said else "nothing"
        return UserError(
            f"the override {shown(error.override)} must be key=value as Hydra reads it, got: {reason}; put "
            "quotes round a value with special characters: \"key='value'\""
        )
    if isinstance(error, yaml.YAMLError):
        return UserError(f"a config file must be valid YAML, got: {error}")
    if isinstance(error, UnicodeDecodeError):
        return UserError(f"a config file must be text in UTF-8, got: {error}")
    override = re.match(r"Could not (?:override|append|delete).*?'([^']+)'", str(error))
    missing = "not in struct" in f"{error} {error.__cause__}"
    if override and missing:
        return _unknown(override.group(1), kind)
    group = re.search(r"No match in the defaults list|Could not find '(?P<name>[^']+)'", str(error))
    cause = "" if error.__cause__ is None else f" ({str(error.__cause__).splitlines()[0]})"
    what = "a group of the config must be overridden by its name" if group else "the config must compose"
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    return UserError(f"{what}, got: {' '.join(lines[:3])}{cause}")


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
    try:
        choose(group or "a config", choice, error.options or ())
    except UserError as told:
        return told
    return UserError(f"{group} must be a config that is there, got {choice!r}")


def _unknown(key: str, kind: str) -> UserError:
    """An override of a key that the config does not have."""
    known = keys(kind)
    if key in known:
        return UserError(f"{key} is a key that this config does not mention: add it with ++{key}=...")
    hint = nearest(key, known) or next(
        (full for full in sorted(known, key=len) if full.rpartition(".")[2] == key.rpartition(".")[2]), None
    )
    remedy = f"did you mean {hint!r}?" if hint else "docs/configuration.md has all keys"
    return UserError(f"a key on the command line must be one of the config's, got {shown(key)}; {remedy}")


def shipped(kind: str) -> list[str]:
    """Names of the configs that ``--config-name`` takes."""
    if kind == "study":
        from metamask_plugin.cli.study import shipped_studies

        return shipped_studies()
    if kind == "linear":
        from metamask_plugin.cli.linear import shipped_configs
    else:
        from metamask_plugin.cli.pretrain import shipped_configs
    return shipped_configs()


def keys(kind: str) -> list[str]:
    """Dotted names of all keys of a kind of config."""
    if kind == "study":
        from metamask_plugin.cli.schema_study import MEASURE_OPTIONS, STUDY

        options = [f"measures.{name}.{key}" for name, keys in MEASURE_OPTIONS.items() for key in keys]
        return [*STUDY, *options]
    if kind == "linear":
        from metamask_plugin.cli.schema_linear import linear_schema

        return list(linear_schema())
    from metamask_plugin.cli.schema import pretraining_schema
    from metamask_plugin.cli.schema_methods import BARE, TASK_KWARGS

    return [
        *("task", "ablation", "setting", "augmentations"),  # groups of configs
        *pretraining_schema(),
        *(f"method_kwargs.{key}" for key in BARE),
        *(f"method_kwargs.task_kwargs.{key}" for key in TASK_KWARGS),
    ]
