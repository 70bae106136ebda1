import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from metamask_plugin.data import FolderImages, MemoryImages
from metamask_plugin.data.datasets.torchvision_sets import torchvision_splits
from metamask_plugin.errors import UserError


def write_cifar(root: Path, name: str) -> Path:
    """A few images in CIFAR's own file format: 2 in each file."""
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for i, file in enumerate(files):
        pixels = np.full((2, 3072), i, dtype=np.uint8)
        pixels[:, :1024] = 200  # red
        key = "labels" if ten else "fine_labels"
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: [i, 1]}))
    meta, key = ("batches.meta", "label_names") if ten else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({key: [f"class {i}" for i in range(10 if ten else 100)]}))
    return root


@pytest.fixture
def no_checksums(monkeypatch):
    """The files that the tests write are not the originals."""
    for source in (CIFAR10, CIFAR100, STL10):
        monkeypatch.setattr(source, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)


@pytest.mark.parametrize(("name", "count"), [("cifar10", 10), ("cifar100", 2)])
def test_cifar_files(tmp_path, no_checksums, name, count):
    root = write_cifar(tmp_path, name)
    train, test = torchvision_splits(name, str(root), str(tmp_path / "no such folder"), False)
    assert isinstance(train, MemoryImages) and isinstance(test, MemoryImages)
    assert train.images.shape == (count, 3, 32, 32) and train.images.is_contiguous()
    assert (train.images[:, 0] == 200).all() and (train.images[0, 1:] == 0).all()
    assert len(test) == 2 and test.classes == train.classes
    assert train.labels[:2].tolist() == [0, 1]


def test_stl10_trains_on_unlabelled_images_too(tmp_path, no_checksums):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2), ("unlabeled", 4)):
        (folder / f"{part}_X.bin").write_bytes(
            rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes()
        )
        (folder / f"{part}_y.bin").write_bytes((np.arange(count, dtype=np.uint8) + 1).tobytes())
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    train, test = torchvision_splits("stl10", str(tmp_path), None, False)
    assert train.labels.tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert test.labels.tolist() == [0, 1]
    assert train.images.shape == (7, 3, 96, 96) and train.image(0).size == (96, 96)
    # the files run down the columns
    raw = np.fromfile(folder / "train_X.bin", dtype=np.uint8).reshape(3, 3, 96, 96)
    assert torch.equal(train.images[1], torch.from_numpy(raw[1].transpose(0, 2, 1).copy()))


def test_class_folders_instead(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / part / "cat" / "0.png")
    train, test = torchvision_splits("cifar10", str(tmp_path / "train"), str(tmp_path / "test"), False)
    assert isinstance(train, FolderImages) and isinstance(test, FolderImages)
    assert torchvision_splits("cifar10", str(tmp_path / "train"), None, False)[1] is None
    with pytest.raises(UserError, match=r"set data\.train_path=.*train data\.val_path=.*test"):
        torchvision_splits("cifar10", str(tmp_path), str(tmp_path), False)


@pytest.mark.parametrize("there", [True, False])
def test_neither_files_nor_folders(tmp_path, there):
    root = tmp_path if there else tmp_path / "nowhere"
    with pytest.raises(UserError, match=r"set data\.download=True") as error:
        torchvision_splits("cifar100", str(root), None, False)
    assert str(root) in str(error.value) and "cifar-100-python" in str(error.value)


def test_path_is_needed():
    with pytest.raises(UserError, match=r"data\.train_path must be a folder with cifar10, got None"):
        torchvision_splits("cifar10", None, None, False)


def test_damaged_files_are_one_line(tmp_path):
    write_cifar(tmp_path, "cifar10")
    with pytest.raises(UserError, match="cifar10 in .* must be complete and readable") as error:
        torchvision_splits("cifar10", str(tmp_path), None, False)
    assert "\n" not in str(error.value)


def test_download_is_left_to_torchvision(tmp_path, monkeypatch):
    def offline(self):
        raise OSError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(UserError, match="no route to host"):
        torchvision_splits("cifar10", str(tmp_path), None, True)
