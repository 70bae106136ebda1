"""What desktops and file servers put beside images, and images that are not named like images."""

import io

import pytest
from image_faults import encoded, make_tree
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.cli import verify as verify_folders
from metamask_plugin.data import PretrainDataModule, image_tree, load_dataset
from metamask_plugin.errors import UserError

HIDDEN = pytest.mark.fault(
    "data", source="pytorch/vision#2831, pytorch/vision#109, open-mmlab/mmpretrain#507"
)
SYSTEM = (
    ".ipynb_checkpoints",
    "@eaDir",
    ".thumbnails",
    "Thumbnails",
    ".Trash-1000",
    "__MACOSX",
    "$RECYCLE.BIN",
)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "train")


def load(tree, **options):
    return load_dataset({"dataset": "custom", "train_path": str(tree), **options})


def said(capfd):
    return capfd.readouterr().err.splitlines()


def litter(folder, images=3):
    """A folder with images, and deeper in it another."""
    for i in range(images):
        (folder / "deeper").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save((folder if i else folder / "deeper") / f"{i}.jpg")


@HIDDEN
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("place", ["cat", "cat/small"])
def test_folders_of_the_system_are_left_out_at_any_depth(tree, labelled, place, capfd):
    (tree / place).mkdir(exist_ok=True)
    for name in SYSTEM:
        litter(tree / place / name)
    (tree / place / "._0.jpg").write_bytes(b"resource fork")
    dataset = load(tree, no_labels=not labelled)
    assert len(dataset.train) == 8
    (note,) = said(capfd)
    assert note.startswith(f"note: left out {3 * len(SYSTEM) + 1} images that are hidden")


@HIDDEN
@pytest.mark.parametrize("labelled", [True, False])
def test_they_are_no_classes(tree, labelled, capfd):
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        litter(tree / name)
    dataset = load(tree, no_labels=not labelled)
    assert len(dataset.train) == 8 and dataset.train.classes == (["cat", "dog"] if labelled else [])
    assert said(capfd)[0].startswith("note: left out 9 images")


@HIDDEN
def test_every_reader_sees_the_same_images(tree, capfd):
    sound = load(tree).fingerprint()
    litter(tree / "cat" / "@eaDir")
    data = {"dataset": "custom", "train_path": str(tree), "num_workers": 0}
    for options in ({"pipeline": "torchvision"}, {"pipeline": "kornia"}, {"format": "dali"}):
        node = {"data": {**data, **options}, "augmentations": [{"crop_size": 8}]}
        built = PretrainDataModule(load(tree), OmegaConf.create({**node, "optimizer": {"batch_size": 2}}))
        assert len(built.dataset.train) == 8 and built.full.fingerprint() == sound
    said(capfd)
    assert verify_folders.main([str(tree)]) == 0
    note, count = said(capfd)
    assert note.startswith("note: left out 3 images") and count == "0 of 8 images cannot be read"


@pytest.mark.fault("data")
def test_a_data_set_below_a_hidden_folder_is_read(tmp_path, capfd):
    tree = make_tree(tmp_path / ".cache" / "@eaDir" / "train")
    assert len(load(tree).train) == 8 and said(capfd) == []


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    ("name", "form"),
    [("x.jfif", "JPEG"), ("x.JPE", "JPEG"), ("x.gif", "GIF"), ("x.avif", "AVIF"), ("x.jp2", "JPEG2000")],
)
def test_other_extensions_are_read_where_pillow_can(tree, name, form, capfd):
    if form not in image_tree.formats():
        pytest.skip(f"this Pillow has no {form}")
    (tree / "cat" / name).write_bytes(encoded(form))
    dataset = load(tree)
    assert len(dataset.train) == 9 and said(capfd) == []
    (index,) = (i for i, path in enumerate(dataset.train.paths) if path.endswith(name))
    assert dataset.train.image(index).size == (64, 48)


@pytest.mark.fault("data")
def test_an_extension_that_pillow_cannot_read_is_counted(tree, monkeypatch, capfd):
    monkeypatch.setattr(image_tree, "extensions", lambda: (".jpg", ".png"))
    (tree / "cat" / "x.gif").write_bytes(encoded("GIF"))
    assert len(load(tree).train) == 8
    assert said(capfd)[0].startswith("warning: left out 1 files that begin like images")


@pytest.mark.fault("data")
@pytest.mark.parametrize("labelled", [True, False])
def test_images_by_content_alone_are_counted_aloud(tree, labelled, capfd):
    for i, name in enumerate(("x.jpg.1", "y.1", "no extension", "z.image")):
        (tree / "dog" / name).write_bytes(encoded(("JPEG", "PNG", "TIFF", "WEBP")[i]))
    no_images = {"notes": b"BMX bikes, 2019", "a.txt": encoded("PNG"), "movie.mp4": bytes(40)}
    for name, content in no_images.items():
        (tree / "dog" / name).write_bytes(content)
    assert len(load(tree, no_labels=not labelled).train) == 8
    (warning,) = said(capfd)
    assert warning.startswith("warning: left out 4 files that begin like images and have another extension")
    assert ".1: 2" in warning and "none: 1" in warning and ".image: 1" in warning


@pytest.mark.fault("data")
def test_of_millions_of_other_files_few_are_opened(tree, monkeypatch, capfd):
    for i in range(6):
        (tree / "cat" / f"{i}.label").write_bytes(b"cat")
        (tree / "dog" / f"{i}.1").write_bytes(encoded("PNG", Image.new("RGB", (1, 1))))
    opened = []
    look = image_tree.begins_like_image
    monkeypatch.setattr(image_tree, "begins_like_image", lambda path: opened.append(path) or look(path))
    monkeypatch.setattr(image_tree, "LOOKED_AT_OF_AN_EXTENSION", 3)
    load(tree)
    assert len(opened) == 6
    assert "left out at least 3 files" in said(capfd)[0]


@pytest.mark.fault("data")
def test_a_class_of_such_images_alone_says_so(tree):
    (tree / "fox").mkdir()
    (tree / "fox" / "0").write_bytes(encoded("JPEG"))
    with pytest.raises(UserError, match="1 files begin like images and have another extension") as error:
        load(tree)
    assert "\n" not in str(error.value)


def test_bytes_that_begin_like_an_image(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "BMP")
    contents = {"bmp": buffer.getvalue(), "gif": encoded("GIF"), "jpeg": encoded("JPEG")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert image_tree.begins_like_image(str(tmp_path / name)), name
    (tmp_path / "video").write_bytes(b"\0\0\0\x18ftypisom" + bytes(20))
    (tmp_path / "empty").touch()
    for name in ("video", "empty", "gone", "."):
        assert not image_tree.begins_like_image(str(tmp_path / name)), name
