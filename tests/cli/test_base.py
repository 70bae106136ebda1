"""``scripts/pretrain/base.yaml``: every key, and what a config without it means."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.config import DEFAULTS, complete
from metamask_plugin.cli.schema import BLOCKS, REQUIRED, RUN
from metamask_plugin.methods import METHODS
from metamask_plugin.training.experiment import experiment_digest, experiment_of

PRETRAIN = SCRIPTS / "pretrain"
BASE = OmegaConf.load(PRETRAIN / "base.yaml")
OF_SOLO_LEARN = {
    "auto_resume.max_hours",
    "auto_umap.dir",
    "auto_umap.frequency",
    "momentum.base_tau",
    "momentum.final_tau",
}
"""Keys that are solo-learn's alone and for which neither null nor False is the default."""
LEFT_OUT = {
    *REQUIRED,
    *("host", "data.num_classes", "data.num_large_crops", "data.num_small_crops"),  # written by a run
    "dali.device",  # solo-learn's default is the GPU, ours the device of the run
    *OF_SOLO_LEARN,
}


def _has(key):
    *blocks, last = key.split(".")
    node = BASE
    for block in blocks:
        node = node.get(block, {})
    return last in node


def _leaves(node, path=""):
    for key, value in node.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def test_it_has_every_key():
    assert {key for key in {**RUN, **BLOCKS} if not _has(key)} == LEFT_OUT


def test_it_has_no_other():
    node = {key: value for key, value in OmegaConf.to_container(BASE).items() if key not in ("hydra", "defaults")}
    assert {key for key, _ in _leaves(node)} - {"method_kwargs"} <= {**RUN, **BLOCKS}.keys()


def test_its_values_are_the_defaults():
    differing = {key for key, value in DEFAULTS.items() if OmegaConf.select(BASE, key) != value}
    assert differing == {"auto_resume.enabled"}  # on in every config that is shipped


@pytest.mark.parametrize("name", ["metamask_barlow", "icl_msr_simclr", "imagenet/icl_msr_simclr"])
def test_it_changes_no_run(name):
    """A config says the same with and without the keys that have base.yaml's values."""
    with initialize_config_dir(str(PRETRAIN.resolve()), version_base="1.2"):
        cfg = compose(name)
    OmegaConf.set_struct(cfg, False)
    without = cfg.copy()
    for key, value in _leaves(OmegaConf.to_container(BASE)):
        block, _, last = key.rpartition(".")
        node = OmegaConf.select(without, block) if block else without
        if node is not None and last in node and node[last] == value:
            del node[last]
    assert len(without) < len(cfg)
    assert _digest(without) == _digest(cfg)


def _digest(cfg):
    cfg.data.num_classes = 10
    cfg = METHODS[cfg.method].add_and_assert_specific_cfg(complete(cfg))
    return experiment_digest(experiment_of(cfg, 1, "cpu", "torchvision", images_fingerprint="x"))
