"""Whatever a config holds: a run that starts, or one line and exit code 2. Never a traceback."""

import functools
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import lightning.pytorch as pl
import pytest
from composing import composed
from config_mutations import config_of, damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from metamask_plugin.cli import pretrain
from metamask_plugin.config.methods import METHOD_KWARGS, TaskKwargs
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import keys_of
from metamask_plugin.data import registry

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "pretrain"
BASES = [
    ("metamask_barlow", ()),
    ("metamask_barlow", ("task=byol",)),
    ("metamask_barlow", ("method=baseline", "task=swav")),
    ("metamask_barlow", ("ablation=official", "optimizer.name=sgd")),
    ("icl_msr_simclr", ()),
    ("icl_msr_simclr", ("task=ressl", "method=baseline")),
    ("cifar/metamask_barlow", ("task=moco", "backbone.name=conv4")),
]
SMALL = (
    "accelerator=cpu",
    "data.num_workers=0",
    "++wandb.offline=True",
    "++backbone.kwargs.width=8",
    "method_kwargs.task_kwargs.proj_hidden_dim=16",
    "++evaluation.enabled=False",
)


class Started(BaseException):
    """Training would begin now."""


@functools.cache
def base(index):
    name, overrides = BASES[index]
    return OmegaConf.to_container(composed("pretrain", name, *SMALL, *overrides), resolve=True)


def schema_keys():
    own = {key for model in METHOD_KWARGS.values() for key in keys_of(model, "method_kwargs.")}
    task = keys_of(TaskKwargs, "method_kwargs.task_kwargs.")
    return sorted({*keys_of(Pretraining), *own, *task})


def outcome(node):
    """``started``, ``refused``, ``done`` or ``invalid``; anything else is raised."""
    cfg = config_of(node)
    if cfg is None:
        return "invalid"
    errors = io.StringIO()
    try:
        with redirect_stderr(errors), redirect_stdout(io.StringIO()):
            pretrain.run(cfg)
    except Started:
        return "started"
    except SystemExit as end:
        said = errors.getvalue()
        lines = [line for line in said.splitlines() if line.startswith("error:") or "Traceback" in line]
        assert end.code == 2, said
        assert len(lines) == 1 and said.splitlines()[-1] == lines[0] and lines[0].startswith("error: "), said
        return "refused"
    return "done"


@pytest.fixture
def no_training(monkeypatch, tmp_path):
    """Everything is real up to ``Trainer.fit``; the generated images are made once for equal settings."""
    made = {}

    def once(build):
        @functools.wraps(build)
        def remembered(**options):
            key = (build.__name__, repr(sorted(options.items())))
            if key not in made:
                made[key] = build(**options)
            return made[key]

        return remembered

    def start(*args, **kwargs):
        raise Started

    monkeypatch.setattr(pl.Trainer, "fit", start)
    for name in ("digits", "confounded_digits"):
        monkeypatch.setitem(
            registry.DATASETS, name, functools.partial(registry._generated, once(getattr(registry, name)))
        )
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _property(folder, examples, record_property):
    counts = {}

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def holds(data):
        plain = base(data.draw(st.integers(0, len(BASES) - 1)))
        node = data.draw(damaged(plain, schema_keys()))
        found = outcome(node)
        counts[found] = counts.get(found, 0) + 1

    holds()
    assert not list(folder.rglob("shell")), "a value was executed"
    print(counts)
    record_property("inputs", sum(counts.values()))
    record_property("tracebacks", 0)
    record_property("refused", counts.get("refused", 0))
    return counts


@pytest.mark.fault("config")
def test_damaged_configs_end_in_one_line(no_training, record_property):
    counts = _property(no_training, 100, record_property)
    assert counts["refused"] > 50 and counts["started"] > 0


@pytest.mark.slow
@pytest.mark.fault("config")
def test_many_damaged_configs_end_in_one_line(no_training, record_property):
    counts = _property(no_training, 3000, record_property)
    assert counts["refused"] > 1000 and counts["started"] > 0


def test_the_bases_themselves_start(no_training):
    for index, (name, _) in enumerate(BASES):
        expected = "refused" if "cifar" in name else "started"  # there are no files of CIFAR here
        assert outcome(base(index)) == expected, name
