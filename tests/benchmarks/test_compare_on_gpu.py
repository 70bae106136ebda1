"""The short comparison on a GPU: its arms, and how its records become a table."""

import argparse
import json
from pathlib import Path

import pytest
from compare_on_gpu import ARMS, config, record_path, summary

from metamask_plugin.cli.config import complete, with_own_task_settings


def arguments(out, *overrides):
    return argparse.Namespace(data=Path("cifar"), out=out, epochs=10, overrides=list(overrides))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_config(tmp_path, arm):
    given = arguments(tmp_path, "backbone.name=conv4", "accelerator=cpu", "performance.cuda_graph=False")
    cfg = complete(with_own_task_settings(config(arm, 7, given)))
    assert (cfg.backbone.name, cfg.seed, cfg.max_epochs, cfg.optimizer.batch_size) == ("conv4", 7, 10, 512)
    released = cfg.method_kwargs.get("preset") == "official"
    assert released == arm.startswith("release")
    assert cfg.optimizer.name == ("sgd" if released else "adamw")


def test_the_table_has_deviations_where_there_are_seeds(tmp_path):
    for arm, seed, value in (("SimCLR", 5, 60.0), ("SimCLR", 6, 62.0), ("MetaMask, k = 4", 5, 61.0)):
        path = record_path(arm, seed, arguments(tmp_path))
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"arm": arm, "seed": seed, "epochs": 10, "linear": value}))
    lines = summary(arguments(tmp_path)).splitlines()
    assert lines[2].split() == ["MetaMask,", "k", "=", "4", "1", "61.00"]
    assert lines[3].split() == ["SimCLR", "2", "61.00", "±", "1.41"]
    assert len(json.loads((tmp_path / "comparison.json").read_text())["records"]) == 3
