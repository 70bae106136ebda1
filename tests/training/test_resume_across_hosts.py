"""A run goes on under the other host only where that is the same training."""

import json

import pytest
import torch
from method_config import baseline_config
from omegaconf import OmegaConf
from torch import nn

import metamask_plugin.host  # noqa: F401  (solo-learn's networks)
from metamask_plugin.errors import UserError
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.training.resume import check_resumable


class Method(nn.Module):
    """As much of a method as the check looks at."""

    def __init__(self, host, name="resnet18", size=32, optimizer="sgd", **kwargs):
        super().__init__()
        self.backbone = build_encoder(name, size, **kwargs)
        changes = {"host": host, "optimizer__name": optimizer, "backbone__kwargs": kwargs}
        self.cfg = baseline_config(name, size, **changes)


def written(tmp_path, method, **args):
    content = {"state_dict": method.state_dict(), "optimizer_states": [], "loops": {}}
    torch.save(content, tmp_path / "last.ckpt")
    container = OmegaConf.to_container(method.cfg)
    (tmp_path / "args.json").write_text(json.dumps({**container, **args}))
    return tmp_path / "last.ckpt"


def test_another_padding_of_the_same_shapes_is_refused(tmp_path):
    path = written(tmp_path, Method("solo", stem="solo_cifar"), backbone={"name": "resnet18"})
    check_resumable(path, Method("solo", stem="solo_cifar"))
    with pytest.raises(UserError) as caught:
        check_resumable(path, Method("embedded"))
    message = str(caught.value)
    assert "whose resnet18 is another network of the same shapes" in message
    assert "METAMASK_HOST=solo" in message and "\n" not in message


def test_a_config_from_before_the_key_counts_as_the_embedded_hosts(tmp_path):
    method = Method("embedded")
    path = written(tmp_path, method, host=None)
    check_resumable(path, method)
    with pytest.raises(UserError, match="trained under 'embedded'"):
        check_resumable(path, Method("solo", stem="solo_cifar"))


@pytest.mark.parametrize(("name", "size"), [("conv4", 32), ("conv", 32), ("resnet18", 224)])
def test_the_same_network_goes_on(tmp_path, name, size):
    path = written(tmp_path, Method("solo", name, size))
    assert "state_dict" in check_resumable(path, Method("embedded", name, size))


def test_our_encoders_that_depend_on_the_size_are_compared_too(tmp_path):
    # solo-learn's factory is not told the size: there `conv` is built for 32 pixels
    path = written(tmp_path, Method("solo", "conv", 32), augmentations=[{"crop_size": 64}])
    with pytest.raises(UserError, match="another network of the same shapes"):
        check_resumable(path, Method("embedded", "conv", 64))


def test_lars_keeps_other_settings_under_either_host(tmp_path):
    path = written(tmp_path, Method("solo", "conv4", optimizer="lars"))
    with pytest.raises(UserError, match="optimizer.name='lars'"):
        check_resumable(path, Method("embedded", "conv4", optimizer="lars"))


def test_what_is_no_training_checkpoint_is_named(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"must be a training checkpoint, got .*KeyError: 'optimizer_states'"):
        check_resumable(path, Method("embedded", "conv4"))
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="complete file written by torch.save"):
        check_resumable(path, Method("embedded", "conv4"))
