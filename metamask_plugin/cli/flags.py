"""Flags of the scripts that take no config: errors of the command line in one line, too."""

import argparse
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from metamask_plugin.cli.errors import fail
from metamask_plugin.cli.paths import expanded, near_path
from metamask_plugin.errors import nearest


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that ends with one ``error:`` line and exit code 2, and names the nearest flag.

    Args:
        command: its name.
        description: of the command.
    """

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"metamask-ssl {command}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Expands ``~`` and ``$HOME`` in what was given."""
        found = super().parse_args(args, namespace)
        for flag, value in vars(found).items():
            several = isinstance(value, list)
            values = [expanded(entry, f"--{flag}") for entry in (value if several else [value])]
            setattr(found, flag, values if several else values[0])
        return found

    def error(self, message: str) -> NoReturn:
        """What argparse found, without its usage: ``--help`` has that."""
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        if unknown:
            word = next((word for word in unknown.group(1).split() if word.startswith("-")), None)
            flags = [flag for action in self._actions for flag in action.option_strings]
            hint = None if word is None else nearest(word.partition("=")[0], flags)
            message = f"{message}; did you mean {hint!r}?" if hint else f"{message}; --help shows the flags"
        fail(message)


def there(text: str) -> Path:
    """A path that is there."""
    path = Path(expanded(text, "a path"))
    if not path.exists():
        raise argparse.ArgumentTypeError(f"must be a path that is there, got {text!r}; {near_path(path)}")
    return path


def finite(text: str) -> float:
    """A number of the command line; NaN and infinity are none."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def keyword(text: str) -> tuple[str, Any]:
    """``key=value`` of the command line; the value is read as YAML reads it: 3, true, text."""
    key, sign, _ = text.partition("=")
    if not (sign and key.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be like stem=cifar, got {text!r}")
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([text]))[key]
    except Exception:  # of the YAML reader
        raise argparse.ArgumentTypeError(f"must have a value that YAML can read, got {text!r}") from None
