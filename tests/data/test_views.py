import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from metamask_plugin.data.confounded_digits import confounded_digits
from metamask_plugin.data.views import EvaluationView, KorniaViews, TorchvisionViews, blur_kernel

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
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
    import metamask_plugin.data.views as views

    for sigma in (0.5, 1.0, 2.0):
        monkeypatch.setattr(views, "BLUR_SIGMA", (sigma, sigma + 1e-6))
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
