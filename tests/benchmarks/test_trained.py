"""A method and its images back from a run folder."""

import json

import pytest
import torch
from method_config import method_config
from omegaconf import OmegaConf
from trained import backbone_name, load_method, two_batches

from metamask_plugin.methods import MetaMask


@pytest.fixture
def run_folder(tmp_path):
    torch.manual_seed(0)
    cfg = method_config(data__dataset="digits", data__num_workers=0)
    model = MetaMask(cfg)
    model.mask.weight.data += torch.rand_like(model.mask.weight)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    (tmp_path / "args.json").write_text(json.dumps(OmegaConf.to_container(model.cfg, resolve=True)))
    return tmp_path, model


def test_the_whole_method_comes_back_and_batches_share_no_image(run_folder):
    path, model = run_folder
    loaded, data = load_method(path, 4)
    assert backbone_name(path) == "conv4"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    first, second = two_batches(data, torch.device("cpu"))
    assert [view.shape for view in first] == [(4, 3, 32, 32)] * 2
    assert not any(torch.equal(ours, theirs) for ours in first[0] for theirs in second[0])


def test_a_checkpoint_of_something_else_is_refused(run_folder):
    path, model = run_folder
    state = {name: value for name, value in model.state_dict().items() if name != "mask.weight"}
    torch.save({"state_dict": state}, path / "last.ckpt")
    with pytest.raises(ValueError, match="mask.weight"):
        load_method(path, 4)


def test_too_large_a_batch_says_so(run_folder):
    path, _ = run_folder
    _, data = load_method(path, 1000)  # of 1,297 training images
    with pytest.raises(ValueError, match="lower --batch"):
        two_batches(data, torch.device("cpu"))
