"""The same command finds its own run, and no other's."""

import json

import pytest
from composing import composed
from killed_runs import config, folder_of, read, run_folder
from omegaconf import OmegaConf
from refusals import refused

from metamask_plugin.cli import pretrain
from metamask_plugin.cli.config import complete, for_method
from metamask_plugin.training.experiment import (
    NOT_IN_THE_DIGEST,
    WITHOUT_EFFECT,
    experiment_digest,
    experiment_of,
)

CONFIGS = [
    "metamask_barlow",
    "icl_msr_simclr",
    "cifar/metamask_barlow",
    "cifar/icl_msr_simclr",
    "stl10/metamask_barlow",
]


RESOLVED = (*NOT_IN_THE_DIGEST, "devices", "strategy", "data.pipeline")
"""Keys that count as what they come to, here as given to ``experiment_of``."""


def leaves(node, path=()):
    if isinstance(node, dict):
        return [leaf for key, value in node.items() for leaf in leaves(value, (*path, key))]
    if isinstance(node, list) and node:
        return [leaf for key, value in enumerate(node) for leaf in leaves(value, (*path, key))]
    return [(path, node)]


def other_than(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x"


def completed(name):
    return for_method(complete(composed("pretrain", name, "accelerator=cpu")))


@pytest.mark.fault("auto-resume")
@pytest.mark.parametrize("name", CONFIGS)
def test_whatever_defines_the_run_is_another_run(name, record_property):
    """Every single key of the config, changed alone."""

    def digest(container):
        cfg = OmegaConf.create(container)
        return experiment_digest(experiment_of(cfg, 1, "cpu", "torchvision", "images"))

    container = OmegaConf.to_container(completed(name), resolve=True)
    mine, tried = digest(container), 0
    for path, value in leaves(container):
        changed = json.loads(json.dumps(container))
        node = changed
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = other_than(value)
        key = ".".join(map(str, path))
        same = any(f"{key}.".startswith(f"{other}.") for other in (*WITHOUT_EFFECT, *RESOLVED))
        assert (digest(changed) == mine) == same, key
        tried += 1
    assert tried > 60
    record_property("inputs", tried)
    record_property("tracebacks", 0)


OTHERS = [
    "method_kwargs.alpha=50",
    "++method_kwargs.redundancy.lamb=0.01",
    "method_kwargs.meta.estimator=first_order",
    "task=byol",
    "seed=6",
    "max_epochs=4",
    "scheduler.warmup_epochs=1",
    "scheduler.name=none",
    "augmentations.0.horizontal_flip.prob=0.5",
    "optimizer.weight_decay=0",
    "++data.fraction=0.2",
    "backbone.kwargs.width=8",
    "++precision=64-true",
    "++accumulate_grad_batches=2",
]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run with a checkpoint, unfinished."""
    runs = tmp_path_factory.mktemp("runs")
    folder = pretrain.run(config(runs)).path
    (folder / "finished.json").unlink()
    return runs, folder


@pytest.mark.fault("auto-resume")
@pytest.mark.parametrize("override", OTHERS)
def test_a_neighbour_is_not_gone_on_with(interrupted, override, tmp_path):
    runs, folder = interrupted
    theirs = folder_of(config(runs, override))
    assert theirs != folder and not theirs.exists()


@pytest.mark.fault("auto-resume")
def test_what_only_looks_at_the_run_leaves_it_the_same(interrupted):
    runs, folder = interrupted
    same = config(runs, "++evaluation.knn.k=[1]", "checkpoint.frequency=3", "++checkpoint.every_n_steps=7")
    assert folder_of(same) == folder


@pytest.mark.fault("auto-resume")
def test_files_of_another_run_in_the_folder_are_not_gone_on_with(interrupted, tmp_path, capsys):
    """As after a copy by hand: the folder is right, its checkpoint another seed's."""
    other = pretrain.run(config(tmp_path / "other", "seed=6")).path
    cfg = config(tmp_path / "mine")
    mine = folder_of(cfg)
    mine.mkdir(parents=True)
    (mine / "last.ckpt").write_bytes((other / "last.ckpt").read_bytes())
    assert "seed 6 there, 5 here" in refused(lambda: pretrain.run(cfg.copy()), capsys)
    assert read(mine / "last.ckpt")["global_step"] == 12


@pytest.mark.fault("auto-resume")
def test_a_fresh_start_takes_nobodys_folder(interrupted):
    runs, folder = interrupted
    fresh = folder_of(config(runs), resume=False)
    assert fresh == folder.with_name(f"{folder.name}-2")
    assert run_folder(runs) == folder
