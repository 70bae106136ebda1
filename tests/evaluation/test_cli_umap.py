"""``main_umap.py``: where its points lie, what it draws of which images, and its one-line errors."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from refusals import refused

from metamask_plugin.cli import umap as cli
from metamask_plugin.cli.umap import drawn_images, main, parse_args, run
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import maps
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.maps import class_maps, embed

DIGITS = {"dataset": "digits", "kwargs": {"size": 16}}


def projected(feats):
    """Features (N, D) seen from a fixed direction, (N, 2)."""
    generator = np.random.default_rng(0)
    return feats @ generator.standard_normal((feats.shape[1], 2)).astype(np.float32)


class Projection:
    """In UMAP's place, as it compiles nothing."""

    def __init__(self, **settings):
        pass

    def fit_transform(self, feats):
        return projected(feats)


@pytest.fixture
def instant(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Projection))


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)


def written_by(*argv):
    return run(parse_args([str(word) for word in argv]))


def drawn(axes):
    """Positions (N, 2) and colours (N, 3) as they are drawn."""
    (points,) = axes.collections
    return torch.tensor(np.array(points.get_offsets())), torch.tensor(points.get_facecolors()[:, :3])


@pytest.mark.slow
def test_far_blobs_are_apart_in_the_picture_and_the_files_are_pictures(run_folder, tmp_path, capsys):
    pytest.importorskip("umap")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    feats = torch.randn(80, 8, generator=generator)
    feats[:, 0] += 100.0 * labels
    feats[:, 1] += 100.0 * (1 - labels)
    before = torch.get_rng_state()
    positions = embed(feats, neighbours=10)
    assert torch.equal(positions, embed(feats, neighbours=10)), "the seed decides"
    assert torch.equal(before, torch.get_rng_state())
    points, colours = drawn(class_maps({"blobs": positions}, labels, ["left", "right"]).axes[0])
    first = (colours - colours[0]).abs().amax(dim=1) < 1e-6
    assert first.sum() == 40
    groups = points[first], points[~first]
    gap = torch.cdist(*groups).min()
    nearest = [torch.cdist(g, g).fill_diagonal_(torch.inf).min(dim=1).values.max() for g in groups]
    assert gap > 2 * max(nearest), "one group begins far from where the other ends"

    main(["--pretrained_checkpoint_dir", str(run_folder), "--limit", "60", "--pdf"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("60 of 1297 train images")
    names = ["umap_train.png", "umap_train.pdf", "umap_test.png", "umap_test.pdf"]
    assert printed[2:] == [str(run_folder / name) for name in names]
    for name in names[::2]:
        picture = Image.open(run_folder / name)
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**24)) > 20, "not an empty page"
        assert 10_000 < (run_folder / name).stat().st_size < 300_000
    for name in names[1::2]:
        assert (run_folder / name).read_bytes().startswith(b"%PDF")


def test_the_maps_show_the_features_of_the_drawn_images(run_folder, tmp_path, instant, monkeypatch):
    figures = []
    monkeypatch.setattr(cli, "save", lambda figure, path: figures.append((path, figure)))
    flags = ["--pretrained_checkpoint_dir", run_folder, "--output_dir", tmp_path / "maps" / "of"]
    written = written_by(*flags, "--limit", 70, "--seed", 3, "--batch_size", 32)
    assert written == [tmp_path / "maps" / "of" / f"umap_{split}.png" for split in ("train", "test")]
    assert [path for path, _ in figures] == written
    assert written[0].parent.is_dir()
    loaded, data = load_encoder(run_folder), LabelledImages.read(DIGITS, 16)
    for (_, figure), split in zip(figures, ("train", "test")):
        feats = extract_features(loaded.backbone, data.evaluation_loader(split)).feats
        unmasked, masked = figure.axes
        assert [axes.get_title() for axes in figure.axes] == ["unmasked features", "masked features"]
        points, colours = drawn(unmasked)
        assert len(points) == 70
        # not by the matrix product, which loses the digits that tell two images apart
        exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
        every = torch.from_numpy(projected(feats.numpy())).double()
        distances, images = torch.cdist(points, every, **exact).min(dim=1)
        assert distances.max() < 1e-5
        assert len(images.unique()) == 70, "none is drawn twice"
        assert images.max() >= 70, "not the first ones"
        labels = data.images(split).labels[images]
        legend = {
            text.get_text(): to_rgb(dot.get_color())
            for text, dot in zip(figure.legends[0].get_texts(), figure.legends[0].legend_handles)
        }
        expected = torch.tensor([legend[str(label)] for label in labels.tolist()])
        assert torch.allclose(colours.float(), expected, atol=1e-5)
        seen = torch.from_numpy(projected((feats[images] * loaded.mask).numpy()))
        assert torch.allclose(drawn(masked)[0].float(), seen, atol=1e-5)
        assert not torch.allclose(points.float(), seen, atol=1e-2)


