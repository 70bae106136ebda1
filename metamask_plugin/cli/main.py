"""``metamask-ssl``: one command for all that there is to type.

    metamask-ssl pretrain --config-name metamask_barlow
    metamask-ssl knn --pretrained_checkpoint_dir <run>

``python -m metamask_plugin`` is the same; a clone's scripts ``main_*.py`` are a command each. Nothing heavy
is imported before the arguments are understood: help, and a slip, answer at once.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from metamask_plugin import SCRIPTS, __version__
from metamask_plugin.cli import parsers
from metamask_plugin.cli.command_line import FIRST
from metamask_plugin.cli.errors import fail, surviving_output
from metamask_plugin.cli.known import shipped
from metamask_plugin.cli.paths import near_path
from metamask_plugin.errors import nearest, shown

COMMAND = "METAMASK_SSL_COMMAND"
"""Environment variable: the command, for the processes that Lightning starts with the same arguments."""


@dataclass(frozen=True)
class Command:
    """What can be typed behind ``metamask-ssl``.

    Attributes:
        about: what it does, in a line.
        usage: what follows its name.
        run: takes the words behind its name; returns the exit code, or None for 0.
        examples: words behind its name, and what they do.
        config: the kind of config that it takes, if any; such a command's help is written here.
    """

    about: str
    usage: str
    run: Callable[[list[str]], int | None]
    examples: tuple[tuple[str, str], ...] = ()
    config: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; input that can be mended ends it with one line and exit code 2.

    Args:
        argv: the command and its words; by default those of the process.
    """
    with surviving_output():  # of help and lists; a training goes on where its reader ends
        _main(argv)


def _main(argv: Sequence[str] | None) -> None:
    if argv is None:
        started = os.environ.get(COMMAND) if "LOCAL_RANK" in os.environ else None
        argv = sys.argv[1:] if started is None else [started, *sys.argv[1:]]
    name, *words = argv or [""]
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name == "--version":
        print(f"metamask_plugin {__version__}")
        return
    if name in ("-sc", "--shell-completion"):
        _complete(words)
        return
    if name not in COMMANDS:
        _unknown(name)
    command = COMMANDS[name]
    if command.config is not None and any(word in ("-h", "--help") for word in words):
        print(help_of(name))
        return
    if "--list" in words:  # of main_*.py
        command, words = COMMANDS["list"], ["studies"] if name == "study" else []
    if command.config is not None:
        os.environ[COMMAND] = name
    code = command.run(list(words))
    if code:
        raise SystemExit(code)


def _unknown(name: str) -> NoReturn:
    if not name:
        print(overview(), file=sys.stderr)
        raise SystemExit(2)
    config = next((kind for kind in ("pretrain", "linear", "study") if name in shipped(kind)), None)
    hint = f"{config} --config-name {name}" if config else nearest(name, COMMANDS)
    remedy = f"did you mean {hint!r}?" if hint else "--help shows them"
    fail(f"a command must be one of {', '.join(COMMANDS)}, got {shown(name)}; {remedy}")


def _complete(words: list[str]) -> None:
    """Answers a shell: commands and names of configs from here, keys and values from Hydra."""
    if not (words and words[0].startswith("query=")):
        COMMANDS["pretrain"].run(["-sc", *words])  # prints what a shell is to evaluate
        return
    _, *typed = os.environ.get("COMP_LINE", "").split(" ")  # the last one is being typed
    if len(typed) <= 1:
        print("\n".join(COMMANDS))
        return
    name, *typed = typed
    kind = COMMANDS[name].config if name in COMMANDS else None
    if kind is None:
        print("\n".join(parsers.SECTIONS if name == "list" else []))
        return
    config = FIRST[kind]
    if "--config-name" in typed[:-1]:
        place = typed.index("--config-name")
        config = typed[place + 1]
        if len(typed) == place + 2:
            print("\n".join(shipped(kind)))
            return
        del typed[place : place + 2]
    os.environ["COMP_LINE"] = " ".join(["metamask-ssl", *typed])
    COMMANDS[name].run(["--config-name", config, "-sc", *words])


