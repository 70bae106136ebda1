"""``data.format: dali``: the views against torchvision's, the batches, and what Lightning makes of them."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_image

from metamask_plugin.cli import pretrain
from metamask_plugin.data import (
    FolderImages,
    PretrainDataModule,
    TorchvisionViews,
    load_dataset,
    parse_augmentations,
)
from metamask_plugin.errors import UserError
from metamask_plugin.training.callbacks import Progress

pytest.importorskip("nvidia.dali", reason="no NVIDIA DALI: pip install nvidia-dali-cuda130")

from metamask_plugin.data.dali import DaliBatches

ROOT = Path(__file__).resolve().parents[2]
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and std that leave pixels in [0, 1]
SIZE = 48
JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
AUGMENTATIONS = [
    {
        "rrc": {"enabled": True},
        "color_jitter": {"prob": 0.8, **JITTER},
        "grayscale": {"prob": 0.2},
        "gaussian_blur": {"prob": 0.5},
        "horizontal_flip": {"prob": 0.5},
        "crop_size": 32,
        "num_crops": 2,
    },
    {"crop_size": 24},
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of 13 JPEGs each, none of the same size, cut from scikit-learn's two photographs."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name in ("china", "flower"):
        photograph = Image.fromarray(load_sample_image(f"{name}.jpg"))
        (root / name).mkdir()
        for index in range(13):
            width, height = rng.integers(60, 200, 2)
            left, top = rng.integers(0, photograph.width - width), rng.integers(0, photograph.height - height)
            patch = photograph.crop((left, top, left + width, top + height))
            patch.save(root / name / f"{index:02}.jpg", quality=90)
    return root


@pytest.fixture(scope="module")
def split(photographs):
    return FolderImages(photographs)


def drawn(split, entry, times=1):
    """DALI's views of one entry, pixels in [0, 1], each image so many times; and the images they are of."""
    often = split.subset(torch.arange(len(split)).repeat(times))
    entries = parse_augmentations([{"crop_size": SIZE, **entry}])
    views, indexes = [], []
    for found, (view,), _ in DaliBatches(often, entries, *RAW, len(split), seed=1):
        views.append(view)
        indexes.append(found % len(split))
    return torch.cat(views), torch.cat(indexes)


def torchvisions(split, entry, indexes):
    torch.manual_seed(0)
    views = TorchvisionViews([{"crop_size": SIZE, **entry}], *RAW)
    return torch.stack([views(split.image(index))[0] for index in indexes.tolist()])


@pytest.mark.parametrize("size", [24, SIZE, 111, 224])
def test_the_unaugmented_view_is_torchvisions_to_a_grey_level(split, size):
    whole = {"rrc": {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}, "crop_size": size}
    views, indexes = drawn(split, whole)
    error = 255 * (views - torchvisions(split, whole, indexes)).abs()
    assert views.shape == (26, 3, size, size)
    assert error.flatten(1).mean(1).max() < 0.5 and error.max() < 20


def test_files_of_all_kinds_are_read_as_pillow_reads_them(tmp_path):
    photograph = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, 120, 80))
    turned = Image.Exif()
    turned[0x0112] = 6
    (tmp_path / "all").mkdir()
    photograph.save(tmp_path / "all" / "turned.jpg", exif=turned)
    photograph.save(tmp_path / "all" / "progressive.jpg", progressive=True)
    photograph.convert("CMYK").save(tmp_path / "all" / "cmyk.jpeg")
    photograph.convert("L").save(tmp_path / "all" / "grey.JPG")
    photograph.save(tmp_path / "all" / "a png.JPEG", format="png")  # ImageNet has one
    photograph.convert("P").save(tmp_path / "all" / "palette.png")
    photograph.save(tmp_path / "all" / "ümläut.bmp")
    files = FolderImages(tmp_path)
    views, indexes = drawn(files, {})
    error = 255 * (views - torchvisions(files, {}, indexes)).abs()
    assert error.flatten(1).mean(1).max() < 0.5


