from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningModule
from method_training import quiet_trainer
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.data.datamodule import PretrainDataModule, _check_batches
from metamask_plugin.data.regions import in_region
from metamask_plugin.data.registry import load_dataset
from metamask_plugin.data.splits import MemoryImages
from metamask_plugin.errors import UserError

AUGMENTATIONS = [
    {"rrc": {"enabled": True}, "horizontal_flip": {"prob": 0.5}, "crop_size": 16, "num_crops": 2},
    {"crop_size": 12, "num_crops": 1},
]


def configuration(augmentations=AUGMENTATIONS, batch_size=32, seed=1, **data):
    data = {"dataset": "digits", "kwargs": {"size": 16}, "fraction": 0.1, "num_workers": 0, **data}
    return OmegaConf.create(
        {"data": data, "augmentations": augmentations, "optimizer": {"batch_size": batch_size}, "seed": seed}
    )


def module(**options) -> PretrainDataModule:
    cfg = configuration(**options)
    return PretrainDataModule(load_dataset(cfg.data), cfg)


def batches(data: PretrainDataModule, epoch: int = 0) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def write_folder(root, count=6):
    for name, colour in (("cat", (200, 0, 0)), ("dog", (0, 0, 200))):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 16), colour).save(root / name / f"{i}.{('png', 'jpg')[i % 2]}")
    return str(root)


def folder_options(tmp_path, **options):
    train, test = write_folder(tmp_path / "train"), write_folder(tmp_path / "test", 2)
    return {
        "dataset": "custom",
        "kwargs": {},
        "fraction": -1,
        "train_path": train,
        "val_path": test,
        **options,
    }


def test_workers_see_the_epoch_that_is_set_after_the_iterator_is_made():
    """Lightning's order when a run is resumed."""
    data = module(pipeline="torchvision", num_workers=1)
    (first, *_) = batches(data, epoch=1)
    loader = data.train_dataloader()
    iterator = iter(loader)
    loader.sampler.set_epoch(1)
    indexes, views, _ = next(iterator)
    assert torch.equal(indexes, first[0]) and torch.equal(views[0], first[1][0])


@pytest.mark.parametrize("pipeline", ["kornia", "torchvision"])
def test_batch_structure(pipeline):
    found = batches(module(pipeline=pipeline))
    assert len(found) == 130 // 32
    for indexes, views, targets in found:
        assert indexes.shape == targets.shape == (32,) and indexes.dtype == targets.dtype == torch.int64
        assert [tuple(view.shape) for view in views] == [(32, 3, 16, 16)] * 2 + [(32, 3, 12, 12)]
        assert all(view.dtype == torch.float32 for view in views)


@pytest.mark.parametrize("pipeline", ["kornia", "torchvision"])
def test_indexes_views_and_targets_belong_together(pipeline):
    data = module(pipeline=pipeline, augmentations=[{"crop_size": 16}])
    split = data.dataset.train
    for indexes, (view,), targets in batches(data):
        assert torch.equal(targets, split.labels[indexes])
        assert torch.allclose(view, data.view(split.images[indexes]), atol=1e-5)


def test_both_pipelines_see_the_same_order_which_seed_and_epoch_decide():
    def order(**options):
        epoch = options.pop("epoch", 0)
        return torch.cat([indexes for indexes, _, _ in batches(module(**options), epoch)]).tolist()

    first = order()
    torch.rand(5)
    assert order() == first == order(pipeline="torchvision")
    assert order(epoch=1) != first != order(seed=2)
    assert order(epoch=1, seed=3) != order(epoch=3, seed=1)


def test_pipeline_default_follows_where_the_images_lie(tmp_path):
    assert module().pipeline == "kornia"
    assert module(batch_size=4, **folder_options(tmp_path)).pipeline == "torchvision"


