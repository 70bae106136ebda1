"""The methods laid into solo-learn: self-contained, formatted, and they train there."""

import ast
import filecmp
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from solo_checkout import REPOSITORY, ROOT, needs_solo_learn

pytest.importorskip("black", reason="the generated files are formatted with black: pip install black")
pytestmark = needs_solo_learn

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("metamask_plugin", "hydra_plugins"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


def generate(solo, destination, *flags):
    command = [
        sys.executable,
        *flags,
        str(REPOSITORY / "upstream" / "generate.py"),
        str(solo),
        str(destination),
    ]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The generated copy of solo-learn."""
    folder = tmp_path_factory.mktemp("upstream") / "solo-learn"
    done = generate(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert f"{folder}.patch: " in done.stdout
    return folder


@pytest.fixture(scope="module")
def inside(copy, tmp_path_factory):
    """Runs Python in the copy, where this package cannot be imported."""
    block = tmp_path_factory.mktemp("block")
    (block / "sitecustomize.py").write_text(BLOCK)

    def run(*arguments):
        env = {key: value for key, value in os.environ.items() if key != "METAMASK_HOST"}
        env |= {
            "PYTHONPATH": f"{block}{os.pathsep}{copy}",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=copy, timeout=600
        )

    return run


def added(copy, suffix=""):
    """Paths in the patch of files that solo-learn does not have."""
    paths = re.findall(r"^diff --git a/(\S+) b/\S+\nnew file", patch(copy).read_text(), flags=re.M)
    return [path for path in paths if path.endswith(suffix)]


def patch(copy):
    return copy.with_name(copy.name + ".patch")


def pristine(folder):
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "__pycache__"))


def test_nothing_of_this_package_is_left_and_solo_learns_licence_is_on_every_file(copy):
    text = patch(copy).read_text()
    assert not re.search(r"^\+.*(metamask_plugin|METAMASK_HOST)", text, flags=re.M)
    licence = (ROOT / "solo/methods/__init__.py").read_text().partition("\nfrom ")[0].strip()
    assert len(licence) > 1000
    files = added(copy, ".py")
    assert len(files) > 100
    assert all((copy / path).read_text().startswith(licence) for path in files)
    assert licence not in "".join(path.read_text() for path in (REPOSITORY / "upstream").rglob("*.*"))


def test_new_files_are_formatted_as_solo_learns(copy):
    files = [str(copy / path) for path in added(copy, ".py")]
    done = subprocess.run(
        [sys.executable, "-m", "black", "--check", "-l", "100", *files], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_no_docstring_or_comment_is_wider_than_the_code(copy):
    for path in added(copy, ".py"):
        for line in (copy / path).read_text().splitlines():
            formula = "  " in line.strip()
            string = '"' in line or "'" in line or path.endswith("test_ddp.py")  # a script in a string
            assert len(line) <= 100 or formula or string, f"{path}: {line}"


def test_new_files_run_on_every_python_that_solo_learn_supports(copy):
    """3.8: annotations are not evaluated, and nothing else subscripts a built-in type."""
    for path in added(copy, ".py"):
        tree = ast.parse((copy / path).read_text(), feature_version=(3, 8))
        annotations = [
            annotation
            for node in ast.walk(tree)
            for field in ("annotation", "returns")
            if (annotation := getattr(node, field, None)) is not None
        ]
        postponed = any(getattr(node, "module", None) == "__future__" for node in tree.body)
        assert postponed or not annotations, path
        inside = {id(node) for annotation in annotations for node in ast.walk(annotation)}
        for node in ast.walk(tree):
            name = getattr(getattr(node, "value", None), "id", None)
            builtin = isinstance(node, ast.Subscript) and name in {"dict", "list", "tuple", "type", "set"}
            assert not builtin or id(node) in inside, f"{path}:{node.lineno}"
            assert getattr(node, "attr", None) != "removeprefix", f"{path}:{node.lineno}"


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
from solo.methods import METHODS, Baseline, ICLMSR, MetaMask
from solo.methods.base import BaseMethod
assert not any(name.startswith("metamask_plugin") for name in sys.modules)
assert METHODS["baseline"] is Baseline and METHODS["icl_msr"] is ICLMSR and METHODS["metamask"] is MetaMask
assert issubclass(MetaMask, BaseMethod) and len(METHODS) == len(set(METHODS.values()))
print("imported", len(sys.argv) - 1)
"""


def test_every_new_file_imports_without_this_package(copy, inside):
    files = added(copy, ".py")
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in files]
    done = inside("-c", IMPORT_ALL, *names)
    assert f"imported {len(files)}" in done.stdout, done.stderr[-2000:]


FIRST = """
import importlib, sys
for first in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "solo"]:
        del sys.modules[name]
    importlib.import_module(first)
    print("first", first)
"""


@pytest.mark.slow
def test_imports_have_no_cycle_whichever_comes_first(inside):
    names = [f"solo.{name}" for name in ("methods.task_method", "methods.solo_task", "bilevel.tasks")]
    done = inside("-c", FIRST, *names, "solo.backbones.conv", "solo.methods.meta_step")
    assert done.stdout.count("first solo.") == 5, done.stderr[-2000:]


