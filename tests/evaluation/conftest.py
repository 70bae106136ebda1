"""A small trained-looking run folder for the command lines."""

import json

import pytest
import torch

from metamask_plugin.modules.dimensional_mask import DimensionalMask
from metamask_plugin.modules.encoders import build_encoder

ARGS = {
    "method": "metamask",
    "backbone": {"name": "conv4", "kwargs": {"width": 4}},
    "augmentations": [{"crop_size": 16, "num_crops": 2}],
    "data": {"dataset": "digits", "num_workers": 0, "kwargs": {"size": 16}},
}


@pytest.fixture
def run_folder(tmp_path):
    """``last.ckpt`` and ``args.json`` of an untrained encoder of 32 dimensions, the mask 0 on half."""
    torch.manual_seed(0)
    state = {
        f"backbone.{key}": value for key, value in build_encoder("conv4", 16, width=4).state_dict().items()
    }
    mask = DimensionalMask(32)
    mask.weight.data[16:] = 0
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"state_dict": {**state, "mask.weight": mask.weight.data}}, folder / "last.ckpt")
    (folder / "args.json").write_text(json.dumps(ARGS))
    return folder
