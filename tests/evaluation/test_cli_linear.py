"""``main_linear.py``: every shipped config, the protocol it means, its files, and its one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metamask_plugin.cli.known import shipped
from metamask_plugin.cli.linear import run
from metamask_plugin.evaluation.linear import PROTOCOLS, LinearProtocol, build_head

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "linear"
NAMES = shipped("linear")
FINETUNED = [name for name in NAMES if name.endswith("semi_supervised")]


def composed(name, *overrides, folder=CONFIGS, hydra=False):
    with initialize_config_dir(str(folder), version_base="1.2"):
        return compose(name, list(overrides), return_hydra_config=hydra)


def configured(run_folder, **changes):
    cfg = OmegaConf.create(
        {
            "name": "probe",
            "pretrained_feature_extractor": str(run_folder / "last.ckpt"),
            "checkpoint": {"dir": str(run_folder.parent / "out")},
            "accelerator": "cpu",
            "protocol": "custom",
            "optimizer": {"name": "adam", "batch_size": 256, "lr": 0.01},
            "max_epochs": 3,
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def refused(cfg, capsys):
    with pytest.raises(SystemExit) as caught:
        run(cfg)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", NAMES)
def test_every_config_composes_to_the_same_both_ways_and_steps_once(name, run_folder):
    folder, _, stem = name.rpartition("/")
    cfg = composed(name)
    assert composed(stem, folder=CONFIGS / folder) == cfg
    hydra = composed(name, hydra=True).hydra
    assert (hydra.output_subdir, hydra.run.dir) == (None, ".")
    assert "handlers" not in hydra.job_logging, "Hydra should write no log file"
    assert (CONFIGS / f"{name}.yaml").read_text().startswith("# @package _global_\n")

    # the encoder and data at hand, all labels, everything else as it stands but for the papers' 500 epochs
    OmegaConf.set_struct(cfg, False)
    assert (cfg.get("finetune") is True) == (name in FINETUNED)
    if name in FINETUNED:
        cfg.protocol = "custom"
        cfg.scheduler = {"name": "cosine"}
        # two epochs of large batches are hardly a step
        cfg.optimizer.batch_size, cfg.optimizer.lr = 32, 0.4
    shortened = cfg.get("protocol") in ("paper", "icl_msr")
    if shortened:
        cfg.protocol = "fast"
    cfg.pretrained_feature_extractor = str(run_folder)
    cfg.checkpoint.dir = str(run_folder.parent)
    cfg = OmegaConf.merge(cfg, {"backbone": {"name": "conv4"}, "max_epochs": 2})
    cfg.data = {"dataset": "digits", "num_workers": 0}
    if name == "confounded_digits":
        OmegaConf.update(cfg, "protocol", "fast")
    result = run(cfg)
    assert result.acc1_last > 50
    assert result.epochs == (100 if shortened or name == "confounded_digits" else 2)
    kind = "finetune" if name in FINETUNED else "linear"
    assert list((run_folder.parent / kind).glob(f"{cfg.name}-*/summary.json"))


def test_the_shipped_optimizer_blocks_are_solo_learns_protocol(run_folder, monkeypatch):
    seen = []

    def stop(train, test, num_classes, protocol, *rest):
        seen.append(protocol)
        raise KeyboardInterrupt

    monkeypatch.setattr("metamask_plugin.cli.linear.linear_probe", stop)
    changes = {"pretrained_feature_extractor": str(run_folder), "backbone": {"name": "conv4"}}
    for overrides in ([], ["protocol=paper"], ["optimizer.batch_size=512", "optimizer.lr=0.3"]):
        cfg = OmegaConf.merge(composed("cifar/metamask_barlow", *overrides), changes)
        cfg.data = {"dataset": "digits", "num_workers": 0}
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    assert seen[0] == PROTOCOLS["solo"]
    assert seen[1] == PROTOCOLS["paper"]
    assert seen[2] == LinearProtocol("sgd", 0.6, 100, 512, 0, scheduler="step", lr_decay_steps=(60, 80))


def test_files_hold_the_numbers_and_a_head_that_fits(run_folder, capsys):
    result = run(configured(run_folder, head="mlp"))
    (folder,) = (run_folder.parent / "out" / "linear").glob("probe-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["acc@1"] == result.acc1_last > 50
    assert summary["checkpoint"] == str(run_folder / "last.ckpt")
    assert summary["protocol_settings"]["epochs"] == 3
    assert json.loads((folder / "args.json").read_text())["head"] == "mlp"
    saved = torch.load(folder / "head.pt", weights_only=True)
    build_head(saved["head"], 32, 10).load_state_dict(saved["state_dict"])
    table = capsys.readouterr().out
    assert f"{result.acc1_last:.2f}" in table
    run(configured(run_folder, name="unwritten", checkpoint__enabled=False))
    assert not list(folder.parent.glob("unwritten*"))


@pytest.mark.fault("studies")
def test_another_encoder_or_protocol_has_a_folder_of_its_own_and_the_same_command_the_same(run_folder):
    probes = run_folder.parent / "out" / "linear"
    run(configured(run_folder))
    (first,) = probes.iterdir()
    before = (first / "summary.json").read_bytes()
    run(configured(run_folder, name="probe"))
    assert list(probes.iterdir()) == [first] and (first / "summary.json").read_bytes() == before
    for change in ({"masked": True}, {"seed": 6}, {"max_epochs": 2}, {"data__dataset": "digits"}):
        run(configured(run_folder, **change))
    found = len(list(probes.iterdir()))
    assert found >= 4
    checkpoint = torch.load(run_folder / "last.ckpt", weights_only=True)
    key = next(iter(checkpoint["state_dict"]))
    checkpoint["state_dict"][key] *= 1.01
    torch.save(checkpoint, run_folder / "last.ckpt")
    run(configured(run_folder))
    assert len(list(probes.iterdir())) == found + 1
    assert (first / "summary.json").read_bytes() == before


@pytest.mark.fault("studies")
def test_a_head_is_written_whole_or_not_at_all(run_folder, monkeypatch):
    run(configured(run_folder))
    (head,) = (run_folder.parent / "out" / "linear").glob("probe-*/head.pt")
    before = head.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(configured(run_folder))
    assert head.read_bytes() == before and not list(head.parent.glob(".*"))


@pytest.mark.fault("numbers")
def test_a_probe_that_diverges_is_said(run_folder, capsys):
    run(configured(run_folder))
    assert "warning" not in capsys.readouterr().err
    run(configured(run_folder, optimizer__lr=1e9, optimizer__batch_size=1024))
    err = capsys.readouterr().err
    assert "warning: the probe ends with a training loss of " in err and "is too high" in err


def test_masked_dimensions_are_not_used(run_folder):
    plain = run(configured(run_folder))
    masked = run(configured(run_folder, masked=True))
    weight = masked.state_dict["classifier.0.weight"]
    assert (weight[:, 16:] == 0).all()
    assert (plain.state_dict["classifier.0.weight"][:, 16:] != 0).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 0.8}, "mixup must be off here, got 0.8"),
        ({"data__subset_file": "1percent.txt"}, "data.subset_file must be left out without finetune=True"),
        ({"pretrained_feature_extractor": "None"}, "add pretrained_feature_extractor="),
        ({"pretrained_feature_extractor": "/nowhere.ckpt"}, "an existing file or directory"),
        ({"backbone__name": "resnet18"}, "set backbone.name=conv4"),
        ({"protocol": "papers"}, "did you mean 'paper'"),
        ({"head": "tree"}, "head must be one of linear, mlp"),
        ({"optimizer__name": "lars"}, "optimizer.name must be one of adam, adamw, sgd"),
        ({"optimizer__lr": "fast"}, "optimizer.lr must be a number > 0, got 'fast'"),
        ({"optimizer__batch_size": 2.5}, "optimizer.batch_size must be an integer"),
        ({"scheduler__name": "warmup"}, "scheduler.name must be one of"),
        ({"accelerator": "tpu"}, "accelerator must be one of"),
        ({"data__augmentations__crop_size": 0}, "data.augmentations.crop_size must be an integer >= 1"),
        ({"data__format": "h5"}, "data.format must be image_folder or dali"),
        ({"masked": "yes"}, "masked must be True or False"),
    ],
)
def test_bad_settings_end_with_one_line_and_code_2(run_folder, changes, message, capsys):
    assert message in refused(configured(run_folder, **changes), capsys)


def test_masked_without_a_mask_is_refused(run_folder, capsys):
    path = run_folder / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["mask.weight"]
    torch.save({"state_dict": state}, path)
    assert "masked must be False, as metamask has no mask" in refused(
        configured(run_folder, masked=True), capsys
    )


@pytest.mark.slow
def test_the_script_finds_its_configs_from_anywhere(run_folder):
    command = [
        sys.executable,
        str(ROOT / "main_linear.py"),
        "--config-name",
        "confounded_digits",
        f"pretrained_feature_extractor={run_folder}",
        "protocol=fast",
        "data.dataset=digits",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run_folder)
    assert done.returncode == 0, done.stderr
    assert "protocol fast" in done.stdout
    assert list(run_folder.glob("trained_models/linear/confounded_digits-linear-*/summary.json"))
    assert not (run_folder / "outputs").exists()
