import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from metamask_plugin.data.views import BatchedResizedCrop, resampling_matrix, sample_crops


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
