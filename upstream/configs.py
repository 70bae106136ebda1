"""Our configs as solo-learn's are: one folder a data set, called from its root with ``--config-path``.

What one chooses from for every data set (``task=byol``, ``setting=...``, ``ablation=...``) lies in
``scripts/pretrain/bilevel``, which each config puts on Hydra's search path. What our own scripts alone
understand is left out, and what all of solo-learn's configs have (``wandb``) comes in.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

SHARED = "bilevel"
GROUPS = ("task", "setting", "ablation")
OURS_ALONE = {"confounded_digits"}
"""Settings for a data set that solo-learn does not have."""

AUGMENTATIONS = {"symmetric": "metamask"}
"""solo-learn has ``symmetric`` with other strengths."""

FROM_LINEAR_BASE = (
    *("pretrained_feature_extractor", "optimizer.weight_decay", "max_epochs", "strategy", "precision"),
    *("checkpoint.enabled", "checkpoint.dir", "checkpoint.frequency", "auto_resume.enabled"),
)
FROM_BASE = (
    *("data.format", "optimizer.classifier_lr"),
    *("checkpoint.enabled", "checkpoint.dir", "checkpoint.frequency", "auto_resume.enabled"),
    *("resume_from_checkpoint", "seed", "strategy", "precision", "num_nodes", "accumulate_grad_batches"),
    *("performance.compile", "performance.cuda_graph", "performance.matmul_precision"),
)
"""What of ``scripts/pretrain/base.yaml`` each config says itself there; the rest is solo-learn's default."""

WANDB = {"wandb": "private.yaml"}
OTHERS = {"accelerator": "gpu", "devices": [0]}
"""What all of solo-learn's configs have so, and ours otherwise."""

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
            yield f"pretrain/{SHARED}/{path.relative_to(ours / 'pretrain')}", _shared(path.read_text())
    for section, tasks in OmegaConf.load(ours / "pretrain" / "base" / "task_settings.yaml").items():
        for task, settings in tasks.items():
            if section not in OURS_ALONE:
                text = f"# @package method_kwargs\n{OmegaConf.to_yaml(settings)}"
                yield f"pretrain/{SHARED}/task_settings/{section}/{task}.yaml", text
    for data_set in data_sets:
        for path in sorted((ours / "pretrain" / data_set).rglob("*.yaml")):
            group = path.parent.name
            if group == "augmentations":
                name = AUGMENTATIONS.get(path.stem, path.stem)
                yield f"pretrain/{data_set}/augmentations/{name}.yaml", path.read_text()
            elif group == "views":
                yield f"pretrain/{data_set}/views/{path.name}", path.read_text()
            else:
                yield f"pretrain/{data_set}/{path.name}", _pretrain(path, ours / "pretrain")
        for path in sorted((ours / "linear" / data_set).glob("*.yaml")):
            yield f"linear/{data_set}/{path.name}", _linear(path, ours / "linear")
        for stage in ("pretrain", "linear"):
            if not (theirs / stage / data_set / "wandb").exists():
                for path in sorted((theirs / "pretrain" / "cifar" / "wandb").glob("private.yaml")):
                    yield f"{stage}/{data_set}/wandb/{path.name}", path.read_text()


def _shared(text: str) -> str:
    for line in DROPPED_LINES:
        text = re.sub(rf"^#.*{line}.*\n", "", text, flags=re.M)
    return _commands(text)


def _pretrain(path: Path, root: Path) -> str:
    """One file in the place of three: solo-learn's configs stand alone."""
    own, base = OmegaConf.load(path), OmegaConf.load(root / "base.yaml")
    method = OmegaConf.load(root / f"{own.defaults[0].removeprefix('/')}.yaml")
    (_, task, *overrides), (_, _, *first), (_, _, *then) = (
        node.pop("defaults") for node in (base, method, own)
    )
    for entry in then:
        if entry.get("augmentations") in AUGMENTATIONS:
            entry.augmentations = AUGMENTATIONS[entry.augmentations]
    cfg = OmegaConf.merge({"name": None, "method": None, "backbone": None}, method, own)  # in this order
    _fill(cfg, base, FROM_BASE)
    base.hydra.searchpath = [f"file://scripts/pretrain/{SHARED}"]
    return _shared(_header(path)) + _alone(
        [task, "_self_", *first, *then, WANDB, *overrides], base.hydra, cfg
    )


def _linear(path: Path, root: Path) -> str:
    """With a header of its own: ours speaks of ``protocol``, which solo-learn does not have."""
    title, *lines = _header(path).splitlines()
    command = next(line for line in lines if "main_linear.py" in line)
    command = command.replace(" pretrained_feature_extractor", " \\\n#       pretrained_feature_extractor")
    cfg, base = OmegaConf.load(path), OmegaConf.load(root / "base.yaml")
    _, *overrides = base.defaults
    del cfg["defaults"]
    _fill(cfg, base, FROM_LINEAR_BASE)
    body = _alone(["_self_", WANDB, *overrides], base.hydra, cfg)
    return f"{title.partition(', with')[0].rstrip('.')}.\n#\n{_commands(command)}\n{body}"


def _fill(cfg: DictConfig, base: DictConfig, keys: tuple[str, ...]) -> None:
    for key in keys:
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, OmegaConf.select(base, key), force_add=True)


def _header(path: Path) -> str:
    return path.read_text().partition("defaults:\n")[0].removeprefix("# @package _global_\n")


def _alone(defaults: list[Any], hydra: DictConfig, cfg: DictConfig) -> str:
    content = {key: value for key, value in {**cfg, **OTHERS}.items() if key not in DROPPED_KEYS}
    return "\n".join(OmegaConf.to_yaml(part) for part in ({"defaults": defaults}, {"hydra": hydra}, content))


def _commands(text: str) -> str:
    """Comments: solo-learn's way to call its scripts."""
    return re.sub(
        r"python main_(pretrain|linear)\.py --config-name ([\w-]+)/(\w+)",
        r"python3 main_\1.py --config-path scripts/\1/\2 --config-name \3.yaml",
        text,
    )
