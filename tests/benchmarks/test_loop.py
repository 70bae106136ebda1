"""The loop that benchmarks time is the loop that trains."""

import copy

import pytest
import torch
from loop import Loop
from method_config import baseline_config, method_config, task_settings
from method_training import quiet_trainer
from torch.utils.data import DataLoader

from metamask_plugin.methods import Baseline, MetaMask


def model(**overrides):
    torch.manual_seed(0)
    return MetaMask(method_config(**overrides))


def views(batch=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 32, 32, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"method_kwargs__meta__every_n_steps": 2},
        {"method_kwargs__meta__when": "before_step"},
        task_settings("moco"),
    ],
    ids=["iteration", "every second step", "shared", "target network and queue"],
)
def test_loop_trains_as_lightning_does_to_the_last_bit(overrides):
    by_hand, by_lightning = model(**overrides), model(**overrides)
    loop = Loop(by_hand, views())
    for _ in range(3):
        loop.step()

    samples = [(i, [x[i] for x in views()], i % 10) for i in range(8)] * 3
    trainer = quiet_trainer()
    trainer.fit(by_lightning, DataLoader(samples, batch_size=8))
    start = model(**overrides).state_dict()
    theirs = by_lightning.state_dict()
    for name, ours in by_hand.state_dict().items():
        if name.startswith("task.target") and not torch.equal(ours, theirs[name]):
            continue  # its momentum follows the share of training that is done, and the loop's never ends
        assert torch.equal(ours, theirs[name]), name
    assert not torch.equal(by_hand.mask.weight, start["mask.weight"])


def test_a_cycle_has_one_meta_step():
    method = model(method_kwargs__meta__every_n_steps=4)
    loop = Loop(method, views(4))
    masks = []
    for _ in range(2):
        masks.append(method.mask.weight.clone())
        loop.cycle()
        assert loop.number % 4 == 0
    assert not torch.equal(masks[0], masks[1])
    assert loop.trainer.global_step == 8 and loop.meta_every == 4
    kept = method.mask.weight.clone()
    for _ in range(3):
        loop.step()
    assert torch.equal(method.mask.weight, kept)  # the next one is not due yet


def test_bare_methods_have_cycles_of_one_step():
    torch.manual_seed(0)
    loop = Loop(Baseline(baseline_config()), views(4))
    loop.cycle()
    assert (loop.meta_every, loop.number) == (0, 1)


def test_resident_is_what_remains_between_two_steps():
    loop = Loop(model(), views(4))
    before = sum(t.numel() for t in loop.resident())
    loop.step()
    after = loop.resident()
    trained = sum(p.numel() for p in loop.model.parameters() if p.grad is not None)
    # a gradient and a momentum buffer each; the mask has Adam's two moments and its count
    assert sum(t.numel() for t in after) == before + 2 * trained + 2 * 256 + 1


def test_bf16_is_lightnings_mixed_precision():
    exact, mixed = (copy.deepcopy(model()) for _ in range(2))
    dtypes = []
    mixed.backbone.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    Loop(exact, views(), "float32").step()
    Loop(mixed, views(), "bf16").step()
    assert torch.bfloat16 in dtypes
    assert not torch.equal(exact.backbone.layers[0].weight, mixed.backbone.layers[0].weight)
    assert mixed.backbone.layers[0].weight.dtype == torch.float32