def test_without_a_mask_there_is_one_map(run_folder, instant, monkeypatch):
    path = run_folder / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["mask.weight"]
    torch.save({"state_dict": state}, path)
    figures = []
    monkeypatch.setattr(cli, "save", lambda figure, path: figures.append(figure))
    written_by("--pretrained_checkpoint_dir", run_folder, "--limit", 40)
    assert [[axes.get_title() for axes in figure.axes] for figure in figures] == [["unmasked features"]] * 2


def test_the_seed_draws_the_images():
    loader = LabelledImages.read(DIGITS, 16, batch_size=30).evaluation_loader("test")

    def labels(limit, seed):
        return torch.cat([y for _, y in drawn_images(loader, limit, seed)])

    assert torch.equal(labels(50, 1), labels(50, 1))
    assert not torch.equal(labels(50, 1), labels(50, 2))
    assert torch.equal(labels(10_000, 1), loader.dataset.split.labels), "all of them, in their order"


def test_many_classes_have_colours_but_no_legend():
    labels = torch.arange(100) % 21
    points = {"features": torch.randn(100, 2)}
    figure = class_maps(points, labels, [str(c) for c in range(21)])
    assert not figure.legends
    assert len(drawn(figure.axes[0])[1].unique(dim=0)) == 21
    few = class_maps(points, labels % 3 + 17, [str(c) for c in range(20)])
    assert [text.get_text() for text in few.legends[0].get_texts()] == ["17", "18", "19"]
    assert len(drawn(few.axes[0])[1].unique(dim=0)) == 3


def test_what_cannot_be_drawn_is_refused(instant):
    with pytest.raises(UserError, match=r"neighbours must be at least 3 and below 15.*got 15"):
        embed(torch.randn(15, 4))
    with pytest.raises(UserError, match="features must be different ones, got '20 equal ones'"):
        embed(torch.ones(20, 4))
    with pytest.raises(UserError, match=r"positions of a must be of shape \(3, 2\), got \(4, 2\)"):
        class_maps({"a": torch.zeros(4, 2)}, torch.zeros(3).long(), ["0"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--neighbours", "2"], "--neighbours must be >= 3, got 2"),
        (["--limit", "15"], "--neighbours must be fewer than the 15 train images, got 15"),
        (["--limit", "0"], "--limit must be >= 4, got 0"),
        (["--min_distance", "1.5"], "--min_distance must be from 0 to 1, got 1.5"),
        (["--distance_function", "cos"], "did you mean 'cosine'"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--batch_size", "0"], "--batch_size must be >= 1"),
        (["--output_dir", "/dev/null/maps"], "--output_dir must be a folder that can be written"),
    ],
)
def test_bad_flags_end_with_one_line_and_code_2(run_folder, flags, message, instant, capsys):
    assert message in error_of(run_folder, flags, capsys)


def test_without_umap_learn_one_line_says_how_to_get_it(run_folder, missing, capsys, monkeypatch):
    monkeypatch.setattr(cli, "pretrained_encoder", lambda *args: pytest.fail("loads before it asks"))
    assert "umap-learn must be installed" in (error := error_of(run_folder, [], capsys))
    assert error.endswith("; pip install umap-learn")
    with pytest.raises(UserError, match="pip install umap-learn"):
        maps.require_umap()


def error_of(run_folder, flags, capsys):
    return refused(lambda: main(["--pretrained_checkpoint_dir", str(run_folder), *flags]), capsys, alone=True)
