"""What is understood of a command line before Hydra sees it, and before anything heavy is imported."""

import argparse
import atexit
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.known import BLOCKS, FREE, PARTS, PRECISIONS, as_a_path, keys, names_of, shipped
from metamask_plugin.cli.paths import near_path
from metamask_plugin.errors import UserError, check, choose, nearest, shown
from metamask_plugin.renamed import OLD_NAMES

FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run"),
    *("-r", "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun", "--info", "-i"),
)
"""Hydra's own."""

SWITCHES = ("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m")
"""Those that take no value."""

WITHOUT_CONFIG = ("--hydra-help", "--shell-completion", "-sc", "--info", "-i", "--experimental-rerun")
"""Flags that say something, or complete a word, without a config."""

COMPLETION, SHELLS = ("install", "uninstall", "query"), ("bash", "fish", "zsh")
"""What ``--shell-completion`` can be asked for, one of them, and for whom."""

FIRST = {"pretrain": "metamask_barlow", "linear": "confounded_digits", "study": "metamask_fig6"}
"""Configs that need no data, by kind."""

MUST_BE_THERE = {
    "pretrain": ("data.train_path", "data.val_path", "resume_from_checkpoint"),
    "linear": ("pretrained_feature_extractor", "data.train_path", "data.val_path"),
    "study": ("checkpoint",),
}
"""Keys whose paths must be there, by kind of config."""


def understood(kind: str, words: Sequence[str]) -> list[str]:
    """The words as Hydra is to see them; what stands behind a study's ``--`` as its ``overrides``.

    Args:
        kind: ``pretrain``, ``linear`` or ``study``.
        words: the command line without its command.

    Raises:
        UserError: for an unknown flag, one without its value, a word that is no override, or no config.
    """
    words = with_pretraining_overrides(words) if kind == "study" else list(words)
    flags = check_flags(words)
    if flags.shell_completion:
        _check_completion(flags.overrides)
    if flags.experimental_rerun is not None:
        _check_pickle(Path(flags.experimental_rerun))
    for word in flags.overrides:
        _check_override(kind, word)
    added = [_addable(kind, word) for word in flags.overrides]
    # in front: Hydra's parser takes one group of overrides alone, and a flag's value would be one of them
    words = [*added, *(word for word in words if word not in flags.overrides)]
    folder = flags.config_path
    if folder is not None and "://" not in folder:
        words = [*words, "--config-path", _config_folder(kind, folder)]
    named = flags.config_name
    file = _config_file(named)
    if file is not None and file.is_relative_to((SCRIPTS / kind).resolve()):
        named = file.relative_to((SCRIPTS / kind).resolve()).with_suffix("").as_posix()
        words = [*words, "--config-name", named]
    elif file is not None:
        folder = _as_yaml(file, flags.overrides) if file.suffix == ".json" else file.parent
        flags.config_dir, named = str(folder), file.stem
        words = [*words, "--config-dir", flags.config_dir, "--config-name", named]
    if flags.config_dir and named in shipped(kind) and (Path(flags.config_dir) / f"{named}.yaml").is_file():
        check(False, "--config-name", "another than that of a shipped config", named, "rename your file")
    if named is None and not any(word.partition("=")[0] in WITHOUT_CONFIG for word in words):
        configs = shipped(kind)
        raise UserError(
            f"--config-name must be given, one of {', '.join(configs)}; add --config-name {FIRST[kind]}"
        )
    return words


def _config_file(named: str | None) -> Path | None:
    """The file that ``--config-name`` names by its path: a YAML, or a run's ``args.json`` or folder."""
    path = Path(named or "").resolve()
    path = path / "args.json" if named and path.is_dir() else path
    return path if named and path.is_file() and path.suffix in (".yaml", ".json") else None


