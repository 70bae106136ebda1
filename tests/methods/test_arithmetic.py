"""The floating-point work of a meta step, counted: docs/performance.md says why it is what it is."""

import dataclasses

import pytest
import torch
from method_config import icl_msr_config, method_config
from method_training import shared_pass
from torch.utils.flop_counter import FlopCounterMode

from metamask_plugin.bilevel import Exact, FiniteDifference, FirstOrder, InnerStep, PlainStep, Unrolled
from metamask_plugin.methods import ICLMSR, MetaMask

TRIAL = InnerStep(PlainStep(0.1), PlainStep(0.1))


class NoModules:
    """In place of the counter's record of modules, which fails where a module meets ``autograd.grad``."""

    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def flops(call):
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with counter:
        call()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = MetaMask(method_config("resnet18", 16))
    return model.meta_problem([torch.randn(2, 3, 16, 16) for _ in range(2)])


@pytest.fixture(scope="module")
def shared(problem):
    """The problem where the regular step has been through the encoder already."""
    return dataclasses.replace(problem, encoded=shared_pass(problem))


@pytest.mark.parametrize(
    ("estimator", "forwards"),
    [
        (Exact(), 3 + 3 + 2),
        (Exact(reuse=False), 3 + 3 + 3),
        (FirstOrder(), 3 + 3),
        (FiniteDifference(), 3 + 3 + 1 + 1),
        (Unrolled(), 10.1),  # measured: a double backward has no round number
    ],
)
def test_in_forward_passes_of_the_encoder(problem, estimator, forwards):
    one = flops(lambda: problem.encode(problem.encoder_params))
    # heads and loss are below a tenth of one forward pass
    assert forwards - 0.02 < flops(lambda: estimator.gradient(problem, TRIAL)) / one < forwards + 0.1


def test_where_the_forward_pass_is_shared(problem, shared):
    one = flops(lambda: problem.encode(problem.encoder_params))
    assert 6.98 < flops(lambda: Exact().gradient(shared, TRIAL)) / one < 7.1


def test_with_a_trial_step_on_the_heads_alone(problem, shared):
    one = flops(lambda: problem.encode(problem.encoder_params))
    assert 1 < flops(lambda: Exact().gradient(problem.frozen_encoder(), TRIAL)) / one < 1.1
    assert flops(lambda: Exact().gradient(shared.frozen_encoder(), TRIAL)) / one < 0.1


def test_icl_msr_adds_no_more():
    torch.manual_seed(0)
    model = ICLMSR(icl_msr_config("resnet18", 16, method_kwargs={}))  # the paper's head and f_msr
    views, originals = [torch.randn(2, 3, 16, 16) for _ in range(2)], torch.randn(2, 3, 20, 20)
    problem = model.meta_problem(views, model.regularizer(originals).detach())
    one = flops(lambda: problem.encode(problem.encoder_params))

    def regular():
        feats = [model.backbone(x) for x in views]
        model.regular_loss({"feats": feats}, None, originals)[0].backward()

    assert 3 < flops(regular) / one < 3.1
    # the head and its six strata are a bit more here, at 16 pixels
    assert 8 < flops(lambda: Exact().gradient(problem, TRIAL)) / one < 8.25
    assert flops(lambda: model.regularizer(originals)) / one < 0.01
