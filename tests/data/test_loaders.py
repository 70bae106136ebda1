"""The order of the images, plain loaders, and images on the device, of which only indexes travel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from method_config import method_config
from method_training import quiet_trainer
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, RandomSampler

from metamask_plugin.data import EvaluationView, KorniaViews, evaluation_loader, loaders, training_loader
from metamask_plugin.data.datamodule import PretrainDataModule
from metamask_plugin.data.datasets.digits import digits
from metamask_plugin.data.loaders import BatchedViews, EpochShuffle, RawBatch, WholeBatches, fits, whole
from metamask_plugin.data.registry import load_dataset
from metamask_plugin.methods import MetaMask

CROPPED = {"rrc": {"enabled": True}, "horizontal_flip": {"prob": 0.5}, "crop_size": 16, "num_crops": 2}


def module(augmentation=CROPPED, **data) -> PretrainDataModule:
    data = {"dataset": "digits", "kwargs": {"size": 16}, "fraction": 0.1, "num_workers": 0, **data}
    cfg = {"data": data, "augmentations": [augmentation], "optimizer": {"batch_size": 32}, "seed": 1}
    cfg = OmegaConf.create(cfg)
    return PretrainDataModule(load_dataset(cfg.data), cfg)


def raw_batches(data: PretrainDataModule, epoch: int) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


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


def test_a_plain_loop_sees_the_batches_of_the_data_module():
    data = module()
    views = KorniaViews([CROPPED], data.dataset.mean, data.dataset.std)
    loader = training_loader(data.dataset.train, views, 32, seed=1, device="cpu")
    loader.sampler.set_epoch(2)
    torch.manual_seed(0)
    found = list(loader)
    theirs = data.train_dataloader()
    theirs.sampler.set_epoch(2)
    torch.manual_seed(0)
    for ours, raw in zip(found, theirs, strict=True):
        expected = data.on_after_batch_transfer(raw, 0)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
        assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


def test_a_plain_evaluation_sees_all_images_in_order():
    split = digits(16)[1]
    view = EvaluationView(16, (0.0,) * 3, (1.0,) * 3)
    images, labels = (torch.cat(part) for part in zip(*evaluation_loader(split, view, 64)))
    assert torch.equal(labels, split.labels) and torch.equal(images, split.images / 255)


@pytest.mark.parametrize("epoch", [0, 3])
def test_same_batches_and_views_from_indexes_alone(epoch):
    on_device, on_host = module(on_device=True), module(on_device=False)
    indexes, whole = raw_batches(on_device, epoch), raw_batches(on_host, epoch)
    assert len(indexes) == len(whole) == 4
    assert {type(batch) for batch in indexes} == {torch.Tensor} and {type(b) for b in whole} == {RawBatch}
    for ours, theirs in zip(indexes, whole, strict=True):
        torch.manual_seed(0)
        found = on_device.on_after_batch_transfer(ours, 0)
        torch.manual_seed(0)
        expected = on_host.on_after_batch_transfer(theirs, 0)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
        assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_one_transfer_to_whichever_device_asks():
    split = digits(8)[0]
    images = BatchedViews(split, None, on_device=True)
    here = images._resident(torch.tensor([3, 1]))
    assert torch.equal(here.images, split.images[[3, 1]]) and torch.equal(here.targets, split.labels[[3, 1]])
    assert images._images is split.images  # nothing to copy
    there = images._resident(torch.tensor([3, 1], device="meta"))
    assert {part.device.type for part in there} == {"meta"} and there.images.shape == here.images.shape
    copy = images._images
    images._resident(torch.tensor([0], device="meta"))
    assert images._images is copy
    images.release()
    assert images._images is None


def test_default_is_the_device_where_it_is_a_gpu_with_room(monkeypatch):
    assert {type(batch) for batch in raw_batches(module(), 0)} == {RawBatch}
    split = digits(16)[0]
    assert not fits(split, torch.device("cpu"))
    for free, expected in ((3.1, True), (2.9, False)):
        memory = (int(free * split.images.nbytes), 2**40)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, memory=memory: memory)
        assert fits(split, torch.device("cuda")) == expected
    monkeypatch.setattr(loaders, "SHARE_OF_FREE_MEMORY", 1)
    assert fits(split, torch.device("cuda"))


@pytest.mark.parametrize("when", ["after_step", "epoch_end"])
def test_a_training_is_the_same_bit_for_bit(when):
    """With ``when: epoch_end`` the method itself asks for the epoch's batches once more."""

    def weights(on_device):
        seed_everything(0)
        model = MetaMask(method_config(method_kwargs__meta={"when": when}))
        data = module({**CROPPED, "crop_size": 32}, on_device=on_device)
        trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0, limit_train_batches=2)
        trainer.fit(model, datamodule=data)
        assert data._batched.on_device == on_device
        return model.state_dict()

    found, expected = weights(True), weights(False)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


SCRIPT = """
import torch
from lightning.pytorch import Trainer
from test_datamodule import Recorder
from test_loaders import module

if __name__ == "__main__":
    torch.set_num_threads(1)
    data, model = module(on_device=True), Recorder()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    seen = model.all_gather(torch.tensor([model.epochs[0], model.epochs[1]]))  # process, epoch, image
    if trainer.is_global_zero:
        for epoch in (0, 1):
            print("epoch", epoch, len(seen[0, epoch]), len(set(seen[:, epoch].flatten().tolist())))
        print("another order", not torch.equal(seen[0, 0], seen[0, 1]))
"""


@pytest.mark.slow
def test_two_processes_take_their_shares_each(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
    )
    # 130 images, 65 a process, batches of 32
    for line in ("epoch 0 64 128", "epoch 1 64 128", "another order True"):
        assert line in done.stdout, (done.stdout, done.stderr[-2000:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_sets_live_on_the_gpu():
    data = module()
    loader = data.train_dataloader()
    (batch, *_) = loader
    assert isinstance(batch, torch.Tensor) and batch.is_pinned()
    batch = data.transfer_batch_to_device(batch, torch.device("cuda"), 0)
    indexes, views, targets = data.on_after_batch_transfer(batch, 0)
    assert indexes.is_cuda and targets.is_cuda and all(view.is_cuda for view in views)
    assert torch.equal(targets.cpu(), data.dataset.train.labels[indexes.cpu()])
    data.teardown("fit")
    assert data._batched._images is None
