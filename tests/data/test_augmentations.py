import pytest
from omegaconf import OmegaConf

from metamask_plugin.data.views import Augmentation, parse_augmentations
from metamask_plugin.errors import UserError


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
