import contextlib
import pickle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as vision

from metamask_plugin.data import views as views_module
from metamask_plugin.data.datasets.confounded_digits import confounded_digits
from metamask_plugin.data.views import (
    Augmentation,
    BatchedResizedCrop,
    EvaluationView,
    KorniaViews,
    TorchvisionViews,
    blur_kernel,
    parse_augmentations,
    resampling_matrix,
    sample_crops,
)
from metamask_plugin.errors import UserError

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
of_kornia_0_9 = pytest.mark.skipif(
    views_module.KORNIA < (0, 9), reason="looks into kornia 0.9; older ones lay out what they draw otherwise"
)
JITTER = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return confounded_digits()[1].images[:48]


def pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def both(images: torch.Tensor, *augmentations: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The first view by torchvision and by kornia, in [0, 1]."""
    by_torchvision = TorchvisionViews(augmentations, ZERO, ONE)
    by_kornia = KorniaViews(augmentations, ZERO, ONE)
    return torch.stack([by_torchvision(pil(image))[0] for image in images]), by_kornia(images)[0]


def test_number_shape_and_dtype(images):
    augmentations = [
        {"rrc": {"enabled": True}, "crop_size": 32, "num_crops": 2, "color_jitter": JITTER},
        {"crop_size": 24, "num_crops": 3},
    ]
    sizes = [32, 32, 24, 24, 24]
    views = TorchvisionViews(augmentations, ZERO, ONE)(pil(images[0]))
    assert [tuple(view.shape) for view in views] == [(3, s, s) for s in sizes]
    batches = KorniaViews(augmentations, ZERO, ONE)(images)
    assert [tuple(batch.shape) for batch in batches] == [(48, 3, s, s) for s in sizes]
    assert all(batch.dtype == torch.float32 and not batch.requires_grad for batch in batches)
    assert not torch.equal(batches[0], batches[1])


@pytest.mark.parametrize(
    ("operation", "tolerance"),
    [
        ({}, 1e-6),
        ({"horizontal_flip": {"prob": 1.0}}, 1e-6),
        ({"grayscale": {"prob": 1.0}}, 1.01 / 255),
        ({"solarization": {"prob": 1.0}}, 1e-6),
        ({"equalization": {"prob": 1.0}}, 1.01 / 255),
        ({"color_jitter": {"prob": 1.0}}, 1e-6),
    ],
)
def test_deterministic_operations_agree(images, operation, tolerance):
    torchvision_view, kornia_view = both(images, {"crop_size": 32, **operation})
    assert (torchvision_view - kornia_view).abs().max() <= tolerance
    if operation and "color_jitter" not in operation:
        assert (kornia_view - images / 255).abs().max() > 0.1


def test_resize_without_random_crop_agrees(images):
    torchvision_view, kornia_view = both(images, {"crop_size": 24})
    assert torchvision_view.shape == kornia_view.shape == (48, 3, 24, 24)
    difference = (torchvision_view - kornia_view).abs() * 255
    # Pillow rounds and clips between its two passes
    assert difference.max() < 5 and difference.mean() < 0.5


def test_blur_agrees_at_one_sigma(images, monkeypatch):
    for sigma in (0.5, 1.0, 2.0):
        monkeypatch.setattr(views_module, "BLUR_SIGMA", (sigma, sigma + 1e-6))
        torchvision_view, kornia_view = both(images, {"crop_size": 32, "gaussian_blur": {"prob": 1.0}})
        # Pillow approximates the Gaussian by three box filters
        assert (torchvision_view - kornia_view).abs().mean() < 0.01


def test_blur_kernel_is_odd_and_wide_enough():
    assert [blur_kernel(size) for size in (32, 96, 224, 448)] == [13, 13, 23, 45]


def statistics(views: list[torch.Tensor]) -> torch.Tensor:
    """Channel means, channel standard deviations, and mean absolute horizontal and vertical difference."""
    pixels = torch.cat(views)
    edges = [(pixels.diff(dim=dim).abs()).mean().view(1) for dim in (2, 3)]
    return torch.cat([pixels.mean((0, 2, 3)), pixels.std((0, 2, 3)), *edges])


@pytest.mark.parametrize(
    "operation",
    [
        {"rrc": {"enabled": True}},
        {"color_jitter": JITTER},
        {"gaussian_blur": {"prob": 0.5}},
        {
            "rrc": {"enabled": True},
            "color_jitter": JITTER,
            "grayscale": {"prob": 0.2},
            "gaussian_blur": {"prob": 0.5},
            "solarization": {"prob": 0.2},
            "horizontal_flip": {"prob": 0.5},
        },
    ],
    ids=["crop", "jitter", "blur", "all"],
)
def test_random_operations_agree_in_distribution(images, operation):
    torch.manual_seed(0)
    augmentation = {"crop_size": 32, "num_crops": 40, **operation}
    by_torchvision, by_kornia = (
        TorchvisionViews([augmentation], ZERO, ONE),
        KorniaViews([augmentation], ZERO, ONE),
    )
    torchvision_statistics = statistics(
        [view[None] for image in images for view in by_torchvision(pil(image))]
    )
    kornia_statistics = statistics(by_kornia(images))
    difference = (torchvision_statistics - kornia_statistics).abs()
    assert difference[:6].max() < 0.012
    assert (difference[6:] / torchvision_statistics[6:]).max() < 0.06


FACTORS = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
ADJUST = {name: getattr(vision, f"adjust_{name}") for name in FACTORS}


def jittered_by_kornia(images: torch.Tensor, order: list[str], factors: dict[str, torch.Tensor]):
    """``KorniaViews``'s colour jitter with these factors, one an image, in this order."""
    entry = {"crop_size": 32, "color_jitter": {**JITTER, "prob": 1.0}}
    _, jitter = KorniaViews([entry], ZERO, ONE).pipelines[0]
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    params = {
        f"{name}_factor": factors.get(name, torch.full((len(images),), value))
        for name, value in neutral.items()
    }
    every = [*order, *(name for name in neutral if name not in order)]
    params["order"] = torch.tensor([list(neutral).index(name) for name in every])
    return jitter(images / 255, params=params)


@pytest.mark.parametrize(
    ("order", "most", "mean"),
    [
        (["brightness"], 1, 1),
        (["contrast"], 1.5, 1),
        (["saturation"], 1.5, 1),
        (["hue"], 12, 2),
        (["brightness", "contrast", "saturation", "hue"], 18, 4),
        (["hue", "saturation", "contrast", "brightness"], 22, 4),
    ],
    ids=["brightness", "contrast", "saturation", "hue", "all", "all, reversed"],
)
def test_colour_jitter_agrees_at_fixed_factors(images, order, most, mean):
    """With torchvision on floats to 2e-4, with torchvision on Pillow's images to some grey levels.

    Pillow rounds to whole values, and turns hues that are rounded to 1.4 degrees.
    """
    factors = {name: torch.linspace(*FACTORS[name], len(images)) for name in order}
    ours = jittered_by_kornia(images, order, factors)
    for i, image in enumerate(images):
        exact, by_pillow = image / 255, pil(image)
        for name in order:
            exact, by_pillow = (ADJUST[name](x, factors[name][i].item()) for x in (exact, by_pillow))
        assert (ours[i] - exact).abs().max() < 2e-4
        difference = (ours[i] - vision.to_tensor(by_pillow)).abs() * 255
        assert difference.max() < most and difference.mean() < mean
    assert (ours - images / 255).abs().mean() > 0.01


def fixed_windows(monkeypatch, count: int) -> list[tuple[int, ...]]:
    """Makes both pipelines cut the same windows: top, left, height, width."""
    windows = sample_crops(count, 32, 32, (0.08, 1.0))
    rows = [tuple(row) for row in windows.tolist()]
    coming = iter(rows)
    monkeypatch.setattr(views_module, "sample_crops", lambda *_: windows)
    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", lambda *_: next(coming))
    return rows


def test_random_crop_agrees_at_fixed_windows(images, monkeypatch):
    torch.manual_seed(0)
    assert len(set(fixed_windows(monkeypatch, len(images)))) > 40
    torchvision_view, kornia_view = both(images, {"crop_size": 24, "rrc": {"enabled": True}})
    difference = (torchvision_view - kornia_view).abs() * 255
    # Pillow rounds to whole values after each of the two passes
    assert difference.max() < 3 and difference.mean() < 0.5


@of_kornia_0_9
@pytest.mark.parametrize("blur", [0.0, 0.5])
def test_torchvision_with_what_kornia_drew_gives_the_same_views(images, monkeypatch, blur):
    """Every window, factor, order, sigma and coin of a whole pipeline, drawn once and used twice.

    To 1.5 of 255 levels in the mean: Pillow rounds values and hues after each operation, and blurs by boxes.
    """
    torch.manual_seed(3)
    fixed_windows(monkeypatch, len(images))
    probabilities = {"color_jitter": 0.8, "grayscale": 0.2, "solarization": 0.3, "horizontal_flip": 0.5}
    probabilities |= {"gaussian_blur": blur} if blur else {}
    entry = {name: {"prob": probability} for name, probability in probabilities.items()}
    entry |= {"crop_size": 32, "rrc": {"enabled": True}, "color_jitter": JITTER}
    by_kornia = KorniaViews([entry], ZERO, ONE)
    ours = by_kornia(images)[0]
    operations = {type(operation).__name__: operation for operation in by_kornia.pipelines[0]}
    names = ("ColorJitter", "RandomGrayscale", "RandomSolarize", "RandomHorizontalFlip", "RandomGaussianBlur")
    drawn = {
        name: operations[kornia_name]._params
        for name, kornia_name in zip((*probabilities, "gaussian_blur"), names, strict=False)
        if name in probabilities
    }
    gates = {name: params["batch_prob"] > 0.5 for name, params in drawn.items()}
    assert all(0 < gate.float().mean() < 1 for gate in gates.values())

    theirs = []
    for i, image in enumerate(images):
        colours = [drawn["color_jitter"][f"{name}_factor"][i].item() for name in FACTORS]
        draw = (drawn["color_jitter"]["order"], *colours)
        monkeypatch.setattr(transforms.ColorJitter, "get_params", lambda *_, draw=draw: draw)
        if blur:
            sigma = drawn["gaussian_blur"]["sigma"][i].item()
            monkeypatch.setattr(views_module, "BLUR_SIGMA", (sigma, sigma + 1e-6))
        coins = {name: {**entry[name], "prob": float(gate[i])} for name, gate in gates.items()}
        theirs.append(TorchvisionViews([{**entry, **coins}], ZERO, ONE)(pil(image))[0])
    difference = (ours - torch.stack(theirs)).abs() * 255
    assert difference.mean() < 1.5 and difference.max() < 30
    assert (ours - torch.stack(theirs).roll(1, 0)).abs().mean() * 255 > 20


def test_views_are_distributed_alike_one_by_one(images):
    """Of each view its brightness, contrast, colourfulness and sharpness: equal means would say less."""
    torch.manual_seed(0)
    entry = {"rrc": {"enabled": True}, "color_jitter": JITTER, "grayscale": {"prob": 0.2}, "crop_size": 32}
    augmentation = [{**entry, "horizontal_flip": {"prob": 0.5}, "num_crops": 40}]
    by_torchvision = TorchvisionViews(augmentation, ZERO, ONE)
    theirs = torch.stack([view for image in images for view in by_torchvision(pil(image))])
    ours = torch.cat(KorniaViews(augmentation, ZERO, ONE)(images))
    measures = {
        "brightness": lambda x: x.mean((1, 2, 3)),
        "contrast": lambda x: x.mean(1).std((1, 2)),
        "colourfulness": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
        "sharpness": lambda x: x.diff(dim=3).abs().mean((1, 2, 3)),
        "tilt": lambda x: x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3)),
    }
    for name, measure in measures.items():
        # 0.063 is exceeded once in a thousand times by two samples of 1920 that are of one distribution
        assert ks_2samp(measure(ours), measure(theirs)).statistic < 0.063, name


