import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.modules.encoders import ENCODERS, build_encoder


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_maps_images_to_features(name, size):
    encoder = build_encoder(name, size).eval()
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, size, size)).shape == (2, encoder.num_features)


@pytest.mark.parametrize(
    ("name", "features"), [("conv4", 256), ("conv", 256), ("fc", 1024), ("resnet18", 512), ("resnet50", 2048)]
)
def test_feature_dimensions(name, features):
    assert build_encoder(name, 32).num_features == features


@pytest.mark.parametrize(
    ("size", "stride", "pools"), [(32, 1, False), (64, 1, True), (96, 1, True), (224, 2, True)]
)
def test_resnet_stem_fits_the_image(size, stride, pools):
    network = build_encoder("resnet18", size)
    assert network.conv1.stride == (stride, stride)
    assert network.conv1.kernel_size == ((7, 7) if size == 224 else (3, 3))
    assert isinstance(network.maxpool, torch.nn.MaxPool2d) == pools


def test_stem_can_be_chosen():
    assert build_encoder("resnet18", 32, stem="imagenet").conv1.kernel_size == (7, 7)


def test_solo_learns_cifar_stem_pads_by_two():
    ours, theirs = (build_encoder("resnet18", 32, stem=stem) for stem in ("cifar", "solo_cifar"))
    assert theirs.conv1(torch.randn(1, 3, 32, 32)).shape[2:] == (34, 34)
    theirs.load_state_dict(ours.state_dict())  # the shapes do not tell them apart
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("size", [32, 64])
def test_alexnets_last_map_is_four_by_four(size):
    assert build_encoder("conv", size).layers(torch.randn(1, 3, size, size)).shape[2:] == (4, 4)


def test_a_timm_model_by_name():
    encoder = build_encoder("test_efficientnet", 64).eval()
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, encoder.num_features)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("resnet19", 32), {}, "did you mean 'resnet18'"),
        (("conv", 8), {}, "crop_size must be >= 16"),
        (("conv4", 32), {"depth": 2}, "backbone.kwargs do not fit backbone.name='conv4'"),
        (("resnet18", 32), {"stem": "cifr"}, "did you mean 'cifar'"),
    ],
)
def test_wrong_input(args, kwargs, message):
    with pytest.raises(UserError, match=message):
        build_encoder(*args, **kwargs)