@pytest.mark.slow
def test_the_new_tests_pass_there(inside):
    quick = "not resnet and not fc and not imagenet and not training"
    done = inside(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({quick}) or configs"),
        "tests/bilevel/test_quadratic.py",
        "tests/bilevel/losses",
        "tests/bilevel/tasks/test_byol_task.py",
        "tests/bilevel/tasks/test_ressl_task.py",
        "tests/methods/test_metamask_gradient.py",
        "tests/methods/test_bilevel_training.py",
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 200


def test_the_patch_makes_a_pristine_copy_the_same(copy, tmp_path):
    folder = pristine(tmp_path / "pristine")
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    done = subprocess.run(
        ["git", "apply", str(patch(copy))], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path in re.findall(r"^diff --git a/(\S+)", patch(copy).read_text(), flags=re.M):
        assert filecmp.cmp(folder / path, copy / path, shallow=False), path
    assert not list(folder.rglob("*.rej"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight random images in two classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(8):
        (folder / f"{index % 2}").mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index % 2}" / f"{index}.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "overrides", "meta"),
    [
        ("metamask_barlow", [], "mask.weight"),
        ("icl_msr_simclr", ["task=byol", "ablation=per_epoch"], "regularizer.to_weights.weight"),
    ],
)
def test_solo_learns_script_trains(inside, images, tmp_path, config, overrides, meta):
    done = inside(
        "main_pretrain.py",
        *("--config-path", "scripts/pretrain/cifar", "--config-name", config),
        *("data.dataset=custom", f"data.train_path={images}", f"data.val_path={images}"),
        *("data.num_workers=0", "optimizer.batch_size=4", "max_epochs=1", f"checkpoint.dir={tmp_path}"),
        *("accelerator=cpu", "devices='1'", "wandb.enabled=False", "++enable_progress_bar=False"),
        *("method_kwargs.task_kwargs.proj_hidden_dim=32", *overrides),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.rglob("*.ckpt")
    state = torch.load(path, weights_only=False)
    assert state["global_step"] == 2
    assert meta in state["state_dict"], [key for key in state["state_dict"] if "backbone" not in key]
    assert state["meta_optimizer"]["state"], "no meta step was made"


OTHERS = {"evaluation", "wandb", "accelerator", "devices", "defaults", "hydra"}
"""What our scripts and solo-learn's have differently."""


@pytest.mark.parametrize("data_set", ["cifar", "stl10", "imagenet-100", "imagenet"])
@pytest.mark.parametrize("name", ["metamask_barlow", "icl_msr_simclr"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["task=byol"],
        ["task=dcl", "setting=metamask_table1"],
        ["task=ressl", "method=baseline"],
        ["ablation=no_meta"],
    ],
    ids=str,
)
def test_configs_say_the_same_as_ours(copy, monkeypatch, data_set, name, overrides):
    configs = []
    for root, folder, config in (
        (REPOSITORY, "scripts/pretrain", f"{data_set}/{name}"),
        (copy, f"scripts/pretrain/{data_set}", name),
    ):
        monkeypatch.chdir(root)
        with initialize_config_dir(str(root / folder), version_base="1.2"):
            configs.append(OmegaConf.to_container(compose(config, overrides), resolve=True))
    base = OmegaConf.load(REPOSITORY / "scripts" / "pretrain" / "base.yaml")
    laid_over = [configs[0], OmegaConf.to_container(OmegaConf.merge(base, configs[1]))]
    ours, theirs = ({key: value for key, value in c.items() if key not in OTHERS} for c in laid_over)
    assert ours == theirs
    assert configs[1]["wandb"].keys() == {"enabled", "entity", "project"} and configs[1]["devices"] == [0]


def test_a_linear_config_has_only_what_solo_learns_script_knows(copy):
    for path in sorted((copy / "scripts" / "linear").glob("*/*.yaml")):
        cfg = OmegaConf.load(path)
        assert "protocol" not in cfg and cfg.pretrain_method, path
        assert "protocol" not in path.read_text()
        if path.stem in ("metamask_barlow", "icl_msr_simclr"):
            assert (
                f"--config-path scripts/linear/{path.parent.name} --config-name {path.name}"
                in path.read_text()
            )


def refused(done):
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert f"DEST must be empty or not there yet, got {tmp_path}" in refused(generate(ROOT, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("where", ["", "inside"])
def test_a_destination_in_the_checkout_is_refused(tmp_path, where):
    solo = tmp_path / "solo-learn"
    (solo / "solo" / "methods").mkdir(parents=True)
    (solo / "solo" / "methods" / "base.py").touch()
    assert "DEST must" in refused(generate(solo, solo / where))


def test_what_is_no_checkout_is_refused(tmp_path):
    assert f"SOLO must be a checkout of solo-learn's main branch, got {tmp_path}" in refused(
        generate(tmp_path, tmp_path / "new")
    )


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("solo/methods/__init__.py", "from solo.methods.mae import MAE"),
        ("docs/source/index.rst", "   solo/methods/dino"),
        ("README.md", "* [MAE](https://arxiv.org/abs/2111.06377)"),
    ],
)
def test_a_place_that_is_gone_is_named_and_nothing_is_made(tmp_path, path, line):
    solo = pristine(tmp_path / "solo-learn")
    text = (solo / path).read_text()
    assert f"{line}\n" in text
    (solo / path).write_text(text.replace(f"{line}\n", ""))
    message = refused(generate(solo, tmp_path / "new"))
    assert f"{path}: no line {line.strip()!r}" in message and "upstream/generate.py" in message
    assert [found.name for found in tmp_path.iterdir()] == ["solo-learn"]


def test_a_file_of_solo_learns_is_never_overwritten(tmp_path):
    solo = pristine(tmp_path / "solo-learn")
    (solo / "solo/methods/metamask.py").write_text("theirs = True\n")
    assert "solo/methods/metamask.py is in solo-learn already" in refused(generate(solo, tmp_path / "new"))


def test_without_black_it_says_so(tmp_path):
    message = refused(generate(ROOT, tmp_path / "new", "-S"))
    assert message == "upstream: black is missing, with which solo-learn is formatted; pip install black"
    assert not (tmp_path / "new").exists()