def overview() -> str:
    """What there is, as text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: metamask-ssl <command> [...]",
            "",
            "MetaMask and ICL-MSR: self-supervised learning with exact bi-level updates.",
            "",
            *lines,
            "",
            "metamask-ssl <command> --help says more. The quick start:",
            "metamask-ssl pretrain --config-name metamask_barlow",
        ]
    )


def help_of(name: str) -> str:
    """Usage, examples and configs of a command that takes one."""
    command = COMMANDS[name]
    width = max(len(words) for words, _ in command.examples)
    examples = [f"  metamask-ssl {name} {words:<{width}}  # {what}" for words, what in command.examples]
    return "\n".join(
        [
            f"usage: metamask-ssl {name} {command.usage}",
            "",
            command.about,
            "",
            *examples,
            "",
            f"configs, in {SCRIPTS / command.config}:",
            *(f"  {config}" for config in shipped(command.config)),
            "",
            "--config-dir <folder> adds your own; --cfg job shows what is composed; -m runs a sweep.",
            "docs/keys.md has all keys; metamask-ssl list has what they can name.",
        ]
    )


def _with_config(kind: str, *first: str) -> Callable[[list[str]], None]:
    def run(words: list[str]) -> None:
        from metamask_plugin.cli.hydra_main import run

        run(kind, [*first, *words])

    return run


def _audit(words: list[str]) -> None:
    """A checkpoint without ``checkpoint=`` is one, too."""
    if words and not re.match(r"[+~]*[\w.]+=|-", words[0]):
        words = [f"checkpoint={words[0]!r}", *words[1:]]
    if any(word.startswith(("--config-n", "-cn")) for word in words):
        fail(
            "audit must be given no --config-name: it is the study confounder_audit; metamask-ssl audit <run>"
        )
    if not any(word.lstrip("+").startswith("checkpoint=") for word in words):
        fail("audit must be given a run or checkpoint, got none; metamask-ssl audit <run>")
    _with_config("study", "--config-name", "confounder_audit")(words)


def _with_flags(name: str) -> Callable[[list[str]], int | None]:
    def run(words: list[str]) -> int | None:
        import importlib

        getattr(parsers, name)(words)  # told before anything heavy is imported
        return importlib.import_module(f"metamask_plugin.cli.{name}").main(words)

    return run


def _list(words: list[str]) -> None:
    section = parsers.listing(words).section
    from metamask_plugin.cli.catalogue import catalogue

    print(catalogue(section))


def of_solo_learn(words: list[str]) -> None:
    """Runs one of solo-learn's scripts with our methods registered, which those without Hydra need."""
    import runpy

    if not Path(words[0]).is_file():
        fail(f"the script must be there, got {shown(words[0])}; {near_path(Path(words[0]))}")
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))  # where Python looks first for a script
    import metamask_plugin.methods  # noqa: F401  registers them

    runpy.run_path(words[0], run_name="__main__")


CONFIG = "--config-name <config> [key=value ...] [-m]"

COMMANDS: dict[str, Command] = {
    "pretrain": Command(
        "Train an encoder with MetaMask, ICL-MSR, or a task alone.",
        CONFIG,
        _with_config("pretrain"),
        (
            ("--config-name metamask_barlow", "the quick start: minutes on two cores"),
            ("--config-name metamask_barlow task=byol", "over another task"),
            ("--config-name metamask_barlow -m seed=5,6,7", "one run after the other"),
        ),
        "pretrain",
    ),
    "linear": Command(
        "Train a probe on a frozen encoder, or fine-tune it.",
        CONFIG,
        _with_config("linear"),
        (
            ("--config-name confounded_digits pretrained_feature_extractor=<run>", "a linear probe"),
            ("--config-name confounded_digits pretrained_feature_extractor=<run> head=mlp", "another head"),
        ),
        "linear",
    ),
    "knn": Command(
        "Classify by nearest neighbours.", "--pretrained_checkpoint_dir <run>", _with_flags("knn")
    ),
    "umap": Command("Draw a map of the features.", "--pretrained_checkpoint_dir <run>", _with_flags("umap")),
    "foreground": Command(
        "Test on foregrounds and backgrounds.", "--pretrained_checkpoint_dir <run>", _with_flags("foreground")
    ),
    "audit": Command(
        "Ask which feature dimensions confound a classifier.",
        "<run> [key=value ...] [-- key=value ...]",
        _audit,
        (("<run>", "a report of its dimensions"), ("timm:resnet18=<file>", "of a model of timm's")),
        "study",
    ),
    "study": Command(
        "Reproduce a table or figure of the papers.",
        "--config-name <study> [key=value ...] [-- key=value ...]",
        _with_config("study"),
        (
            ("--config-name metamask_fig6 size=digits", "on the embedded data"),
            (
                "--config-name metamask_fig6 size=digits -- task=byol",
                "what follows -- goes to every training",
            ),
        ),
        "study",
    ),
    "list": Command("List what a command line can name.", "[section]", _list),
    "verify": Command("List images that cannot be read.", "<folder> [...]", _with_flags("verify")),
}