@pytest.mark.parametrize(
    ("operation", "grey_levels"),
    # Pillow's formula of equalisation is another than OpenCV's, which is DALI's
    [("grayscale", 0.5), ("solarization", 0.5), ("horizontal_flip", 0.5), ("equalization", 10)],
)
def test_operations_without_strength_are_torchvisions(split, operation, grey_levels):
    views, indexes = drawn(split, {operation: {"prob": 1.0}})
    expected = torchvisions(split, {operation: {"prob": 1.0}}, indexes)
    assert 255 * (views - expected).abs().mean() < grey_levels
    assert 255 * (views - drawn(split, {})[0]).abs().mean() > 2 * grey_levels


def statistics(views):
    grey = views.mean(1)
    return {
        "brightness": grey.mean((1, 2)),
        "contrast": grey.flatten(1).std(1),
        "saturation": (views.amax(1) - views.amin(1)).mean((1, 2)),
        "edges": (grey[:, 1:] - grey[:, :-1]).abs().mean((1, 2)),
    }


@pytest.mark.parametrize(
    "entry",
    [
        {"rrc": {"enabled": True}},
        {"rrc": {"enabled": True, "crop_min_scale": 0.05, "crop_max_scale": 0.14}},
        *({"color_jitter": {"prob": 1.0, name: strength}} for name, strength in JITTER.items()),
        {"color_jitter": {"prob": 1.0, **JITTER}},
        {"gaussian_blur": {"prob": 1.0}},
    ],
    ids=["crop", "small crop", *JITTER, "jitter", "blur"],
)
def test_random_operations_are_as_strong_as_torchvisions(split, entry):
    views, indexes = drawn(split, entry, times=12)
    found, expected = statistics(views), statistics(torchvisions(split, entry, indexes))
    for name, theirs in expected.items():
        difference = found[name] - theirs
        chance = 3 * difference.std() / len(difference) ** 0.5
        assert difference.mean().abs() < 0.05 * theirs.mean() + chance, name
        assert 0.85 < found[name].std() / theirs.std() < 1.18, name


def test_crops_keep_any_share_of_the_area_between_the_limits(tmp_path):
    # a picture whose colours are its coordinates: what is left of their range is the window
    y, x = np.mgrid[0:256, 0:256]
    (tmp_path / "all").mkdir()
    for name in ("a", "b", "c", "d"):
        Image.fromarray(np.stack([x, y, x], 2).astype(np.uint8)).save(tmp_path / "all" / f"{name}.png")
    crop = {"rrc": {"enabled": True, "crop_min_scale": 0.1, "crop_max_scale": 0.3}, "crop_size": 64}
    views, _ = drawn(FolderImages(tmp_path), crop, times=100)
    width, height = ((views[:, c].amax((1, 2)) - views[:, c].amin((1, 2))) * 255 / 63 * 64 for c in (0, 1))
    area, aspect = width * height / 256**2, (width / height).log()
    assert area.min().item() == pytest.approx(0.1, abs=0.01) and area.max().item() == pytest.approx(
        0.3, abs=0.01
    )
    assert area.mean().item() == pytest.approx(0.2, abs=0.01)
    assert aspect.min() > np.log(0.70) and aspect.max() < np.log(1.43) and aspect.mean().abs() < 0.03
    assert views[:, 0].amin((1, 2)).min() < 0.02 and views[:, 0].amax((1, 2)).max() > 0.98


def test_probabilities(split):
    plain, order = drawn(split, {})
    plain = plain[order.argsort()]
    for entry, happened in (
        ({"horizontal_flip": {"prob": 0.5}}, lambda x, y: torch.allclose(x, y.flip(-1))),
        ({"grayscale": {"prob": 0.2}}, lambda x, y: bool((x[0] == x[2]).all())),
        ({"solarization": {"prob": 0.2}}, lambda x, y: not torch.equal(x, y)),
        ({"color_jitter": {"prob": 0.8, "brightness": 0.4}}, lambda x, y: not torch.equal(x, y)),
    ):
        views, indexes = drawn(split, entry, times=20)
        share = np.mean([happened(view, plain[index]) for view, index in zip(views, indexes)])
        ((probability, *_),) = (node.values() for node in entry.values())
        assert share == pytest.approx(probability, abs=4 * np.sqrt(0.25 / len(views))), entry
        assert all(happened(v, plain[i]) or torch.equal(v, plain[i]) for v, i in zip(views, indexes)), entry


# the data module


