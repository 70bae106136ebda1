import pytest
import torch
import torch.nn.functional as F

from metamask_plugin.errors import UserError
from metamask_plugin.modules.feature_queue import FeatureQueue


def filled(size, *pushes):
    torch.manual_seed(0)
    queue = FeatureQueue(size, 3)
    for projections in pushes:
        queue.push(projections)
    return queue


def held(queue):
    """The entries as a set: they are in no particular order."""
    return {tuple(entry) for entry in queue.entries.tolist()}


def unit(projections):
    return {tuple(z) for z in F.normalize(projections, dim=1).tolist()}


def test_starts_with_random_unit_vectors():
    entries = filled(50).entries
    torch.testing.assert_close(entries.norm(dim=1), torch.ones(50))
    assert len(held(filled(50))) == 50


@pytest.mark.parametrize("counts", [[2], [5], [2, 2, 2], [3, 4, 1, 5], [4, 4, 4]])
def test_holds_the_last_k_whatever_the_batches(counts):
    """Of these five entries: never full, full at once, around the end once and several times."""
    torch.manual_seed(1)
    pushes = [torch.randn(count, 3) for count in counts]
    queue = filled(5, *pushes)
    newest = torch.cat(pushes)[-5:]
    untouched = held(queue) - unit(newest)
    assert unit(newest) <= held(queue)
    assert len(untouched) == 5 - len(newest) and untouched <= held(filled(5))
    assert queue.position == sum(counts) % 5


@pytest.mark.parametrize("before", [0, 2])
def test_of_more_than_k_the_last_k_stay(before):
    torch.manual_seed(1)
    first, many, next_one = torch.randn(before, 3), torch.randn(13, 3), torch.randn(1, 3)
    queue = filled(5, first, many)
    assert held(queue) == unit(many[-5:])
    queue.push(next_one)
    assert held(queue) == unit(torch.cat([many[-4:], next_one]))


def test_empty_one_stays_empty():
    queue = filled(0, torch.randn(4, 3))
    assert len(queue) == 0 and queue.entries.shape == (0, 3)


def test_entries_carry_no_gradient_and_have_the_queues_dtype():
    projections = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    queue = filled(5, projections)
    assert not queue.entries.requires_grad and queue.entries.dtype == torch.float32
    assert not list(queue.parameters())


def test_goes_on_from_a_checkpoint():
    torch.manual_seed(1)
    pushes = [torch.randn(3, 3) for _ in range(3)]
    straight = filled(5, *pushes)
    restored = FeatureQueue(5, 3)
    restored.load_state_dict(filled(5, *pushes[:2]).state_dict())
    restored.push(pushes[2])
    torch.testing.assert_close(restored.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [-1, 2.5, "16"])
def test_wrong_size(size):
    with pytest.raises(UserError, match=f"queue_size must be an integer >= 0, got {size!r}"):
        FeatureQueue(size, 3, "queue_size")
