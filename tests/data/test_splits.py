from pathlib import Path

import pytest
import torch
from PIL import Image

from metamask_plugin.data import FileImages, FolderImages, MemoryImages, UnreadableImage, stratified_subset
from metamask_plugin.errors import UserError


def make_folders(root: Path, classes: dict[str, int], size: tuple[int, int] = (12, 8)) -> Path:
    """Writes ``classes[name]`` images a class, each of one colour, PNG and JPEG in turn."""
    for c, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", size, (40 * c, 10 * i, 100))
            image.save(root / name / f"{i}.{('png', 'jpg')[i % 2]}")
    return root


def memory_split(count: int = 12) -> MemoryImages:
    images = torch.arange(count * 3 * 4 * 4).remainder(251).to(torch.uint8).reshape(count, 3, 4, 4)
    boxes = torch.arange(count * 4, dtype=torch.int32).reshape(count, 4)
    masks = images[:, 0] > 100
    return MemoryImages(images, torch.arange(count) % 3, ["a", "b", "c"], boxes, masks)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_memory_image_and_batch_agree():
    split = memory_split()
    batch = split.batch([5, 2])
    assert batch.dtype == torch.uint8 and batch.shape == (2, 3, 4, 4)
    image = split.image(5)
    assert image.mode == "RGB"
    assert image.getpixel((1, 2)) == tuple(batch[0, :, 2, 1].tolist())


def test_subset_takes_every_annotation_along():
    split = memory_split()
    picked = split.subset([7, 1])
    assert len(picked) == 2 and len(split) == 12
    for name in ("images", "labels", "boxes", "masks"):
        assert torch.equal(getattr(picked, name), getattr(split, name)[[7, 1]])
    assert picked.classes == split.classes


def test_memory_rejects_wrong_images_and_rows():
    with pytest.raises(ValueError, match="uint8"):
        MemoryImages(torch.zeros(2, 3, 4, 4), [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="labels must have one row for each of 2"):
        MemoryImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0], ["a"])


def test_folder_reads_classes_in_order(tmp_path):
    split = FolderImages(make_folders(tmp_path, {"dog": 3, "cat": 2}))
    assert split.classes == ["cat", "dog"]
    assert split.labels.tolist() == [0, 0, 1, 1, 1]
    assert split.boxes is None and split.masks is None
    assert split.image(0).mode == "RGB" and split.image(0).size == (12, 8)
    picked = split.subset([4, 0])
    assert picked.labels.tolist() == [1, 0]
    assert picked.image(0).tobytes() == split.image(4).tobytes()


def test_to_memory_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    make_folders(tmp_path, {"cat": 1})
    image = Image.new("RGB", (24, 8), (255, 0, 0))
    image.paste((0, 0, 255), (8, 0, 16, 8))
    image.save(tmp_path / "cat" / "0.png")
    split = FolderImages(tmp_path).to_memory(8)
    assert split.images.shape == (1, 3, 8, 8)
    assert (split.images[0, 2] == 255).all() and (split.images[0, 0] == 0).all()
    assert FolderImages(tmp_path).to_memory(4).images.shape == (1, 3, 4, 4)


def test_to_memory_moves_the_boxes_along(tmp_path):
    paths, boxes = [], torch.tensor([[10, 2, 14, 6], [0, 0, 24, 8], [0, 1, 5, 3]], dtype=torch.int32)
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        image = Image.new("RGB", (24, 8))
        image.paste((255, 255, 255), (x0, y0, x1, y1))
        paths.append(str(tmp_path / f"{i}.png"))
        image.save(paths[-1])
    split = FileImages(paths, [0, 0, 1], ["a", "b"], boxes)
    decoded = split.to_memory(8)
    assert decoded.boxes.dtype == torch.int32 and decoded.labels.tolist() == [0, 0, 1]
    # the square is columns 8 to 16; the third box lies left of it, and its nearest pixels stay
    assert decoded.boxes.tolist() == [[2, 2, 6, 6], [0, 0, 8, 8], [0, 1, 1, 3]]
    assert (decoded.images[0, 0] == 255).nonzero().amin(0).tolist() == [2, 2]
    assert (decoded.images[0, 0] == 255).nonzero().amax(0).tolist() == [5, 5]
    assert split.subset([2, 0]).to_memory(4).boxes.tolist() == [[0, 0, 1, 2], [1, 1, 3, 3]]
    assert FileImages(paths, [0, 0, 1], ["a", "b"]).to_memory(8).boxes is None


