"""``scripts/pretrain/base.yaml``: every key, with the model's default."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.config import complete, for_method
from metamask_plugin.config.pretraining import WITHOUT_EFFECT, Pretraining
from metamask_plugin.config.read import keys_of, with_defaults
from metamask_plugin.methods import METHODS
from metamask_plugin.training.experiment import experiment_digest, experiment_of, leaves

PRETRAIN = SCRIPTS / "pretrain"
BASE = OmegaConf.load(PRETRAIN / "base.yaml")
SAID_BY_CONFIGS = {
    *("method", "backbone.name", "data.dataset", "augmentations"),
    *("optimizer.name", "optimizer.batch_size", "optimizer.lr", "scheduler.name"),
}
LEFT_OUT = {
    *SAID_BY_CONFIGS,
    *("host", "data.num_classes", "data.num_large_crops", "data.num_small_crops"),  # written by a run
    "dali.device",  # solo-learn's default is the GPU, ours the device of the run
}


def _has(key):
    block, _, last = key.rpartition(".")
    return last in (OmegaConf.select(BASE, block) if block else BASE)


def test_it_has_every_key():
    assert {key for key in keys_of(Pretraining) if not _has(key)} == LEFT_OUT


def test_it_has_no_other():
    found = [key for key, _ in leaves(OmegaConf.to_container(BASE))]
    found = [key for key in found if not key.startswith(("hydra", "defaults"))]
    ours = (*keys_of(Pretraining), *WITHOUT_EFFECT)
    assert not [key for key in found if not any(f"{key}.".startswith(f"{other}.") for other in ours)]


def test_its_values_are_the_defaults():
    defaults = OmegaConf.create(with_defaults(Pretraining, {}))
    for key in set(keys_of(Pretraining)) - LEFT_OUT:
        assert OmegaConf.select(BASE, key) == OmegaConf.select(defaults, key), key


@pytest.mark.parametrize("name", ["metamask_barlow", "icl_msr_simclr", "imagenet/icl_msr_simclr"])
def test_it_changes_no_run(name):
    """A config says the same with and without the keys that have base.yaml's values."""
    with initialize_config_dir(str(PRETRAIN.resolve()), version_base="1.2"):
        cfg = compose(name)
    OmegaConf.set_struct(cfg, False)
    without = cfg.copy()
    for key, value in leaves(OmegaConf.to_container(BASE)):
        block, _, last = key.rpartition(".")
        node = OmegaConf.select(without, block) if block else without
        if OmegaConf.is_dict(node) and last in node and node[last] == value:
            del node[last]
    assert len(without) < len(cfg)
    assert _digest(without) == _digest(cfg)


def _digest(cfg):
    cfg = METHODS[cfg.method].add_and_assert_specific_cfg(for_method(complete(cfg), 10))
    return experiment_digest(experiment_of(cfg, 1, "cpu", "torchvision", images_fingerprint="x"))
