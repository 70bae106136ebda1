import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.modules.dimensional_mask import DimensionalMask


@pytest.mark.parametrize(("parameterisation", "start"), [("free", 1.0), ("sigmoid", 0.5)])
def test_starts_where_the_paper_and_the_release_do(parameterisation, start):
    mask = DimensionalMask(4, parameterisation)
    assert torch.equal(mask.values(), torch.full((4,), start))
    assert torch.equal(mask(torch.ones(2, 3, 4)), torch.full((2, 3, 4), start))


def test_is_no_business_of_the_main_optimiser():
    mask = DimensionalMask(4)
    assert not any(p.requires_grad for p in mask.parameters())
    feats = torch.randn(2, 4, requires_grad=True)
    mask(feats).sum().backward()
    assert all(p.grad is None for p in mask.parameters())


def test_statistics():
    mask = DimensionalMask(4)
    mask.weight.copy_(torch.tensor([0.0, 1.0, 1.0, 2.0]))
    stats = {name: float(value) for name, value in mask.statistics().items()}
    assert stats == pytest.approx(
        {"mask_mean": 1.0, "mask_std": 0.5**0.5, "mask_min": 0.0, "mask_max": 2.0, "mask_below_average": 0.25}
    )


def test_wrong_parameterisation():
    with pytest.raises(UserError, match="must be one of free, sigmoid"):
        DimensionalMask(4, "softmax")


def test_starts_at_whole_numbers_and_at_nothing_else_than_finite_ones():
    assert DimensionalMask(3, start=[1, 0, 2]).statistics()["mask_mean"] == 1
    for start, message in (
        ([1.0, float("nan"), 1.0], "must be of finite weights"),
        ("runs/one", "must be a list of weights"),
    ):
        with pytest.raises(UserError, match=message):
            DimensionalMask(3, start=start)
