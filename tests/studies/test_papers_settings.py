"""The studies at ``size=paper``: what the papers print of their arms; every documented command composes."""

import re
import shlex
from pathlib import Path

import pytest
from composing import composed

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.command_line import with_pretraining_overrides
from metamask_plugin.cli.known import shipped
from metamask_plugin.studies.pretraining import pretraining_config
from metamask_plugin.studies.spec import study_of

ROOT = Path(__file__).resolve().parents[2]

MSR = {  # ICL-MSR, Section 6.3: lambda, gamma, n
    "icl_msr_table1": {
        "SimCLR + MSR": (1, 1, 6),
        "BYOL + MSR": (0.1, 1, 6),
        "LMCL + MSR": (0.1, 1, 6),
        "ReSSL + MSR": (0.01, 1, 6),
    },
    "icl_msr_table2": {
        "SimCLR + MSR": (0.1, 1, 6),
        "CMC + MSR": (0.1, 0.1, 6),
        "DCL + MSR": (1, 1, 6),
        "LMCL + MSR": (1, 1, 6),
        "SwAV + MSR": (0.1, 1, 6),  # not in the paper: SimCLR's
    },
    "icl_msr_table3": dict.fromkeys(("SimCLR + MSR", "SwAV + MSR", "BYOL + MSR"), (0.1, 1, 6)),
    "icl_msr_table4": dict.fromkeys(("SimCLR + MSR", "BYOL + MSR"), (0.1, 1, 14)),
    # not in the paper: Table 1's
    "icl_msr_fig4": {"SimCLR + MSR": (1, 1, 6), "BYOL + MSR": (0.1, 1, 6)},
}


def study(name, *overrides):
    return study_of(composed("study", name, *overrides))


@pytest.mark.parametrize("name", MSR)
def test_lambda_gamma_and_n_of_every_row_with_msr(name):
    found = study(name, "seeds=[5]")
    arms = [(trial.factors["arm"], pretraining_config(found, trial)) for trial in found.trials]
    msr = [(arm, cfg) for arm, cfg in arms if arm.endswith(" + MSR")]
    assert {arm for arm, _ in msr} == set(MSR[name])
    for arm, cfg in msr:
        kwargs = cfg.method_kwargs
        assert (kwargs.lamb, kwargs.gamma, kwargs.regularizer.n) == MSR[name][arm], arm
        assert cfg.method == "icl_msr" and kwargs.meta.when == "epoch_end", "Algorithm 1"
    assert {cfg.method for arm, cfg in arms if not arm.endswith(" + MSR")} == {"baseline"}


def test_what_varies_in_figures_4_and_7_is_the_redundancy_heads_output():
    for name, dimension in (("metamask_fig4", 4096), ("metamask_fig7", 16384)):
        found = study(name, "seeds=[5]", f"factors.dimension=[{dimension}]")
        for trial in found.trials:
            kwargs = pretraining_config(found, trial).method_kwargs
            task = (kwargs.task_kwargs.proj_hidden_dim, kwargs.task_kwargs.proj_output_dim)
            drr = (kwargs.redundancy.proj_hidden_dim, kwargs.redundancy.proj_output_dim)
            if trial.factors["arm"].startswith("MetaMask"):
                assert (drr, task) == ((2048, dimension), (2048, 256))
            else:
                assert task == (2048, dimension)


def test_the_release_is_an_arm_where_its_number_is_quoted():
    arms = {
        "metamask_table2": "SimCLR + MetaMask (release)",
        **dict.fromkeys(("metamask_table4", "metamask_fig6", "metamask_fig10"), "MetaMask (release)"),
        **dict.fromkeys(("comparison", "comparison_equal_time", "comparison_cpu"), "MetaMask (release)"),
    }
    for name, arm in arms.items():
        found = study(name, "seeds=[5]")
        trials = [trial for trial in found.trials if trial.factors["arm"] == arm]
        assert trials and all("ablation=official" in trial.overrides for trial in trials), name
        if name.startswith("metamask"):
            assert 86.01 in [row["value"] for row in found.paper if row.get("arm") == arm], name


def test_figure_8_masks_the_weak_encoder_of_table_1():
    found = study("metamask_fig8")
    weak, strong = (pretraining_config(found, trial) for trial in found.trials)
    assert (weak.optimizer.batch_size, weak.backbone.name) == (64, "conv")
    assert (strong.optimizer.batch_size, strong.backbone.name) == (512, "resnet18")


def commands():
    """Of the documentation and of the configs' headers, but those that need files or end in dots."""
    texts = [
        ROOT / "docs" / "studies.md",
        *(SCRIPTS / "study" / f"{name}.yaml" for name in shipped("study")),
    ]
    lines = "\n".join(file.read_text().replace("\\\n#  ", " ").replace("\\\n", " ") for file in texts)
    found = dict.fromkeys(re.findall(r"python main_study.py (--config-name [^#\n]*)", lines))
    return [command for command in found if "timm:" not in command and "..." not in command]


@pytest.mark.parametrize("command", commands())
def test_every_documented_command_composes(command):
    command = re.sub(r"<[^>]*>", "folder", command)
    words = shlex.split(re.sub(r"\[size=digits\]|\[-- .*?\]", "", command))
    words = [word for word in words if not word.startswith(("hydra", "submitit"))]
    (name, *overrides) = with_pretraining_overrides(words)[1:]
    found = study(name, "seeds=[5]", *overrides)
    trial = found.trials[-1]
    assert trial.checkpoint or pretraining_config(found, trial).max_epochs >= 1


def test_documented_overrides_compose():
    lists = "measures.few_labels.subset_files=[1percent.txt,10percent.txt]"
    files = study("icl_msr_table4", lists).measures["few_labels"]["subset_files"]
    assert files == ["1percent.txt", "10percent.txt"]
    widths = ["redundancy.proj_hidden_dim", "task_kwargs.proj_hidden_dim", "task_kwargs.proj_output_dim"]
    words = ["factors.dimension=[128]", "--", *(f"++method_kwargs.{width}={{dimension}}" for width in widths)]
    found = study("metamask_fig4", *with_pretraining_overrides(["main_study.py", *words])[1:])
    kwargs = pretraining_config(found, found.trials[2]).method_kwargs
    assert kwargs.redundancy.proj_hidden_dim == kwargs.redundancy.proj_output_dim == 128
    assert kwargs.task_kwargs.proj_hidden_dim == kwargs.task_kwargs.proj_output_dim == 128
