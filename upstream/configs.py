"""Our configs as solo-learn's are: one folder a data set, called from its root with ``--config-path``.

What one chooses from for every data set (``task=byol``, ``setting=...``, ``ablation=...``) lies in
``scripts/pretrain/bilevel``, which each config puts on Hydra's search path. What our own scripts alone
understand is left out, and what all of solo-learn's configs have (``wandb``) comes in.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from refusal import Refusal

SHARED = "bilevel"
GROUPS = ("task", "task_settings", "setting", "ablation")
OURS_ALONE = {"confounded_digits"}
"""Settings for a data set that solo-learn does not have."""

AUGMENTATIONS = {"symmetric": "metamask"}
"""solo-learn has ``symmetric`` with other strengths."""

DROPPED_KEYS = ("evaluation", "wandb", "protocol")
DROPPED_LINES = (r"main_(linear|knn|foreground)\.py", r"data\.train_path may also be", r"docs/\w+\.md")


def configs(ours: Path, theirs: Path, data_sets: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Paths below ``scripts/``, and what the files there say.

    Args:
        ours: our ``scripts/``.
        theirs: solo-learn's, from which ``wandb`` is copied to folders that are new.
        data_sets: names of folders.
    """
    for group in GROUPS:
        for path in sorted((ours / "pretrain" / group).rglob("*.yaml")):
            name = path.relative_to(ours / "pretrain")
            if not OURS_ALONE & set(name.parts):
                yield f"pretrain/{SHARED}/{name}", _shared(path.read_text())
    for data_set in data_sets:
        for path in sorted((ours / "pretrain" / data_set).rglob("*.yaml")):
            group = path.parent.name
            if group == "augmentations":
                name = AUGMENTATIONS.get(path.stem, path.stem)
                yield f"pretrain/{data_set}/augmentations/{name}.yaml", path.read_text()
            elif group == "views":
                yield f"pretrain/{data_set}/views/{path.name}", path.read_text()
            else:
                yield f"pretrain/{data_set}/{path.name}", _pretrain(path.read_text(), path.name)
        for path in sorted((ours / "linear" / data_set).glob("*.yaml")):
            yield f"linear/{data_set}/{path.name}", _linear(path.read_text(), path.name)
        for stage in ("pretrain", "linear"):
            if not (theirs / stage / data_set / "wandb").exists():
                for path in sorted((theirs / "pretrain" / "cifar" / "wandb").glob("private.yaml")):
                    yield f"{stage}/{data_set}/wandb/{path.name}", path.read_text()


def _shared(text: str) -> str:
    for line in DROPPED_LINES:
        text = re.sub(rf"^#.*{line}.*\n", "", text, flags=re.M)
    return _commands(text)


def _pretrain(text: str, name: str) -> str:
    text = _shared(_common(text, name))
    for old, new in AUGMENTATIONS.items():
        text = text.replace(f"- augmentations: {old}\n", f"- augmentations: {new}\n")
    text = re.sub(r"^  searchpath:.*\n", "", text, flags=re.M)
    search = f"  searchpath: [file://scripts/pretrain/{SHARED}] # seen from solo-learn's root\n"
    text = _once(r"^(  run:\n    dir: \.\n)", rf"\1{search}", text, name)
    text = _once(r"^(  - optional views@augmentations: .*\n)", r"\1  - wandb: private.yaml\n", text, name)
    return text.replace("# ours: solo-learn's own schedules are not the paper's", "# the paper's")


def _linear(text: str, name: str) -> str:
    """With a header of its own: ours speaks of ``protocol``, which solo-learn does not have."""
    text = _common(text, name)
    header, body = text[: text.index("defaults:\n")], text[text.index("defaults:\n") :]
    title = header.partition("\n")[0].partition(", with")[0].rstrip(".")
    command = next(line for line in header.splitlines() if "main_linear.py" in line)
    command = command.replace(" pretrained_feature_extractor", " \\\n#       pretrained_feature_extractor")
    body = _once(r"^(  - _self_\n)", r"\1  - wandb: private.yaml\n", body, name)
    return f"{title}.\n#\n{_commands(command)}\n{body}"


def _common(text: str, name: str) -> str:
    text = text.removeprefix("# @package _global_\n")
    for key in DROPPED_KEYS:
        text = re.sub(rf"^{key}:.*\n(?: +.*\n)*", "", text, flags=re.M)
    text = _once(r'^devices: "1"$', "devices: [0]", text, name)
    return _once(r"^accelerator: auto$", 'accelerator: "gpu"', text, name)


def _commands(text: str) -> str:
    """Comments: solo-learn's way to call its scripts."""
    return re.sub(
        r"python main_(pretrain|linear)\.py --config-name ([\w-]+)/(\w+)",
        r"python3 main_\1.py --config-path scripts/\1/\2 --config-name \3.yaml",
        text,
    )


def _once(pattern: str, replacement: str, text: str, name: str) -> str:
    text, count = re.subn(pattern, replacement, text, flags=re.M)
    if count != 1:
        raise Refusal(f"{name}: {count} places for {pattern!r}, expected one; correct upstream/configs.py")
    return text