def test_files_reject_wrong_rows():
    with pytest.raises(ValueError, match="labels must have one row for each of 1"):
        FileImages(["a.png"], [0, 1], ["a"])
    with pytest.raises(ValueError, match="boxes must have one row for each of 1"):
        FileImages(["a.png"], [0], ["a"], torch.zeros(2, 4, dtype=torch.int32))


def test_unlabelled_folder(tmp_path):
    make_folders(tmp_path, {"cat": 2})
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    split = FolderImages.unlabelled(tmp_path)
    assert split.labels.tolist() == [-1, -1, -1] and split.classes == []


@pytest.mark.parametrize("prepare", ["missing", "file", "flat", "no classes at all", "splits", "empty class"])
def test_folder_errors_name_the_path(tmp_path, prepare):
    root = tmp_path / "images"
    expected = "image folder " + str(root)
    if prepare == "missing":
        expected += " must be a readable folder, got no such folder"
    elif prepare == "file":
        root.write_text("")
        expected += " must be a readable folder, got a file"
    elif prepare in ("flat", "no classes at all"):
        root.mkdir()
        if prepare == "flat":
            Image.new("RGB", (4, 4)).save(root / "0.png")
        expected += " must be a folder of class folders"
    elif prepare == "splits":
        make_folders(root / "train", {"cat": 1})
        make_folders(root / "test", {"cat": 1})
        expected += " must be a folder of class folders, got the splits test, train; set data.train_path="
    else:
        make_folders(root, {"ant": 1, "bee": 0, "cat": 2, "dog": 0})
        expected += " must be filled with images in each of its 4 class folders, got 'no image in 2 of them"
    with pytest.raises(UserError) as error:
        FolderImages(root)
    assert expected in one_line(error)
    if prepare == "empty class":
        assert str(root / "bee") in str(error.value)


def test_unlabelled_folder_without_images(tmp_path):
    with pytest.raises(UserError, match="must be a folder of images") as error:
        FolderImages.unlabelled(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_worker_error_keeps_the_one_line():
    line = "image file a.jpg must be readable, got OSError: truncated; replace or delete it"
    traceback = (
        "Caught UnreadableImage in worker\nTraceback:\n  x\nmetamask_plugin.data.images.UnreadableImage: "
    )
    wrapped = f"{traceback}{line}\n"
    assert str(UnreadableImage(wrapped)) == line
    assert str(UnreadableImage(line)) == line


def test_stratified_subset_keeps_shares_order_and_global_rng():
    labels = torch.tensor([0] * 100 + [1] * 50 + [-1] * 10 + [2] * 2)
    split = MemoryImages(torch.zeros(162, 3, 2, 2, dtype=torch.uint8), labels, ["a", "b", "c"])
    split.position = torch.arange(162)
    state = torch.get_rng_state()
    picked = stratified_subset(split, 0.1, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(picked.labels == label).sum().item() for label in (0, 1, -1, 2)] == [10, 5, 1, 1]
    assert (picked.position.diff() > 0).all()
    assert torch.equal(picked.position, stratified_subset(split, 0.1, seed=3).position)
    assert not torch.equal(picked.position, stratified_subset(split, 0.1, seed=4).position)


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.5])
def test_stratified_subset_rejects_fractions(fraction):
    with pytest.raises(UserError, match=r"data\.fraction must be between 0 and 1"):
        stratified_subset(memory_split(), fraction, seed=0)
