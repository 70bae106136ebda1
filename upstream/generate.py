"""Lays both methods into a copy of solo-learn, as its own code, and writes the patch beside it.

    python upstream/generate.py SOLO DEST        # or: make upstream SOLO=... DEST=...

SOLO, a checkout of solo-learn's main branch, is only read. DEST becomes the copy, DEST.patch what differs
from SOLO. Nothing of the result is kept in this repository, and nothing of solo-learn's code: where text of
its own is needed (the licence at the top of a file), it is read from SOLO. docs/upstream.md tells how to
contribute the result.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

from refusal import Refusal
from rewrite import Rewriting, definition
from solo_copy import Copy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FILES = HERE / "files"

LAYOUT = {
    "metamask_plugin/errors.py": "solo/utils/errors.py",
    "metamask_plugin/bilevel": "solo/bilevel",
    "metamask_plugin/losses": "solo/bilevel/losses",
    "metamask_plugin/modules": "solo/bilevel/modules",
    "metamask_plugin/modules/encoders.py": "solo/backbones/conv/encoders.py",
    "metamask_plugin/tasks": "solo/bilevel/tasks",
    "metamask_plugin/methods": "solo/methods",
    "metamask_plugin/methods/base.py": "solo/methods/task_method.py",
    "metamask_plugin/methods/interventional.py": "solo/bilevel/interventional.py",
    "metamask_plugin/methods/presets.py": "solo/bilevel/presets.py",
    "metamask_plugin/host/solo_settings.py": "solo/methods/solo_settings.py",
    "metamask_plugin/host/solo_task.py": "solo/methods/solo_task.py",
    "tests/bilevel": "tests/bilevel",
    "tests/losses": "tests/bilevel/losses",
    "tests/modules": "tests/bilevel/modules",
    "tests/modules/test_encoders.py": "tests/backbones/test_conv.py",
    "tests/tasks": "tests/bilevel/tasks",
    "tests/methods": "tests/methods",
    "tests/method_config.py": "tests/methods/method_config.py",
    "tests/method_training.py": "tests/methods/method_training.py",
    "tests/host/test_solo_task.py": "tests/methods/test_solo_task.py",
}
"""Our path to solo-learn's, a file or all Python files of a folder; the longest that fits counts.

Imports follow: ``metamask_plugin.losses.cmc`` becomes ``solo.bilevel.losses.cmc``.
"""

MODULES = {"metamask_plugin.host.optimizers": "solo.bilevel.optimizers"}
"""Imports of what :data:`LAYOUT` does not carry, and ``files/`` has instead."""

NAMES = {
    ("metamask_plugin.host", "BaseMethod"): "solo.methods.base",
    ("metamask_plugin.host", "METHODS"): "solo.methods",
}
"""Names whose module goes elsewhere than its other names."""

LEFT_BEHIND = {
    "metamask_plugin/methods/__init__.py": "solo/methods/__init__.py has the names instead",
    "metamask_plugin/methods/python.py": "solo-learn's methods take configs",
    "metamask_plugin/methods/supervised.py": "a baseline of our studies",
    "tests/methods/test_supervised.py": "the same",
    "tests/methods/test_release.py": "reads our configs",
}
"""Files in the folders of :data:`LAYOUT` that stay here, with the tests that import them, and why."""

WITHOUT = {
    "tests/host/test_solo_task.py": ["importable"],  # solo-learn is there
    "tests/methods/test_icl_msr.py": ["test_a_level_that_a_timm_encoder_does_not_have"],  # no such backbones
    "tests/methods/test_trial_following.py": ["test_and_of_solo_learns_lars"],  # starts solo-learn beside us
    "tests/tasks/test_ressl_task.py": ["test_the_views_that_it_is_given"],  # reads them with our loader
}
"""Definitions that stay behind, with the imports that nothing else needs."""

FROM_A_CONFIG = [
    (r"cfg: DictConfig \| nn\.Module, \*\*settings: Any", "cfg: DictConfig"),
    (r"super\(\)\.__init__\(cfg, \*\*settings\)", "super().__init__(cfg)"),
    (r'(?s)\n\n    Example:\n.*?(?=\n    """)', ""),
]
"""Solo-learn's methods take a config, and no encoder; the examples hand one over."""

