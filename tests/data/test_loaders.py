import torch
from torch.utils.data import DataLoader, RandomSampler

from metamask_plugin.data.digits import digits
from metamask_plugin.data.loaders import BatchedViews, EpochShuffle, RawBatch, WholeBatches, whole


def test_order_depends_on_seed_and_epoch_only():
    orders = {}
    for seed in (0, 1):
        sampler = EpochShuffle(range(50), seed)
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(sampler)
    assert len(set(orders.values())) == 6
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    resumed = EpochShuffle(range(50), 1)
    resumed.set_epoch(2)
    torch.rand(3)
    assert tuple(resumed) == orders[1, 2]


def test_order_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    list(EpochShuffle(range(10), 0))
    assert torch.equal(torch.get_rng_state(), state)


def test_lightning_takes_it_for_a_shuffling_sampler():
    assert isinstance(EpochShuffle(range(3), 0), RandomSampler)


def test_memory_batches_index_once_a_batch(monkeypatch):
    split = digits(8)[0].subset(range(10))
    calls = []
    fetch = split.batch
    monkeypatch.setattr(split, "batch", lambda indices: calls.append(len(indices)) or fetch(indices))
    batches = list(DataLoader(WholeBatches(split, BatchedViews(split, None).fetch), 4, collate_fn=whole))
    assert calls == [4, 4, 2]
    assert all(isinstance(batch, RawBatch) for batch in batches)
    assert torch.equal(torch.cat([batch.images for batch in batches]), split.images)
    assert torch.equal(torch.cat([batch.targets for batch in batches]), split.labels)
    assert torch.cat([batch.indexes for batch in batches]).tolist() == list(range(10))
