"""Heat maps and Gram matrices against loops."""

import math

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.semantics import mean_gram, mean_off_diagonal, weighted_maps

GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = torch.randn(3, 4, 5, generator=GENERATOR)
MAPS = torch.randn(3, 5, 2, 6, generator=GENERATOR)


def test_a_weighted_map_is_the_rectified_sum_over_channels():
    found = weighted_maps(MAPS, WEIGHTS)
    assert found.shape == (3, 4, 2, 6)
    for b in range(3):
        for t in range(4):
            expected = sum(WEIGHTS[b, t, c] * MAPS[b, c] for c in range(5)).clamp(min=0)
            torch.testing.assert_close(found[b, t], expected)


def test_the_gram_matrix_is_the_mean_cosine_over_images():
    found = mean_gram(WEIGHTS * torch.logspace(-3, 3, 4)[:, None])
    for s in range(4):
        for t in range(4):
            cosines = [torch.cosine_similarity(image[s], image[t], dim=0).item() for image in WEIGHTS]
            assert found[s, t].item() == pytest.approx(sum(cosines) / 3, abs=1e-6)


def test_the_mean_outside_the_diagonal_counts_every_pair_once():
    gram = mean_gram(WEIGHTS)
    pairs = [gram[s, t].item() for s in range(4) for t in range(4) if s != t]
    assert mean_off_diagonal(gram) == pytest.approx(sum(pairs) / 12, abs=1e-6)
    assert math.isnan(mean_off_diagonal(torch.ones(1, 1)))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"feature maps must be of shape \(3, 5, h, w\), got \(3, 4, 2, 6\)"):
        weighted_maps(MAPS[:, :4], WEIGHTS)
    with pytest.raises(UserError, match=r"semantic weights must be of shape \(B, n, C\).*got \(4, 5\)"):
        mean_gram(WEIGHTS[0])
    with pytest.raises(UserError, match="one or more of each"):
        mean_gram(WEIGHTS[:0])