SUBSTITUTIONS = {
    "metamask_plugin/host/solo_task.py": [
        # the check whether solo-learn is there
        (
            r"(?s)    try:\n        from metamask_plugin\.host import solo\b.*?\) from error\n",
            "    from solo.methods import METHODS  # not above: they import this module\n\n",
        ),
        (r"\bsolo\.METHODS\b", "METHODS"),
        (r"Any method of an installed solo-learn", "Any other method"),
        (
            r"UserError: where solo-learn is missing, has no such method, or",
            "UserError: for a name that is not there, or where it",
        ),
    ],
    "tests/host/test_solo_task.py": [
        (r"^from solo_checkout import .*\n", ""),
        (r"^    \*needs_solo_learn,\n", ""),
    ],
    # which host a run was made under
    "metamask_plugin/methods/base.py": [
        (r"^from metamask_plugin import host\n", ""),
        (r"^from metamask_plugin\.methods\.python import .*\n", ""),
        (r"^ *if isinstance\(cfg, nn\.Module\):\n.*\n.*\n", ""),
        (r" Or an encoder\.\n *settings: .*$", ""),
        (r"cfg: DictConfig \| nn\.Module, \*\*settings: Any", "cfg: DictConfig"),
        (r"^ *cfg\.host = host\.name.*\n", ""),
        # names of keys that were never solo-learn's
        (r"^import copy\n", ""),
        (r"^from metamask_plugin\.renamed import .*\n", ""),
        (r"with_new_names\((super\(.*\)\.add_and_assert_specific_cfg\(cfg\))\)$", r"\1"),
        (r"^ *if found is not None:  # of an earlier version\n.*\n", ""),
    ],
    "metamask_plugin/methods/baseline.py": [
        (r"^from torch import nn\n", ""),
        *FROM_A_CONFIG,
    ],
    "metamask_plugin/methods/icl_msr.py": FROM_A_CONFIG,
    # the release's stem, which solo-learn's ResNets have not
    "metamask_plugin/methods/metamask.py": [
        *FROM_A_CONFIG,
        (r"^from metamask_plugin\.host import release_kwargs\n", ""),
        (r"^from omegaconf import DictConfig, OmegaConf$", "from omegaconf import DictConfig"),
        (r'(?s)        if kwargs\.preset == "official":.*?(?=        check\(kwargs\.alpha)', ""),
        (
            r"the release's, what the rest defaults to; of\s+``off.*?pixels;",
            "what the rest defaults to;",
        ),
    ],
    "tests/methods/test_joint_batch.py": [(r'^    "supervised": .*\n', ""), (r", Supervised$", "")],
    # timm's models are no backbones
    "tests/methods/test_icl_msr_gradient.py": [(r'^ *\("test_\w+",.*\),\n', "")],
    "tests/methods/test_metamask_gradient.py": [(r'^ *\("test_\w+",.*\),\n', "")],
    "tests/methods/test_trial_following.py": [(r'(?s)^SOLO_LARS = """.*?^"""\n', "")],
    "tests/methods/test_ddp.py": [(r"(PYTHONPATH.*parents)\[1\]", r"\1[2]")],
}
"""Regular expressions for one file each, before its imports are rewritten; each must match."""

WORDING = [
    (r"[Tt]he host's configuration", "the configuration"),
    (r"[Tt]he host's config\b", "the configuration"),
    (r"The host's, and for either host the schedule", "The base class's, and the schedule"),
    (r"for any host's LARS", "for LARS"),
    (r"torchvision's ResNets, whichever host built them, and", "torchvision's ResNets and"),
    (r"\bthe host\b", "the base class"),
    (r"\bThe host\b", "The base class"),
    (r"solo-learn's way to make", "the way to make"),
    (r"for solo-learn's own loader with every key", "with every key"),
    (r"by which solo-learn's loader, too, tells", "by which the loader tells"),
    (r"Neither host's own\. ", ""),
    (r"a method or a host\b", "a method"),
    (r"every method of this package", "every method on a task"),
    (r"this package's own task", "solo.bilevel's own task"),
    (r"docs/method\.md has", "the docs have"),
    (r": docs/results\.md has numbers", ""),
]
"""What reads differently inside solo-learn."""