@of_kornia_0_9
def test_views_ask_nothing_of_the_device(images, monkeypatch):
    """What is drawn is drawn on the host: a seed means the same on a GPU, and nobody waits for it.

    The device ``meta`` has no values to ask for, so whatever would wait raises.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know meta
    every = {
        name: {"prob": 0.5}
        for name in ("grayscale", "gaussian_blur", "solarization", "equalization", "horizontal_flip")
    }
    augmentation = {
        **every,
        "rrc": {"enabled": True},
        "color_jitter": JITTER,
        "crop_size": 32,
        "num_crops": 2,
    }
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        views = KorniaViews([augmentation], ZERO, ONE)(images.to(device))
        assert {view.device.type for view in views} == {device}
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_probabilities_are_met(images):
    torch.manual_seed(0)
    image = images[:1].repeat(2000, 1, 1, 1)
    for name in ("horizontal_flip", "grayscale", "solarization"):
        view = KorniaViews([{"crop_size": 32, name: {"prob": 0.3}}], ZERO, ONE)(image)[0]
        changed = (view - image / 255).abs().flatten(1).amax(1) > 1e-4
        assert changed.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 2000) ** 0.5)


def test_normalisation(images):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    plain = [{"crop_size": 32}]
    assert torch.allclose(KorniaViews(plain, mean, std)(images)[0], expected, atol=1e-5)
    assert torch.allclose(TorchvisionViews(plain, mean, std)(pil(images[0]))[0], expected[0], atol=1e-5)
    assert torch.allclose(EvaluationView(32, mean, std)(images), expected, atol=1e-5)


def test_same_seed_same_views(images):
    augmentations = [
        {"rrc": {"enabled": True}, "color_jitter": JITTER, "gaussian_blur": {"prob": 0.5}, "crop_size": 32}
    ]
    kornia, torchvision = KorniaViews(augmentations, ZERO, ONE), TorchvisionViews(augmentations, ZERO, ONE)
    for draw in (lambda: kornia(images)[0], lambda: torchvision(pil(images[0]))[0]):
        torch.manual_seed(5)
        first = draw()
        second = draw()
        torch.manual_seed(5)
        assert torch.equal(draw(), first)
        assert not torch.equal(first, second)


def test_views_reach_spawned_workers():
    augmentations = [
        {"rrc": {"enabled": True}, "gaussian_blur": {"prob": 0.5}, "crop_size": 8},
        {"crop_size": 8},
    ]
    views = pickle.loads(pickle.dumps(TorchvisionViews(augmentations, ZERO, ONE)))
    assert len(views(Image.new("RGB", (12, 12)))) == 2


@pytest.mark.parametrize("shape", [(32, 32), (40, 32), (48, 96), (16, 20)])
def test_evaluation_view_of_image_and_batch_agree(shape):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize(shape[::-1], Image.Resampling.BICUBIC)
    view = EvaluationView(32, ZERO, ONE)
    single = view(image)
    batch = view(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
    assert single.shape == (3, 32, 32) and batch.shape == (1, 3, 32, 32)
    difference = (single - batch[0]).abs() * 255
    assert difference.max() < 5 and difference.mean() < 0.5
    if shape == (32, 32):
        assert torch.equal(
            (batch[0] * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(np.array(image))
        )


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "window", [(0, 0, 40, 50), (3, 5, 20, 17), (10, 0, 30, 48), (7, 9, 32, 32), (0, 1, 1, 2)]
)
def test_equals_pillow(window):
    top, left, rows, columns = window
    image = noise(40, 50)
    expected = image.crop((left, top, left + columns, top + rows)).resize((32, 32), Image.Resampling.BICUBIC)
    along_x = resampling_matrix(torch.tensor([left]), torch.tensor([columns]), 50, 32)[0]
    along_y = resampling_matrix(torch.tensor([top]), torch.tensor([rows]), 40, 32)[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    result = (along_y @ (pixels @ along_x.T).clamp(0, 1)).clamp(0, 1)
    difference = (result * 255 - torch.from_numpy(np.array(expected)).permute(2, 0, 1)).abs()
    # Pillow rounds to whole values after each of the two passes
    assert difference.max() < 2
    assert difference.mean() < 0.5


def test_full_scale_of_the_same_size_is_the_identity():
    torch.manual_seed(0)
    images = torch.rand(16, 3, 32, 32)
    crop = BatchedResizedCrop(32, (1.0, 1.0))
    same = (crop(images) - images).abs().flatten(1).amax(1) < 1e-5
    # A candidate a pixel short on one side fits too, in torchvision as here, so not every crop is the whole.
    assert same.any()


@pytest.mark.parametrize("shape", [(32, 32), (40, 64), (10, 60)])
def test_windows_are_distributed_as_torchvisions(shape):
    torch.manual_seed(0)
    height, width = shape
    count = 4000
    ours = sample_crops(count, height, width, (0.08, 1.0)).float()
    blank = Image.new("RGB", (width, height))
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ).float()
    error = 5 * (theirs.var(0) * 2 / count).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= error + 1e-3).all()
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=0.02)
    assert (ours[:, 0] + ours[:, 2]).max() <= height and (ours[:, 1] + ours[:, 3]).max() <= width
    assert ours.min() >= 0 and ours[:, 2:].min() >= 1


def test_images_get_different_crops_of_their_own():
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32).repeat(8, 1, 1, 1)
    result = BatchedResizedCrop(24, (0.08, 1.0))(images)
    assert result.shape == (8, 3, 24, 24)
    assert len({tuple(image.flatten().tolist()) for image in result}) == 8
    constant = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 32, 32) / 8
    assert torch.allclose(BatchedResizedCrop(24, (0.08, 1.0))(constant), constant[..., :24, :24], atol=1e-5)


def test_missing_keys_do_nothing_to_the_image():
    assert parse_augmentations([{"crop_size": 32}]) == [Augmentation(crop_size=32)]


def test_reads_solo_learns_grammar():
    nodes = OmegaConf.create(
        """
        - rrc: {enabled: True, crop_min_scale: 0.2, crop_max_scale: 0.9}
          color_jitter: {prob: 0.8, brightness: 0.4, contrast: 0.3, saturation: 0.2, hue: 0.1}
          grayscale: {prob: 0.2}
          gaussian_blur: {prob: 0.5}
          solarization: {prob: 0.1}
          equalization: {prob: 0.05}
          horizontal_flip: {prob: 0.5}
          crop_size: 96
          num_crops: 2
        - rrc: {enabled: False}
          color_jitter: {prob: 0.0}
          crop_size: 32
          mean: [0.5, 0.5, 0.5]
        """
    )
    full, plain = parse_augmentations(nodes)
    assert full == Augmentation(96, 2, (0.2, 0.9), 0.8, 0.4, 0.3, 0.2, 0.1, 0.2, 0.5, 0.1, 0.05, 0.5)
    assert plain == Augmentation(32)
    assert parse_augmentations([full, plain]) == [full, plain]


def test_a_crop_of_everything_is_no_crop():
    whole = {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}
    assert parse_augmentations([{"crop_size": 32, "rrc": whole}]) == [Augmentation(crop_size=32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": None}, r"augmentations\.0\.crop_size must be set"),
        ({"num_crops": 0}, r"augmentations\.0\.num_crops must be an integer >= 1, got 0"),
        ({"rrc": {"enabled": True, "crop_min_scale": 0.0}}, r"crop_min_scale must be a number > 0 and <= 1"),
        ({"rrc": {"enabled": True, "crop_max_scale": 1.1}}, r"crop_max_scale must be a number > 0 and <= 1"),
        ({"rrc": {"crop_min_scale": 0.5, "crop_max_scale": 0.4}}, r"crop_min_scale must be at most"),
        ({"rrc": {"enabled": "yes"}}, r"rrc\.enabled must be True or False"),
        ({"grayscale": {"prob": 1.5}}, r"augmentations\.0\.grayscale\.prob must be a number >= 0 and <= 1"),
        ({"horizontal_flip": {"prob": "half"}}, r"horizontal_flip\.prob must be a number >= 0 and <= 1"),
        ({"color_jitter": {"hue": 0.6}}, r"color_jitter\.hue must be a number >= 0 and <= 0\.5"),
        ({"color_jitter": {"contrast": -1}}, r"color_jitter\.contrast must be a number >= 0"),
        ({"color_jitter": {"brightnes": 1}}, r"did you mean 'brightness'"),
        ({"color_jiter": {"prob": 1}}, r"did you mean 'color_jitter'"),
        ({"grayscale": 0.2}, r"grayscale must be a block of keys"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        parse_augmentations([{"crop_size": 32, **change}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nodes", [[], None, {"rrc": {}}, "symmetric"])
def test_must_be_a_list(nodes):
    with pytest.raises(UserError, match="augmentations must be a list"):
        parse_augmentations(nodes)
