"""``scripts/*/base.yaml``: every key, with the model's default."""

import pytest
from composing import composed
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.config import complete, for_method
from metamask_plugin.config import linear
from metamask_plugin.config.linear import Linear
from metamask_plugin.config.methods import ICLMSR, MetaMask
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import keys_of, with_defaults
from metamask_plugin.config.solo_learn import WITHOUT_EFFECT
from metamask_plugin.config.views import LinearView
from metamask_plugin.methods import METHODS
from metamask_plugin.training.experiment import experiment_digest, experiment_of, leaves

PRETRAIN = SCRIPTS / "pretrain"
MODELS = {"pretrain": (Pretraining, WITHOUT_EFFECT), "linear": (Linear, linear.WITHOUT_EFFECT)}
BASE = {kind: OmegaConf.load(SCRIPTS / kind / "base.yaml") for kind in MODELS}
LEFT_OUT = {
    "pretrain": {
        *("method", "backbone.name", "data.dataset", "augmentations"),  # a config must say them
        *("optimizer.name", "optimizer.batch_size", "optimizer.lr", "scheduler.name"),
        *("host", "data.num_classes", "data.num_large_crops", "data.num_small_crops"),  # written by a run
        "dali.device",  # solo-learn's default is the GPU, ours the device of the run
    },
    # null is the training's here, and a value for solo-learn
    "linear": {"data.fraction", *keys_of(LinearView, "data.augmentations.")},
}
each_kind = pytest.mark.parametrize("kind", MODELS)


def _has(kind, key):
    block, _, last = key.rpartition(".")
    return last in (OmegaConf.select(BASE[kind], block, default={}) if block else BASE[kind])


@each_kind
def test_it_has_every_key(kind):
    assert {key for key in keys_of(MODELS[kind][0]) if not _has(kind, key)} == LEFT_OUT[kind]


@pytest.mark.parametrize(("name", "model"), [("metamask", MetaMask), ("icl_msr", ICLMSR)])
def test_a_method_s_base_has_every_key_of_it(name, model):
    kwargs = OmegaConf.load(PRETRAIN / "base" / f"{name}.yaml").method_kwargs
    # what ablation=frozen_mask leaves to the command line, a null would fill in
    known = {key for key in keys_of(model) if not key.startswith("task")} - {"mask.start"}
    missing = {key for key in known if OmegaConf.select(kwargs, key, default="-") == "-"}
    assert not missing


@each_kind
def test_it_has_no_other(kind):
    model, ignored = MODELS[kind]
    found = [key for key, _ in leaves(OmegaConf.to_container(BASE[kind]))]
    found = [key for key in found if not key.startswith(("hydra", "defaults"))]
    ours = (*keys_of(model), *ignored)
    assert not [key for key in found if not any(f"{key}.".startswith(f"{other}.") for other in ours)]


@each_kind
def test_its_values_are_the_defaults(kind):
    model, _ = MODELS[kind]
    defaults = OmegaConf.create(with_defaults(model, {}))
    for key in set(keys_of(model)) - LEFT_OUT[kind]:
        found, default = OmegaConf.select(BASE[kind], key), OmegaConf.select(defaults, key)
        assert found == default or not (found or default), key  # 0 and False are null to solo-learn's own


@pytest.mark.parametrize("name", ["metamask_barlow", "icl_msr_simclr", "imagenet/icl_msr_simclr"])
def test_it_changes_no_run(name):
    """A config says the same with and without the keys that have base.yaml's values."""
    cfg = composed("pretrain", name)
    OmegaConf.set_struct(cfg, False)
    without = cfg.copy()
    for key, value in leaves(OmegaConf.to_container(BASE["pretrain"])):
        block, _, last = key.rpartition(".")
        node = OmegaConf.select(without, block) if block else without
        if OmegaConf.is_dict(node) and last in node and node[last] == value:
            del node[last]
    assert len(without) < len(cfg)
    assert _digest(without) == _digest(cfg)


def _digest(cfg):
    cfg = METHODS[cfg.method].add_and_assert_specific_cfg(for_method(complete(cfg), 10))
    return experiment_digest(experiment_of(cfg, 1, "cpu", "torchvision", images_fingerprint="x"))