TRACES = ("metamask_plugin", "METAMASK_HOST", "docs/method.md", "docs/results.md")
"""What no generated file may contain."""

DATA_SETS = ("cifar", "stl10", "imagenet-100", "imagenet")
"""Folders of scripts/ for data sets that solo-learn loads."""

# (line to find, what goes before it, what goes behind it)
INSERTIONS = {
    "solo/methods/__init__.py": [
        ("from solo.methods.base import BaseMethod", "from solo.methods.baseline import Baseline", ""),
        ("from solo.methods.dino import DINO", "", "from solo.methods.icl_msr import ICLMSR"),
        ("from solo.methods.mae import MAE", "", "from solo.methods.metamask import MetaMask"),
        ('    "barlow_twins": BarlowTwins,', '    "baseline": Baseline,', ""),
        ('    "dino": DINO,', "", '    "icl_msr": ICLMSR,'),
        ('    "mae": MAE,', "", '    "metamask": MetaMask,'),
        ('    "BarlowTwins",', '    "Baseline",', ""),
        ('    "DINO",', "", '    "ICLMSR",'),
        ('    "MAE",', "", '    "MetaMask",'),
    ],
    "solo/methods/base.py": [
        ("    convnext_base,", "    alexnet_conv,\n    alexnet_fc,\n    conv4,", ""),
        (
            '        "wide_resnet28w8": wide_resnet28w8,',
            "",
            '        "conv4": conv4,\n        "conv": alexnet_conv,\n        "fc": alexnet_fc,',
        ),
    ],
    "solo/backbones/__init__.py": [
        (
            "from .convnext import convnext_tiny, convnext_small, convnext_base, convnext_large",
            "from .conv import alexnet_conv, alexnet_fc, conv4",
            "",
        ),
        ('    "wide_resnet28w8",', "", '    "conv4",\n    "alexnet_conv",\n    "alexnet_fc",'),
    ],
    "README.md": [
        (
            "* [DINO](https://arxiv.org/abs/2104.14294)",
            "",
            "* [ICL-MSR](https://arxiv.org/abs/2206.14702)",
        ),
        ("* [MAE](https://arxiv.org/abs/2111.06377)", "", "* [MetaMask](https://arxiv.org/abs/2209.07902)"),
    ],
    "docs/source/index.rst": [
        ("   solo/utils", "", "   solo/bilevel"),
        ("   solo/methods/byol", "   solo/methods/baseline", ""),
        ("   solo/methods/dino", "", "   solo/methods/icl_msr"),
        ("   solo/methods/mae", "", "   solo/methods/metamask"),
        ("   solo/losses/dino", "", "   solo/losses/icl_msr"),
        ("   solo/losses/mae", "", "   solo/losses/metamask"),
        ("   solo/losses/swav", "", "   solo/losses/tasks"),
    ],
    "docs/source/start/available.rst": [
        (
            "* `MoCo-V2 <https://arxiv.org/abs/2003.04297>`_",
            "* `ICL-MSR <https://arxiv.org/abs/2206.14702>`_\n* `MetaMask <https://arxiv.org/abs/2209.07902>`_",
            "",
        ),
    ],
}

REPLACEMENTS = {
    # torch.func, forward-mode AD; get_total_norm; an AdamW that is an Adam
    "requirements.txt": [("torch>=1.10.0", "torch>=2.7"), ("torchvision>=0.11.1", "torchvision>=0.22")],
}


def sources() -> dict[str, str]:
    """Our files and where they go, by :data:`LAYOUT`."""
    found = {}
    for ours, theirs in LAYOUT.items():
        path = ROOT / ours
        if not path.exists():
            raise Refusal(f"{ours} is not there any more; correct LAYOUT in upstream/generate.py")
        if path.is_file():
            found[ours] = theirs
            continue
        for file in sorted(path.rglob("*.py")):
            name = file.relative_to(ROOT).as_posix()
            found.setdefault(name, f"{theirs}/{file.relative_to(path).as_posix()}")
    return {ours: LAYOUT.get(ours, theirs) for ours, theirs in found.items() if not left_behind(ours)}


def left_behind(path: str) -> bool:
    """Whether a file is in :data:`LEFT_BEHIND`, or a test of one that is."""
    modules = [_dotted(other) for other in LEFT_BEHIND if not other.endswith("__init__.py")]
    text = (ROOT / path).read_text() if path.startswith("tests/") else ""
    return path in LEFT_BEHIND or any(f"from {module} import" in text for module in modules)


