"""Loading encoders: what comes back is what was saved, and what cannot be loaded says why."""

import json
import pickle

import pytest
import torch
from torch import nn

import metamask_plugin.host  # noqa: F401  (solo-learn's networks)
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import find_checkpoint, recorded_host
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.modules.dimensional_mask import DimensionalMask
from metamask_plugin.modules.encoders import build_encoder

ARGS = {
    "method": "metamask",
    "backbone": {"name": "conv4", "kwargs": {"width": 4}},
    "augmentations": [{"crop_size": 32}],
}


class Method(nn.Module):
    """The layout of a method's state dict."""

    def __init__(self, parameterisation="free", name="conv4", **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = build_encoder(name, 32, **({"width": 4} if name == "conv4" else kwargs))
        self.classifier = nn.Linear(self.backbone.num_features, 10)
        self.mask = DimensionalMask(self.backbone.num_features, parameterisation)
        parameter = next(self.mask.parameters())
        parameter.data.copy_(torch.linspace(-1, 2, len(parameter)))
        self.task = nn.Linear(4, 4)


def write(folder, method, args=ARGS, file="last.ckpt", **extra):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": method.state_dict(), "epoch": 3, **extra}, folder / file)
    if args is not None:
        (folder / "args.json").write_text(json.dumps(args))
    return folder / file


@pytest.mark.parametrize("parameterisation", ["free", "sigmoid"])
def test_the_encoder_and_the_effective_mask_come_back(tmp_path, parameterisation):
    method = Method(parameterisation)
    method.backbone(torch.randn(8, 3, 32, 32))  # running statistics that are not the initial ones
    path = write(tmp_path, method)
    loaded = load_encoder(path)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.backbone(x), method.backbone.eval()(x))
    torch.testing.assert_close(loaded.mask, method.mask.values())
    assert (loaded.args, loaded.dim, loaded.view) == (ARGS, 32, {"crop_size": 32})
    assert loaded.path == path
    assert not loaded.backbone.training


def test_a_method_without_a_mask_has_none(tmp_path):
    method = Method()
    del method.mask
    assert load_encoder(write(tmp_path, method)).mask is None


def test_a_directory_means_its_last_or_its_only_checkpoint(tmp_path):
    only = write(tmp_path / "a", Method(), file="x-ep=3.ckpt")
    assert load_encoder(tmp_path / "a").path == only == find_checkpoint(tmp_path / "a")
    last = write(tmp_path / "a", Method())
    assert find_checkpoint(tmp_path / "a") == last
    last.unlink()
    write(tmp_path / "a", Method(), file="y.ckpt")
    with pytest.raises(UserError, match=r"a single .ckpt file, got \['x-ep=3.ckpt', 'y.ckpt'\]"):
        find_checkpoint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="train first"):
        find_checkpoint(tmp_path / "b")


def test_of_a_run_of_solo_learns_with_all_its_epochs_the_last_one_is_meant(tmp_path):
    for epoch in (9, 10):
        last = write(tmp_path, Method(), file=f"run-offline-ab12cd34-ep={epoch}.ckpt")
    assert find_checkpoint(tmp_path) == last
    write(tmp_path, Method(), file="another-offline-ab12cd34-ep=99.ckpt")
    with pytest.raises(UserError, match="give the file itself"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("args", "host"),
    [
        ({}, None),
        (ARGS, "embedded"),  # ours, from before the key
        ({**ARGS, "wandb_run_id": None}, "solo"),  # solo-learn's own
        ({**ARGS, "host": "solo"}, "solo"),
        ({**ARGS, "host": "embedded", "wandb_run_id": "1"}, "embedded"),
    ],
)
def test_args_json_says_whose_encoder_it_is(args, host):
    assert recorded_host(args) == host


def test_the_recorded_host_decides_which_resnet_is_built(tmp_path):
    args = {**ARGS, "backbone": {"name": "resnet18"}}
    paddings = []
    for host in ("embedded", "solo"):
        path = write(tmp_path / host, Method(name="resnet18"), {**args, "host": host})
        paddings.append(load_encoder(path).backbone.conv1.padding)
    assert paddings == [(1, 1), (2, 2)]
    assert load_encoder(path, host="embedded").backbone.conv1.padding == (1, 1)
    with pytest.raises(UserError, match="host in args.json must be one of embedded, solo, got 'lightly'"):
        recorded_host({"host": "lightly"})


def test_without_args_json_a_small_resnet_is_not_guessed(tmp_path):
    path = write(tmp_path, Method(name="resnet18"), args=None)
    given = {"backbone_name": "resnet18", "image_size": 32}
    with pytest.raises(UserError, match="host must be solo or embedded.*main_knn.py: --host"):
        load_encoder(path, **given)
    assert load_encoder(path, **given, host="solo").backbone.conv1.padding == (2, 2)
    assert load_encoder(path, **given, backbone_kwargs={"stem": "cifar"}).backbone.conv1.padding == (1, 1)
    # of ImageNet's stem there is only one
    path = write(tmp_path, Method(name="resnet18", stem="imagenet"), args=None)
    assert load_encoder(path, **{**given, "image_size": 224}).backbone.conv1.padding == (3, 3)