def _as_yaml(args: Path, overrides: Sequence[str]) -> Path:
    """A folder with the ``args.json`` of a run as a config that Hydra takes; it goes when the command ends.

    Args:
        args: the file.
        overrides: what is laid over it: keys, and no parts, of which it has none.

    Raises:
        UserError: where the file, or an override, cannot be.
    """
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        remedy = "name the config that the run was started with"
        check(key not in PARTS, key, "left out with a run's args.json", value, remedy)
    try:
        node = json.loads(args.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config-name must be a run's args.json, got {str(args)!r}: {error}") from None
    check(isinstance(node, dict), "--config-name", "a run's args.json", str(args))
    disabled = [{f"override /hydra/{name}": "disabled"} for name in ("hydra_logging", "job_logging")]
    node |= {"defaults": ["_self_", *disabled], "hydra": {"output_subdir": None, "run": {"dir": "."}}}
    folder = Path(tempfile.mkdtemp(prefix="metamask_ssl_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = json.dumps(node, ensure_ascii=False)  # JSON is YAML
    (folder / f"{args.stem}.yaml").write_text(text, encoding="utf-8")
    return folder


def check_flags(words: Sequence[str]) -> argparse.Namespace:
    """Refuses unknown flags, and known ones without their value: Hydra's parser says it in several lines."""
    for word in words:
        name = word.partition("=")[0]
        if not word.startswith("-") or word in ("-", "--"):
            continue
        if name == "--config":
            raise UserError("--config must be --config-name, got --config; write --config-name <name>")
        if not any(flag.startswith(name) for flag in FLAGS):
            hint = nearest(name, FLAGS)
            remedy = f"did you mean {hint!r}?" if hint else "keys are written without dashes: key=value"
            raise UserError(f"a flag must be one of {', '.join(FLAGS)}, got {shown(word)}; {remedy}")
        check("=" not in word or name not in SWITCHES, name, "without a value", word, f"write {name}")
    parser = _Parser(add_help=False)
    for flags in (("--config-name", "-cn"), ("--config-path", "-cp"), ("--config-dir", "-cd")):
        parser.add_argument(*flags)
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    infos = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    parser.add_argument("--info", "-i", nargs="?", choices=infos)
    for flags in (("--package", "-p"), ("--experimental-rerun",)):
        parser.add_argument(*flags)
    parser.add_argument("--shell-completion", "-sc", action="store_true")
    found, rest = parser.parse_known_args(list(words))
    found.overrides = [word for word in rest if not word.startswith("-")]
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"the command line must be complete, got: {message}")


def with_pretraining_overrides(words: Sequence[str]) -> list[str]:
    """Turns what stands behind ``--`` into the study config's ``overrides``, quoted as Hydra wants it."""
    words = list(words)
    if "--" not in words:
        return words
    place = words.index("--")
    for word in words[place + 1 :]:
        _check_override("pretrain", word)
    of_trials = [_addable("pretrain", word) for word in words[place + 1 :]]
    quoted = ",".join("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in of_trials)
    return [*words[:place], f"overrides=[{quoted}]"]


def _check_completion(words: Sequence[str]) -> None:
    asked = [word.partition("=") for word in words if word.startswith(tuple(f"{key}=" for key in COMPLETION))]
    name, found = "--shell-completion", " ".join(words)
    check(len(asked) == 1, name, f"given with one of {', '.join(COMPLETION)}", found, "add install=bash")
    key, _, shell = asked[0]
    choose(f"{name} {key}", shell, SHELLS)
    check(key != "query" or "COMP_LINE" in os.environ, name, "asked by a shell", found, "take install")


def _check_pickle(file: Path) -> None:
    pickled = file.is_file() and file.read_bytes()[:1] == b"\x80"
    remedy = "" if file.exists() else near_path(file)
    check(pickled, "--experimental-rerun", "a config that Hydra has pickled", str(file), remedy)


def _check_override(kind: str, word: str) -> None:
    """What habit writes; a word without ``=`` is a config's name, or a command's, in the wrong place."""
    key, sign, value = word.lstrip("+").partition("=")
    if kind == "pretrain" and key == "method" and value in names_of("task"):
        check(False, key, "metamask, icl_msr or baseline", value, f"write task={value} method=baseline")
    check(bool(key), "an override", "key=value", word)
    if kind != "study" and key in BLOCKS and value not in ("", "null") and value[0] not in "{$":
        check(False, key, "a block of keys", value, f"did you mean {BLOCKS[key]}={value}?")
    if key == "precision" and value.lower() in PRECISIONS:
        check(False, key, "one of Lightning's", value, f"did you mean {PRECISIONS[value.lower()]!r}?")
    if kind == "pretrain" and key in PARTS and (value[:1] in ("[", "{") or value.lower() == "null"):
        options = "a name" if key == "augmentations" else f"one of {', '.join(names_of(key))}"
        check(False, key, options, value, f"write {key}=<name>")
    if sign or word.startswith("~"):
        return
    if word.endswith(".yaml") and Path(word).is_file():
        raise UserError(as_a_path(word))
    if word in ("list", "help"):
        raise UserError(f"an override must be key=value, got {shown(word)}; write --{word}")
    configs = shipped(kind)
    hint = word if word in configs else nearest(word, configs)
    remedy = "" if hint is None else f"did you mean --config-name {hint}?"
    check(False, "an override", "key=value", word, remedy or f"{word}=<value>, or --config-name <config>")


def _addable(kind: str, word: str) -> str:
    """``++key=value`` for a key that there is: it need not stand in the config that it is laid over.

    A value that begins with ``~``, which Hydra takes for one of its signs, is put between quotes.
    """
    key, sign, value = word.partition("=")
    if value.startswith("~"):
        word = f"{key}={value!r}"
    within = any(key == block or key.startswith(f"{block}.") for block in FREE[kind])
    there = [*keys(kind), *(OLD_NAMES if kind == "pretrain" else ())]
    known = within or any(other == key or other.startswith(f"{key}.") for other in there)
    return f"++{word}" if sign and known and key not in PARTS else word


def _config_folder(kind: str, folder: str) -> str:
    """A folder of configs: of the working directory, or one of ours."""
    places = [Path(os.path.expanduser(folder)), SCRIPTS.parent / folder, SCRIPTS.parent.parent / folder]
    for place in (*places, SCRIPTS / kind / folder):
        if place.is_dir():
            return str(place.resolve())
    raise UserError(f"--config-path must be a folder that is there, got {folder!r}; give its whole path")


def early_paths(kind: str, words: Sequence[str]) -> None:
    """Looks, before torch is imported, at the paths on the command line that must be there.

    Raises:
        UserError: for the first that is not.
    """
    given = dict(re.sub(r"^\++", "", word).split("=", 1) for word in words if re.match(r"\+*[a-z_.]+=", word))
    flags = check_flags(words)
    elsewhere = "--cfg" in words or "-c" in words or any(word.startswith("hydra/launcher=") for word in words)
    if (
        elsewhere
        or flags.config_name not in shipped(kind)
        or given.get("data.download", "").lower() == "true"
    ):
        return  # another machine's, or a data set that the run fetches
    known = all(word[0] in "+~" for word in flags.overrides)
    if kind == "linear" and known and "pretrained_feature_extractor" not in given:
        check(False, "pretrained_feature_extractor", "given", None, "add pretrained_feature_extractor=<run>")
    for key in MUST_BE_THERE[kind]:
        value = os.path.expanduser(os.path.expandvars(given.get(key, "").strip("'\"")))
        value = value.rpartition("=")[2] if value.startswith("timm:") else value
        one = value and not any(sign in value for sign in "[]{},$:\\") and value.lower() != "null"
        if one and not Path(value).exists():
            check(False, key, "a path that is there", value, near_path(Path(value)))