def configuration(photographs, augmentations=AUGMENTATIONS, batch_size=8, seed=1, device="cpu", **data):
    data = {"dataset": "custom", "train_path": str(photographs), "format": "dali", "num_workers": 1, **data}
    return OmegaConf.create(
        {
            "data": data,
            "dali": {"device": device},
            "augmentations": augmentations,
            "optimizer": {"batch_size": batch_size},
            "seed": seed,
        }
    )


def module(photographs, **options):
    cfg = configuration(photographs, **options)
    return PretrainDataModule(load_dataset(cfg.data), cfg)


def original(data, index):
    """torchvision's un-augmented view of a training image."""
    views = TorchvisionViews(AUGMENTATIONS[1:], data.dataset.mean, data.dataset.std)
    return views(data.dataset.train.image(index))[0]


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first, second):
    """Whether two lists of batches agree to the last bit."""
    return len(first) == len(second) and all(
        torch.equal(i, j) and torch.equal(t, u) and all(torch.equal(v, w) for v, w in zip(views, others))
        for (i, views, t), (j, others, u) in zip(first, second)
    )


def test_batches_are_what_the_contract_says(photographs):
    data = module(photographs, val_path=str(photographs))
    split, found = data.dataset.train, list(data.train_dataloader())
    assert data.pipeline == "dali" and len(data.train_dataloader()) == len(found) == 26 // 8
    for indexes, views, targets in found:
        assert indexes.shape == targets.shape == (8,) and indexes.dtype == targets.dtype == torch.int64
        assert [tuple(view.shape) for view in views] == [(8, 3, 32, 32)] * 2 + [(8, 3, 24, 24)]
        assert all(view.dtype == torch.float32 for view in views)
        assert torch.equal(targets, split.labels[indexes])
        assert not torch.equal(views[0], views[1])
        expected = torch.stack([original(data, index) for index in indexes.tolist()])
        assert (views[2] - expected).abs().mean() < 0.01
    # evaluation stays with torchvision
    images, targets = next(iter(data.val_dataloader()))
    assert torch.equal(images[0], data.view(split.image(0))) and torch.equal(targets, split.labels[:8])


def test_the_order_is_that_of_the_other_pipelines(photographs):
    dali = module(photographs).train_dataloader()
    other = module(photographs, format="image_folder", num_workers=0).train_dataloader()
    for epoch in (0, 1):
        orders = [torch.cat([batch[0] for batch in epoch_of(loader, epoch)]) for loader in (dali, other)]
        assert torch.equal(*orders)
    assert not torch.equal(orders[0], torch.cat([batch[0] for batch in epoch_of(dali, 0)]))


def test_seed_and_epoch_decide_everything(photographs):
    loader = module(photographs).train_dataloader()
    zero, one = epoch_of(loader, 0), epoch_of(loader, 1)
    torch.rand(3)
    restarted = module(photographs, num_workers=3).train_dataloader()
    assert same(epoch_of(restarted, 1), one)
    assert same(epoch_of(restarted, 0), zero)
    assert not same(zero, one)
    assert not same(epoch_of(module(photographs, seed=2).train_dataloader(), 0), zero)


def test_a_second_pass_has_the_same_images_in_the_same_order_augmented_anew(photographs):
    loader = module(photographs).train_dataloader()
    state = torch.get_rng_state()
    iterator = iter(loader)
    first = [next(iterator), next(iterator)]
    second = list(islice(loader, 3))  # while the first is not at its end
    first.append(next(iterator))
    assert next(iterator, None) is None
    assert torch.equal(torch.get_rng_state(), state)
    for (i, views, t), (j, others, u) in zip(first, second):
        assert torch.equal(i, j) and torch.equal(t, u) and torch.equal(views[2], others[2])
        assert not torch.equal(views[0], others[0])


