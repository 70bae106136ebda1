"""Precisions that convert the whole model: trained, gone on with, and evaluated like any other."""

import pytest
import torch
from killed_runs import config
from omegaconf import OmegaConf
from refusals import refused

from metamask_plugin.cli import knn, linear, pretrain

ADDED = "Lightning-AI/pytorch-lightning#19980, Lightning-AI/pytorch-lightning#12591"
QUICK = [("bf16-true", "metamask_barlow", "kornia")]
OTHERS = [
    (precision, name, pipeline)
    for precision in ("bf16-true", "64-true")
    for name in ("metamask_barlow", "icl_msr_simclr")
    for pipeline in ("kornia", "torchvision")
    if (precision, name, pipeline) not in QUICK
]
DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64, "64": torch.float64}


@pytest.mark.fault("numbers", source=ADDED)
@pytest.mark.parametrize(
    ("precision", "name", "pipeline"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_a_run_of_true_precision(tmp_path, capsys, precision, name, pipeline):
    evaluated = ["++evaluation.enabled=True", "evaluation.knn.k=[5]", "++evaluation.linear.protocol=fast"]
    settings = [
        f"precision={precision}",
        f"++data.pipeline={pipeline}",
        "data.num_workers=0",
        "++data.fraction=0.05",
        "optimizer.batch_size=16",
        "evaluation.knn.every_n_epochs=1",
        *evaluated,
    ]
    folder = pretrain.run(config(tmp_path / "a", "max_epochs=1", *settings, name=name))
    saved = torch.load(folder.last_checkpoint, weights_only=True)["state_dict"]
    assert {saved["backbone.layers.0.weight"].dtype, saved["classifier.weight"].dtype} == {DTYPES[precision]}
    assert (folder.path / "table.txt").exists()
    further = f"++resume_from_checkpoint={folder.last_checkpoint}"
    no_report = "++evaluation.final_report=False"
    more = pretrain.run(config(tmp_path / "b", "max_epochs=2", no_report, *settings, further, name=name))
    assert torch.load(more.last_checkpoint, weights_only=True)["epoch"] == 1
    knn.main(["--pretrained_checkpoint_dir", str(more.path), "--k", "5"])
    probe = {
        "pretrained_feature_extractor": str(more.path),
        "protocol": "fast",
        "checkpoint": {"enabled": False},
    }
    linear.run(OmegaConf.create(probe))
    assert "acc@1" in capsys.readouterr().out


@pytest.mark.fault("numbers", source=ADDED)
@pytest.mark.parametrize("precision", ["16-true", "16", "16-mixed"])
def test_half_precision_is_refused_on_the_cpu(tmp_path, capsys, precision):
    line = refused(lambda: pretrain.run(config(tmp_path, f"precision={precision}")), capsys)
    assert line.startswith("error: precision must be another than 16-mixed and 16-true on the CPU")
    assert not list(tmp_path.rglob("*.ckpt"))