@pytest.mark.parametrize("pipeline", ["kornia", "torchvision"])
@pytest.mark.parametrize("workers", [0, 2])
def test_folders(tmp_path, pipeline, workers):
    data = module(batch_size=4, **folder_options(tmp_path, pipeline=pipeline, num_workers=workers))
    assert isinstance(data.dataset.train, MemoryImages) == (pipeline == "kornia")
    found = batches(data)
    assert len(found) == 3
    red = torch.cat([views[0][:, 0].mean((1, 2)) for _, views, _ in found])
    cat = torch.cat([targets for _, _, targets in found]) == 0
    assert red[cat].min() > red[~cat].max()
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 16, 16) and targets.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("folders", [False, True])
def test_evaluation_is_in_order_and_draws_nothing(tmp_path, folders):
    data = module(batch_size=4, **folder_options(tmp_path)) if folders else module()
    split = data.dataset.test
    state = torch.get_rng_state()
    loader = data.evaluation_loader(split, batch_size=3)
    runs = [[torch.cat(part) for part in zip(*loader, strict=True)] for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    (images, targets), again = runs
    assert images.shape == (len(split), 3, 16, 16) and images.dtype == torch.float32
    assert torch.equal(targets, split.labels)
    assert torch.equal(images, again[0])


def test_custom_takes_mean_and_std_from_the_augmentation(tmp_path):
    augmentations = [{"crop_size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}]
    data = module(batch_size=4, augmentations=augmentations, **folder_options(tmp_path))
    assert data.dataset.mean == (0.1, 0.2, 0.3) and data.dataset.std == (0.5, 0.5, 0.5)
    assert module(augmentations=augmentations).dataset.mean != (0.1, 0.2, 0.3)


def boxed_folders(tmp_path, **options) -> PretrainDataModule:
    """Image files of 20 x 16 pixels, red or blue, whose foreground is the centre."""
    cfg = configuration(
        batch_size=4, augmentations=[{"crop_size": 16}], **folder_options(tmp_path, **options)
    )
    dataset = load_dataset(cfg.data)
    for split in (dataset.train, dataset.test):
        split.boxes = torch.tensor([[6, 4, 14, 12]] * len(split), dtype=torch.int32)
    return PretrainDataModule(dataset, cfg)


def collected(loader) -> list[torch.Tensor]:
    return [torch.cat(part) for part in zip(*loader, strict=True)]


@pytest.mark.parametrize("pipeline", ["kornia", "torchvision"])
@pytest.mark.parametrize("region", ["foreground", "background"])
def test_region_of_image_files(tmp_path, pipeline, region):
    data = boxed_folders(tmp_path, pipeline=pipeline, region=region)
    assert isinstance(data.dataset.train, MemoryImages) == (pipeline == "kornia")
    assert len(batches(data)) == 3
    for images, _ in ((views[0], targets) for _, views, targets in batches(data)):
        removed = images.abs().amax(1) < 0.05
        inside = torch.zeros(16, 16, dtype=torch.bool)
        inside[4:12, 4:12] = True
        assert (removed == (inside if region == "background" else ~inside)).all()
    assert data.full.train.boxes is not None and data.full.train.image(0).size == (20, 16)
    seen = collected(data.val_dataloader())[0]
    assert torch.allclose(seen, collected(data.region_loader("test", region))[0], atol=1e-5)


@pytest.mark.parametrize("region", [None, "full"])
def test_full_region_changes_nothing(region):
    plain = module(dataset="confounded_digits")
    data = module(dataset="confounded_digits", region=region)
    assert torch.equal(data.dataset.train.images, plain.dataset.train.images)
    assert data.dataset.train.boxes is not None
    assert data.full.train is data.dataset.train


def test_custom_mean_is_the_colour_of_what_is_removed(tmp_path):
    augmentations = [{"crop_size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}]
    cfg = configuration(augmentations, 4, **folder_options(tmp_path, region="background"))
    dataset = load_dataset(cfg.data)
    for split in (dataset.train, dataset.test):
        split.boxes = torch.tensor([[0, 0, 20, 16]] * len(split), dtype=torch.int32)
    data = PretrainDataModule(dataset, cfg)
    assert data.full.mean == data.dataset.mean == (0.1, 0.2, 0.3)
    assert collected(data.val_dataloader())[0].abs().max() < 0.01


def test_region_loader_shows_labelled_full_images_whatever_the_region():
    data = module(dataset="confounded_digits", region="background")
    data.full.train.labels[::2] = -1
    labelled = data.full.train.labels >= 0
    for split, keep in (("train", labelled), ("test", slice(None))):
        full = getattr(data.full, split)
        images, targets = collected(data.region_loader(split, "full", batch_size=50))
        assert torch.equal(targets, full.labels[keep]) and (targets >= 0).all()
        assert torch.allclose(images, data.view(full.images[keep]))
        for region, form in (("foreground", "fill"), ("foreground", "zoom"), ("background", "fill")):
            images, _ = collected(data.region_loader(split, region, form))
            seen = getattr(in_region(data.full, region, form), split)
            assert torch.allclose(images, data.view(seen.images[keep]))


def test_region_loader_without_a_test_split(tmp_path):
    data = module(batch_size=4, **folder_options(tmp_path, val_path=None))
    with pytest.raises(UserError, match="must be one with a test split"):
        data.region_loader("test", "full")
    with pytest.raises(UserError, match=r"data\.region must be full"):
        data.region_loader("train", "foreground")


class Recorder(LightningModule):
    """Records what Lightning hands to a method."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.epochs: dict[int, list[int]] = {}
        self.validated = 0

    def training_step(self, batch, batch_idx):
        indexes, views, _ = batch
        self.epochs.setdefault(self.current_epoch, []).extend(indexes.tolist())
        return self.layer(views[0].mean((2, 3))).mean()

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("with_test", [True, False])
def test_lightning_trains_on_it(tmp_path, with_test):
    options = folder_options(tmp_path, pipeline="kornia")
    if not with_test:
        options["val_path"] = None
    data, model = module(batch_size=4, **options), Recorder()
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    for epoch in (0, 1):
        expected = [index for indexes, _, _ in batches(data, epoch) for index in indexes.tolist()]
        assert model.epochs[epoch] == expected
    assert model.epochs[0] != model.epochs[1]
    assert model.validated == (2 * 4 if with_test else 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 131},
            r"optimizer\.batch_size must be at most 130, .* got 131; lower optimizer\.batch_size",
        ),
        (
            {"pipeline": "korni"},
            r"data\.pipeline must be one of kornia, torchvision, .* did you mean 'kornia'",
        ),
        ({"num_workers": -1}, r"data\.num_workers must be a whole number"),
        ({"region": "front"}, r"data\.region must be one of background, foreground, full, got 'front'"),
        (
            {"on_device": True, "pipeline": "torchvision"},
            r"data\.on_device must be False or left out with the pipeline torchvision, .*set data\.pipeline=",
        ),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        module(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_views_are_made_where_the_batch_lies():
    data = module()
    batch = next(iter(data.train_dataloader()))
    batch = data.transfer_batch_to_device(batch, torch.device("cuda"), 0)
    _, views, targets = data.on_after_batch_transfer(batch, 0)
    assert all(view.is_cuda for view in views) and targets.is_cuda


@pytest.mark.fault("config", source="vturrisi/solo-learn#112, RasmussenLab/vamb#425")
@pytest.mark.parametrize(
    ("batch_size", "images", "processes", "pipeline", "limit", "message"),
    [
        (22, 43, 2, "kornia", None, None),  # Lightning's sampler repeats an image
        (23, 43, 2, "kornia", None, "at most 22, the images of one of 2 processes, got 23"),
        (22, 43, 2, "dali", None, "at most 21, the images of one of 2 processes, got 22"),
        (11, 43, 4, "torchvision", None, None),
        (12, 43, 4, "torchvision", None, "at most 11, the images of one of 4 processes, got 12"),
        (10, 43, 1, "kornia", 0.25, None),
        (10, 43, 1, "kornia", 0.1, "share of at least one of the epoch's 4 batches, got 0.1; set limit"),
        (10, 43, 2, "kornia", 0.4, "share of at least one of the epoch's 2 batches, got 0.4; set limit"),
        (10, 43, 1, "kornia", 1, None),
    ],
)
def test_an_epoch_of_every_process_has_a_batch(batch_size, images, processes, pipeline, limit, message):
    expectation = nullcontext() if message is None else pytest.raises(UserError, match=message)
    with expectation:
        _check_batches(batch_size, images, processes, pipeline, limit)