def test_processes_share_the_images_of_an_epoch(photographs):
    def of_process(rank, processes):
        data = module(photographs, batch_size=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=processes)
        return data.train_dataloader()

    whole = list(of_process(0, 1).sampler)
    shares = [of_process(rank, 2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [3, 3]
    batches = [list(share) for share in shares]
    seen = [torch.cat([indexes for indexes, _, _ in share]).tolist() for share in batches]
    assert seen == [whole[0::2][:12], whole[1::2][:12]]
    assert same(batches[1], list(of_process(1, 2)))
    # one image in the same place of both shares is not augmented alike
    shares[1].sampler.set_epoch(0)
    shares[1].split = shares[1].split.subset(torch.tensor(shift(whole)))
    assert torch.equal(next(iter(shares[1]))[1][2], batches[0][0][1][2])
    assert not torch.equal(next(iter(shares[1]))[1][0], batches[0][0][1][0])


def shift(order):
    """Rows that let the second of two processes read what the first one does."""
    rows = list(range(len(order)))
    for mine, its in zip(order[1::2], order[0::2]):
        rows[mine] = its
    return rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "digits"}, r"^data\.format must be image_folder for a data set that lies in memory"),
        ({"device": "tpu"}, r"^dali\.device must be one of cpu, gpu, got 'tpu'"),
        ({"format": "h5"}, r"^data\.format must be one of dali, image_folder, got 'h5'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(photographs, options, message):
    with pytest.raises(UserError, match=message) as error:
        module(photographs, **options).setup("fit")
    assert "\n" not in str(error.value)


def test_regions_are_refused(photographs):
    cfg = configuration(photographs, region="foreground")
    dataset = load_dataset(cfg.data)
    dataset.train.boxes = torch.tensor([[0, 0, 20, 20]] * len(dataset.train), dtype=torch.int32)
    with pytest.raises(UserError, match=r"^data\.region must be full with data\.format=dali"):
        PretrainDataModule(dataset, cfg).setup("fit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_the_device_is_the_cpu(photographs):
    assert module(photographs, device=None).train_dataloader().device == "cpu"
    with pytest.raises(UserError, match=r"^dali\.device must be cpu on a machine without CUDA, got 'gpu'"):
        module(photographs, device="gpu").setup("fit")


def test_without_dali_one_line_says_how_to_get_it_and_evaluators_go_on(photographs, monkeypatch):
    monkeypatch.setitem(sys.modules, "metamask_plugin.data.dali", None)
    data = module(photographs)
    with pytest.raises(UserError, match=r"^data\.format .*pip install nvidia-dali-cuda130") as error:
        data.setup("fit")
    assert "\n" not in str(error.value)
    assert len(next(iter(data.evaluation_loader(data.dataset.train, 5)))[1]) == 5


@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_a_damaged_file_is_named_in_one_line(tmp_path, split, content):
    (tmp_path / "all").mkdir()
    for name in ("a", "b", "c"):
        split.image(0).save(tmp_path / "all" / f"{name}.jpg")
    damaged = tmp_path / "all" / "b.jpg"
    damaged.write_bytes(damaged.read_bytes()[:1500] if content == "truncated" else content)
    unseen = {"augmentations": [{"crop_size": 8}], "verify": "none"}
    loader = module(tmp_path, batch_size=1, **unseen).train_dataloader()
    healthy = 0
    with pytest.raises(UserError, match=r"^image file .*b\.jpg must be readable, got") as error:
        for _ in loader:
            healthy += 1
    assert "\n" not in str(error.value)
    assert healthy == list(loader.sampler).index(1)


# Lightning


class Recorder(LightningModule):
    """Records what it is given; goes through an epoch's images once more at its end, as a meta-epoch does."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.epochs, self.again = {}, {}

    def training_step(self, batch, batch_idx):
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.layer(batch[1][0].mean((2, 3))).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.is_last_batch:
            batches = islice(self.trainer.train_dataloader, self.trainer.num_training_batches)
            self.again[self.current_epoch] = list(batches)

    def configure_optimizers(self):
        # makes Lightning ask for the loader before a checkpoint is read
        self.steps = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 0.1)


def fitted(photographs, epochs, checkpoint=None):
    model = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=module(photographs), ckpt_path=checkpoint)
    return model, trainer


def test_lightning_trains_on_it_and_a_resumed_run_sees_what_an_uninterrupted_one_does(photographs, tmp_path):
    straight, trainer = fitted(photographs, 3)
    assert straight.steps == 9 and trainer.global_step == 9 and trainer.num_training_batches == 3
    loader = module(photographs).train_dataloader()
    assert all(same(straight.epochs[epoch], epoch_of(loader, epoch)) for epoch in range(3))
    for epoch, batches in straight.again.items():
        assert [b[0].tolist() for b in batches] == [b[0].tolist() for b in straight.epochs[epoch]]

    _, interrupted = fitted(photographs, 1)
    interrupted.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = fitted(photographs, 3, tmp_path / "one.ckpt")
    assert sorted(resumed.epochs) == [1, 2]
    for epoch in (1, 2):
        assert same(resumed.epochs[epoch], straight.epochs[epoch])
        assert same(resumed.again[epoch], straight.again[epoch])


TWO_PROCESSES = """
import sys
import torch
from lightning.pytorch import Trainer
from data.test_dali import Recorder, module

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = Recorder()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, datamodule=module(sys.argv[1]))
    for epoch, batches in model.epochs.items():
        seen = model.all_gather(torch.cat([batch[0] for batch in batches])).flatten().tolist()
        if model.global_rank == 0:
            print("epoch", epoch, "batches", len(batches), "images", len(seen), len(set(seen)))
"""


@pytest.mark.slow
def test_two_processes_of_lightning_share_the_images(photographs, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    done = subprocess.run(
        [sys.executable, str(script), str(photographs)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    for epoch in (0, 1):
        assert f"epoch {epoch} batches 1 images 16 16" in done.stdout, done.stderr[-2000:]


# the command line


def run_config(photographs, folder, *overrides):
    """ICL-MSR as shipped for ImageNet-100, made small."""
    small = [
        "data.format=dali",
        "++dali.device=cpu",
        "data.dataset=custom",
        f"data.train_path={photographs}",
        f"data.val_path={photographs}",
        "data.num_workers=1",
        "backbone.name=conv4",
        "++backbone.kwargs.width=4",
        "method_kwargs.regularizer.kwargs.width=8",
        "method_kwargs.task_kwargs.proj_hidden_dim=16",
        "augmentations.0.crop_size=32",
        "augmentations.1.crop_size=24",
        "optimizer.batch_size=8",
        "max_epochs=3",
        "accelerator=cpu",
        "evaluation.knn.k=[5]",
        "++evaluation.linear.protocol=fast",
        f"checkpoint.dir={folder}",
        *overrides,
    ]
    with initialize_config_dir(str(ROOT / "scripts" / "pretrain"), version_base="1.2"):
        return compose("imagenet-100/icl_msr_simclr", overrides=small)


@pytest.mark.slow
def test_a_whole_run_of_icl_msr_with_its_unaugmented_view(photographs, tmp_path):
    folder = pretrain.run(run_config(photographs, tmp_path))
    assert folder.summary.exists() and (folder.path / "semantic_maps.png").exists()


def test_icl_msr_interrupted_and_resumed_is_as_if_nothing_had_happened(photographs, tmp_path, monkeypatch):
    overrides = ["++evaluation.enabled=False", "method_kwargs.meta.when=epoch_end"]

    def weights(folder):
        return torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]

    straight = weights(pretrain.run(run_config(photographs, tmp_path / "a", *overrides)))
    cfg = run_config(photographs, tmp_path / "b", *overrides)
    plain = Progress.on_train_epoch_start

    def interrupt(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            raise KeyboardInterrupt
        plain(self, trainer, pl_module)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_epoch_start", interrupt)
        with pytest.raises(SystemExit):
            pretrain.run(cfg.copy())
    resumed = weights(pretrain.run(cfg))
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_the_command_line_refuses_in_one_line(tmp_path, photographs, capsys):
    with pytest.raises(SystemExit) as exit_code:
        pretrain.run(run_config(photographs, tmp_path, "data.dataset=digits"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_code.value.code == 2
    assert "data.format must be image_folder for a data set that lies in memory" in lines[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_draws_the_same_views_up_to_rounding(photographs):
    augmentations = [
        {**AUGMENTATIONS[0], "solarization": {"prob": 0.2}, "equalization": {"prob": 0.1}},
        AUGMENTATIONS[1],
    ]
    data = module(photographs, device="gpu", augmentations=augmentations)
    data.setup("fit")
    batches, again = (epoch_of(data.train_dataloader(), 0) for _ in range(2))
    assert same(batches, again)
    for indexes, views, _ in batches:
        assert all(view.is_cuda for view in views)
        expected = torch.stack([original(data, index) for index in indexes.tolist()])
        assert (views[2].cpu() - expected).abs().mean() < 0.05