def modules(paths: dict[str, str]) -> dict[str, str]:
    """The same as module names; tests import their helpers by name alone."""
    table = dict(MODULES)
    for ours, theirs in [*LAYOUT.items(), *paths.items()]:
        name = _dotted(ours).removeprefix("tests.")
        if name.startswith("metamask_plugin.") or name.startswith("method_"):
            table[name] = _dotted(theirs)
    return table


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def lay_in(copy: Copy) -> None:
    """Everything, unformatted."""
    from configs import configs  # brings OmegaConf, which may be as missing as black

    paths = sources()
    rewriting = Rewriting(modules(paths), NAMES, WORDING)
    for ours, theirs in paths.items():
        text = rewriting(
            ours,
            (ROOT / ours).read_text(),
            without=WITHOUT.get(ours, ()),
            substitutions=SUBSTITUTIONS.get(ours, ()),
            deeper=theirs.count("/") - ours.count("/"),
        )
        copy.add(theirs, text)
    for file in sorted(path for path in FILES.rglob("*") if path.is_file()):
        path = file.relative_to(FILES).as_posix().removesuffix(".template")
        text = file.read_text()
        copy.add(path, rewriting(path, with_parts(text)) if path.endswith(".py") else text)
    for path, text in configs(ROOT / "scripts", copy.folder / "scripts", DATA_SETS):
        copy.add(f"scripts/{path}", text)
    for path, insertions in INSERTIONS.items():
        for line, before, behind in insertions:
            new = before or behind
            lines = "\n".join(part for part in (before, line, behind) if part)
            copy.edit(path, line, lines, f"beside which {new.split(chr(10))[0].strip()!r} belongs")
    for path, replacements in REPLACEMENTS.items():
        for old, new in replacements:
            copy.edit(path, old, new, f"in whose place {new!r} belongs")
    copy.packages()


def with_parts(template: str) -> str:
    """Puts definitions of ours in the place of lines ``# <our path>: <name>``."""
    lines = []
    for line in template.splitlines(keepends=True):
        path, _, name = line.removeprefix("# ").strip().partition(".py: ")
        here = line.startswith("# ") and name.isidentifier()
        lines.append(definition((ROOT / f"{path}.py").read_text(), name, f"{path}.py") if here else line)
    return "".join(lines)


def generate(solo: Path, destination: Path) -> Path:
    """Makes DEST and DEST.patch, or nothing at all.

    Args:
        solo: a checkout of solo-learn's main branch.
        destination: a folder that is empty or not there yet.

    Returns:
        The patch.

    Raises:
        Refusal: one line for the user.
    """
    solo, destination = solo.resolve(), destination.resolve()
    if not (solo / "solo" / "methods" / "base.py").exists():
        raise Refusal(f"SOLO must be a checkout of solo-learn's main branch, got {solo}")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise Refusal(f"DEST must be empty or not there yet, got {destination}")
    if solo == destination or solo in destination.parents or destination in solo.parents:
        raise Refusal(f"DEST must lie beside SOLO, not in or around it, got {destination}")
    if importlib.util.find_spec("black") is None:
        raise Refusal("black is missing, with which solo-learn is formatted; pip install black")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=destination.name) as scratch:
        copy = Copy(solo, Path(scratch) / "copy")
        lay_in(copy)
        copy.format()
        copy.check(TRACES)
        if destination.exists():
            destination.rmdir()
        copy.folder.rename(destination)
        copy.folder = destination
    patch = destination.with_name(destination.name + ".patch")
    patch.write_text(copy.patch())
    edited = [path for path in copy.changed if (solo / path).exists()]
    added = len(copy.changed) - len(edited)
    print(f"{destination}: {added} files added, {len(edited)} edited ({', '.join(sorted(edited))})")
    print(f"{patch}: {patch.stat().st_size / 1000:.0f} kB")
    return patch


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python upstream/generate.py SOLO DEST", file=sys.stderr)
        return 2
    try:
        generate(*(Path(argument).expanduser() for argument in arguments))
    except Refusal as refusal:
        print(f"upstream: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