def test_solo_learns_older_name_for_the_encoder(tmp_path):
    state = {
        key.replace("backbone.", "encoder."): value
        for key, value in Method().state_dict().items()
        if "mask" not in key
    }
    torch.save({"state_dict": state}, write(tmp_path, Method()))
    assert load_encoder(tmp_path).backbone.num_features == 32


def test_without_args_json_name_and_size_are_asked_for(tmp_path):
    path = write(tmp_path, Method(), args=None)
    with pytest.raises(UserError, match="backbone.name must be given"):
        load_encoder(path)
    with pytest.raises(UserError, match="crop_size must be given"):
        load_encoder(path, backbone_name="conv4", backbone_kwargs={"width": 4})
    loaded = load_encoder(path, backbone_name="conv4", image_size=32, backbone_kwargs={"width": 4})
    assert (loaded.dim, loaded.args, loaded.view) == (32, {}, {"crop_size": 32})


def test_an_image_size_among_the_encoders_options_is_the_one_it_was_built_with(tmp_path):
    args = {**ARGS, "backbone": {"name": "conv", "kwargs": {"image_size": 64}}}
    loaded = load_encoder(write(tmp_path, Method(name="conv"), args=args))
    assert loaded.backbone.layers[0].stride == (4, 4)


def test_a_plain_state_dict_is_a_checkpoint_too(tmp_path):
    torch.save(Method().state_dict(), tmp_path / "weights.pth")
    (tmp_path / "args.json").write_text(json.dumps(ARGS))
    assert load_encoder(tmp_path / "weights.pth").mask.shape == (32,)


def test_the_wrong_encoder_is_named_with_shapes_and_the_right_one(tmp_path):
    path = write(tmp_path, Method())
    with pytest.raises(UserError) as caught:
        load_encoder(path, backbone_name="conv")
    message = str(caught.value)
    assert "does not fit backbone.name='conv'" in message
    assert "layers.0.weight is (4, 3, 3, 3) in the checkpoint and (64, 3, 5, 5) in the encoder" in message
    assert "set backbone.name=conv4" in message
    assert "\n" not in message


def test_missing_and_surplus_keys_are_refused_not_skipped(tmp_path):
    method = Method()
    state = method.state_dict()
    del state["backbone.layers.4.weight"], state["backbone.layers.3.weight"]
    torch.save({"state_dict": state}, write(tmp_path, method))
    with pytest.raises(UserError, match="layers.3.weight .* is missing from the checkpoint.*right name"):
        load_encoder(tmp_path)
    torch.save(
        {"state_dict": {**method.state_dict(), "backbone.fc.bias": torch.ones(3)}}, tmp_path / "last.ckpt"
    )
    with pytest.raises(UserError, match=r"fc.bias \(3,\) is not part of the encoder"):
        load_encoder(tmp_path)


def test_a_mask_of_another_length_is_refused(tmp_path):
    method = Method()
    method.mask = DimensionalMask(5)
    with pytest.raises(UserError, match="mask in .* one weight for each of 32 dimensions"):
        load_encoder(write(tmp_path, method))


def test_paths_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(UserError, match="checkpoint must be an existing file or directory, got .*nowhere"):
        load_encoder(tmp_path / "nowhere.ckpt")
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(UserError, match="must be a .ckpt, .pth, .pt file"):
        load_encoder(tmp_path / "weights.bin")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated"])
def test_damaged_files_are_named_with_their_size(tmp_path, content):
    path = write(tmp_path, Method())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(UserError, match=r"written by torch.save, got \d+ bytes .* truncated") as caught:
        load_encoder(path)
    assert "\n" not in str(caught.value)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_files_with_code_are_refused_unread(tmp_path):
    payload = Payload(tmp_path / "was-run")
    path = write(tmp_path, Method(), payload=payload)
    with pytest.raises(UserError, match="can run code"):
        load_encoder(path)
    path.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(UserError, match="can run code"):
        load_encoder(path)
    assert not (tmp_path / "was-run").exists()
    pickle.loads(pickle.dumps(payload)).close()
    assert (tmp_path / "was-run").exists(), "the payload itself should work"


def test_a_timm_model_with_a_hidden_layer_comes_back(tmp_path):
    encoder = build_encoder("mobilenetv3_small_050", 32).eval()
    state = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
    torch.save(
        {"state_dict": {**state, "mask.weight": torch.ones(encoder.num_features)}}, tmp_path / "last.ckpt"
    )
    args = {"backbone": {"name": "mobilenetv3_small_050"}, "augmentations": [{"crop_size": 32}]}
    (tmp_path / "args.json").write_text(json.dumps(args))
    loaded = load_encoder(tmp_path)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.backbone(x), encoder(x))
