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


def test_the_releases_stem_has_no_relu():
    """MetaMask's release makes its ResNet a Sequential of the children, where the stem's ReLU is none."""
    usual, released = (build_encoder("resnet18", 32, stem=stem) for stem in ("cifar", "release"))
    assert released.state_dict().keys() == usual.state_dict().keys()
    usual.load_state_dict(released.state_dict())
    children = dict(released.named_children())
    names = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
    by_hand = torch.nn.Sequential(
        *(children[name] for name in names), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    assert (released.conv1.stride, released.conv1.padding, released.conv1.kernel_size) == (
        (1, 1),
        (1, 1),
        (3, 3),
    )
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(released(x), by_hand(x))
    assert (released(x) - usual(x)).norm() > 0.1 * usual(x).norm()


def test_the_releases_weights_start_as_torchs():
    torch.manual_seed(0)
    usual, released = (build_encoder("resnet18", 32, stem=stem) for stem in ("cifar", "release"))
    for name, conv in released.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            bound = conv.weight[0].numel() ** -0.5
            assert 0.9 * bound < conv.weight.abs().max() <= bound, name
    assert usual.layer4[1].conv2.weight.abs().max() > 2 * bound


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
