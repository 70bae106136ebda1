"""``main_linear.py finetune=True``: what it writes, which protocol it means, and its one-line errors."""

import contextlib
import json

import pytest
import torch
from omegaconf import OmegaConf

from metamask_plugin.cli.linear import run
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.evaluation.finetune import FineTuneProtocol, simclr_protocol


def configured(run_folder, **changes):
    cfg = OmegaConf.create(
        {
            "name": "few",
            "pretrained_feature_extractor": str(run_folder),
            "checkpoint": {"dir": str(run_folder.parent / "out")},
            "accelerator": "cpu",
            "finetune": True,
            "data": {"fraction": 0.1},
            "protocol": "custom",
            "optimizer": {"name": "sgd", "batch_size": 32, "lr": 0.8},
            "max_epochs": 2,
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def test_files_hold_the_numbers_and_a_network_that_is_read_again(run_folder, capsys):
    result = run(configured(run_folder))
    (folder,) = (run_folder.parent / "out" / "finetune").glob("few-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["acc@1"], summary["acc@5"]) == (result.acc1_last, result.acc5_last)
    assert (summary["best acc@1"], summary["best_epoch"]) == (result.acc1_best, result.best_epoch)
    assert summary["images"] == result.images == pytest.approx(130, abs=5)
    assert (summary["fraction"], summary["subset_seed"], summary["subset_file"]) == (0.1, 0, None)
    assert summary["curve"] == [acc1 for acc1, _ in result.accuracies] and len(summary["curve"]) == 2
    assert summary["protocol_settings"]["lr"] == pytest.approx(0.1)
    assert summary["checkpoint"] == str(run_folder / "last.ckpt")
    assert json.loads((folder / "args.json").read_text())["finetune"] is True
    out = capsys.readouterr().out
    assert f"{result.acc1_last:.2f}" in out and f"{result.images} of 1297 training images" in out

    tuned = load_encoder(folder / "finetuned.pt", "conv4", 16, {"width": 4}, host="embedded").backbone
    trained = load_encoder(run_folder).backbone
    key, weight = next(iter(tuned.state_dict().items()))
    assert torch.equal(weight, result.state_dict[f"backbone.{key}"])
    assert not torch.equal(weight, trained.state_dict()[key])
    run(configured(run_folder, name="unwritten", checkpoint__enabled=False))
    assert not list(folder.parent.glob("unwritten*"))
    run(configured(run_folder, data__fraction=0.2))
    assert len(list(folder.parent.iterdir())) == 2


@pytest.mark.fault("numbers")
def test_a_fine_tuning_that_diverges_is_said_or_refused(run_folder, capsys):
    for lr in (100, 1e6):
        with contextlib.suppress(SystemExit):
            run(configured(run_folder, optimizer__lr=lr))
        err = capsys.readouterr().err
        assert "optimizer.lr" in err and err.startswith(("warning: fine-tuning ends with ", "error: ")), err


def meant(cfg, monkeypatch):
    """The arguments that ``finetune`` is called with."""
    seen = {}

    def stop(backbone, data, **arguments):
        seen.update(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("metamask_plugin.cli.linear.finetune", stop)
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    return seen


def test_the_paper_means_simclrs_protocol_at_the_batch_size_that_is_given(run_folder, monkeypatch):
    cfg = configured(run_folder, protocol="paper", data__fraction=0.01, seed=9)
    seen = meant(cfg, monkeypatch)
    assert seen["protocol"] == simclr_protocol(0.01, 32)
    assert (seen["fraction"], seen["subset_seed"], seen["seed"]) == (0.01, 0, 9)
    del cfg.optimizer, cfg.protocol
    cfg.data.augmentations = {"rrc": {"crop_min_scale": 0.5}, "horizontal_flip": {"prob": 0.0}}
    cfg.data.subset_seed = 4
    seen = meant(cfg, monkeypatch)
    assert seen["protocol"] == simclr_protocol(0.01, 256, 0.5, 0.0)
    assert seen["subset_seed"] == 4


def test_the_blocks_mean_what_they_say(run_folder, monkeypatch):
    cfg = configured(run_folder, scheduler__name="cosine", optimizer__kwargs__nesterov=True)
    expected = FineTuneProtocol("sgd", 0.1, 2, 32, scheduler="cosine", nesterov=True)
    assert meant(cfg, monkeypatch)["protocol"] == expected


def test_without_a_fraction_all_labels_of_the_training_data_are_used(run_folder, monkeypatch):
    cfg = configured(run_folder)
    del cfg.data.fraction
    assert meant(cfg, monkeypatch)["fraction"] == -1
    path = run_folder / "args.json"
    args = json.loads(path.read_text())
    path.write_text(json.dumps({**args, "data": {**args["data"], "fraction": 0.2}}))
    assert meant(cfg, monkeypatch)["fraction"] == 0.2, "the images that the encoder was trained on"
    cfg.data.fraction = -1
    assert meant(cfg, monkeypatch)["fraction"] == -1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masked": True}, "masked must be False with finetune=True"),
        ({"head": "mlp"}, "head must be linear with finetune=True"),
        ({"cutmix": 1.0}, "cutmix must be off here, got 1.0"),
        ({"protocol": "solo"}, "protocol must be one of custom, paper, got 'solo'"),
        ({"data__fraction": 2}, "data.fraction must be between 0 and 1"),
        ({"data__subset_file": "none.txt"}, "data.subset_file must be left out where images lie in memory"),
        ({"optimizer__batch_size": 1}, "optimizer.batch_size must be >= 2 to fine-tune"),
        ({"optimizer__lr": 1e9}, "optimizer.lr must keep the loss of fine-tuning finite"),
        ({"data__augmentations__rrc__crop_min_scale": 3}, "crop_min_scale must be a number > 0 and <= 1"),
        ({"finetune": "yes"}, "finetune must be True or False"),
    ],
)
def test_bad_settings_end_with_one_line_and_code_2(run_folder, changes, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run(configured(run_folder, **changes))
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
