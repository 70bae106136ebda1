import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.modules.feature_dropout import FeatureDropout


def dropped(rate, shared=False, shape=(200, 300), views=3):
    torch.manual_seed(0)
    return FeatureDropout(rate, shared)([torch.ones(shape) for _ in range(views)])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_zero_or_scaled_and_the_expectation_stays(rate, shared):
    for view in dropped(rate, shared):
        kept = view[view != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
        assert 1 - kept.numel() / view.numel() == pytest.approx(rate, abs=0.01)
        assert view.mean().item() == pytest.approx(1.0, abs=0.02)


def test_masks_are_drawn_for_each_view_or_once_for_all():
    first, second, third = dropped(0.5)
    # two independent masks agree in half of the entries
    for a, b in ((first, second), (first, third), (second, third)):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=0.01)
    first, *others = dropped(0.5, shared=True)
    assert all(torch.equal(first, view) for view in others)
    assert not torch.equal(first[0], first[1])  # images have masks of their own


@pytest.mark.parametrize("shared", [False, True])
def test_multiplies_the_features(shared):
    feats = [torch.randn(4, 6, requires_grad=True) for _ in range(2)]
    masks = dropped(0.5, shared, (4, 6), views=2)
    torch.manual_seed(0)
    outputs = FeatureDropout(0.5, shared)(feats)
    for h, mask, output in zip(feats, masks, outputs):
        torch.testing.assert_close(output, h * mask)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), h)[0], mask)


@pytest.mark.parametrize(
    "module", [FeatureDropout(0.5).eval(), FeatureDropout(0.0), FeatureDropout(0, shared=True)]
)
def test_evaluation_and_rate_zero_change_nothing(module):
    feats, rng = [torch.randn(4, 6) for _ in range(2)], torch.get_rng_state()
    assert all(torch.equal(output, h) for output, h in zip(module(feats), feats))
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5])
def test_wrong_rate(rate):
    message = rf"method_kwargs.feature_dropout.rate must be in \[0, 1\), got {rate}"
    with pytest.raises(UserError, match=message):
        FeatureDropout(rate)
