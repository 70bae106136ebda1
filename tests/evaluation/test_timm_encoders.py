"""timm's encoders: what a line names is what comes back, and what cannot be had says why."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.modules import timm_networks

MODEL = "test_efficientnet"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=7).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return model


def images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
@pytest.mark.parametrize("layout", ["plain", "state_dict", "module"])
def test_timm_weights_of_a_file_without_the_classifier(tmp_path, model, suffix, layout):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if layout == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if layout == "plain" else {"state_dict": state, "epoch": 3}, path)
    encoder = load_encoder(f"timm:{MODEL}={path}")
    x = images(64)
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(encoder.backbone(x), expected)
    assert not encoder.backbone.training
    assert encoder.mask is None
    cfg = model.pretrained_cfg
    assert encoder.view == {"crop_size": cfg["input_size"][-1], "mean": cfg["mean"], "std": cfg["std"]}
    assert (encoder.dim, encoder.path, encoder.args) == (expected.shape[1], path, {})


def test_fetched_weights_are_asked_for_and_images_may_have_another_size(monkeypatch):
    asked = []
    create = timm.create_model

    def fetched(name, pretrained=False, **kwargs):
        asked.append({"name": name, "pretrained": pretrained, **kwargs})
        return create(name, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", fetched)
    monkeypatch.setattr(timm_networks, "_check_fetchable", lambda name, setting: None)
    encoder = load_encoder("timm:test_vit.r160_in1k", image_size=64)
    model = {"name": "test_vit.r160_in1k", "num_classes": 0, "img_size": 64}
    # once with weights, then to measure the width of its features
    assert asked == [{**model, "pretrained": True}, {**model, "pretrained": False}]
    assert encoder.view["crop_size"] == 64
    assert encoder.backbone(images(64)).shape == (2, encoder.dim)
    assert encoder.path is None


def test_without_a_network_one_line_says_to_give_a_file(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub\nRetrying in 1 s")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(timm_networks, "_check_fetchable", lambda name, setting: None)
    with pytest.raises(UserError, match=f"give them as a file: timm:{MODEL}=<file>") as caught:
        load_encoder(f"timm:{MODEL}.r160_in1k")
    assert "cannot reach the hub" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_refused_by_their_first_key(tmp_path, model):
    state = model.state_dict()
    first = next(iter(state))
    for change, message in (
        (lambda s: s.pop(first), f"{first} .* is missing"),
        (lambda s: s.update(other=torch.ones(1)), r"other \(1,\) is not part of the encoder"),
        (lambda s: s.update({first: torch.ones(2)}), rf"{first} is \(2,\) in the checkpoint"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=message) as caught:
            load_encoder(f"timm:{MODEL}={tmp_path / 'changed.pth'}")
        assert "\n" not in str(caught.value)


def test_what_is_no_model_no_file_or_no_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        load_encoder("timm:resnet1888")
    with pytest.raises(UserError, match=r"any name in timm\.list_models"):
        load_encoder("timm:")
    with pytest.raises(UserError, match="timm weights must be an existing file"):
        load_encoder(f"timm:{MODEL}={tmp_path / 'none.pth'}")
    for name, content, message in (
        ("x.bin", b"x", "timm weights must be a .safetensors, .pth, .pt file"),
        ("x.safetensors", b"x", "timm weights must be a complete safetensors file"),
        ("x.pth", b"x", "must be a complete file written by torch.save"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_encoder(f"timm:{MODEL}={tmp_path / name}")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="timm weights must be a state dict of tensors"):
        load_encoder(f"timm:{MODEL}={tmp_path / 'empty.pth'}")
    with pytest.raises(UserError, match="options of a timm model must be image_size only"):
        load_encoder(f"timm:{MODEL}", host="solo")
