import pytest
import torch

from metamask_plugin.data.datasets.digits import digits
from metamask_plugin.errors import UserError


def test_shapes_dtypes_and_cut():
    train, test = digits()
    assert train.images.shape == (1297, 3, 32, 32) and test.images.shape == (500, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.classes == [str(i) for i in range(10)]
    counts = torch.bincount(test.labels, minlength=10)
    assert counts.min() >= 48 and counts.max() <= 52
    assert torch.equal(train.images[:, 0], train.images[:, 2])


def test_the_cut_is_fixed_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = digits(8), digits(8)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_native_size_is_the_original():
    train, _ = digits(8)
    levels = (train.images[:, 0].float() * 16 / 255).round()
    assert torch.allclose(levels * 255 / 16, train.images[:, 0].float(), atol=0.51)


@pytest.mark.parametrize("size", [4, 32.5, "big"])
def test_size_is_checked(size):
    with pytest.raises(UserError, match=r"data\.kwargs\.size must be a whole number"):
        digits(size)
