"""docs/keys.md and docs/schemas are as the tool writes them, and name every key and every word."""

import importlib.util
import json
from importlib import import_module
from pathlib import Path

import jsonschema
import pytest
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.known import keys
from metamask_plugin.config import methods, studies
from metamask_plugin.config.linear import Linear
from metamask_plugin.config.messages import choices, schema_at
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import keys_of

TOOL = Path(__file__).resolve().parents[1] / "tools" / "keys_page.py"
spec = importlib.util.spec_from_file_location("keys_page", TOOL)
keys_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keys_page)


def test_the_page_is_as_it_would_be_written():
    assert keys_page.PAGE.read_text() == keys_page.page(), "run make keys"


@pytest.mark.parametrize("name", ["pretrain", "linear", "study"])
def test_a_schema_is_as_it_would_be_written(name):
    there = (keys_page.DOCS / "schemas" / f"{name}.json").read_text()
    if f"pydantic {keys_page.PYDANTIC}" not in there:
        pytest.skip("another version of pydantic writes the same schema otherwise")
    assert there == keys_page.schemas()[name], "make keys"


def test_an_editor_finds_what_a_run_would_refuse():
    schema = json.loads(keys_page.schemas()["pretrain"])
    jsonschema.validate({"seed": 5, "method_kwargs": {"alpha": 3, "meta": {"estimator": "exact"}}}, schema)
    for wrong in ({"sede": 5}, {"seed": -1}, {"method_kwargs": {"meta": {"estimator": "exat"}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("kind", ["pretrain", "linear", "study"])
def test_every_shipped_file_is_what_an_editor_takes(kind):
    validator = jsonschema.Draft202012Validator(json.loads(keys_page.schemas()[kind]))
    # parts that are lists, the papers' numbers, many parts in one file
    aside = ("augmentations", "views", "reference", "task_settings.yaml")
    files = [path for path in (SCRIPTS / kind).rglob("*.yaml") if not {*aside} & {*path.parts}]
    found = {path: OmegaConf.to_container(OmegaConf.load(path)) for path in files if _is_global(path)}
    assert len(found) > 10
    for path, node in found.items():
        assert not list(validator.iter_errors(node)), path


def _is_global(path):
    text = path.read_text()
    return "@package" not in text or "@package _global_" in text


def test_every_key_is_on_it():
    text = keys_page.PAGE.read_text()
    ours = [key for model in (Pretraining, Linear, studies.Study) for key in keys_of(model)]
    assert len(ours) > 100 and not [key for key in ours if f"| `{key}` |" not in text]
    within = [key for key in keys("pretrain") if key.startswith("method_kwargs.")]
    named = [key.removeprefix("method_kwargs.").removeprefix("task_kwargs.") for key in within]
    assert len(named) > 70 and not [key for key in named if f"| `{key}` |" not in text]


REGISTRIES = {
    (Pretraining, "accelerator"): "cli.machine:ACCELERATORS",
    (Pretraining, "data.dataset"): "data.registry:DATASETS",
    (Pretraining, "data.region"): "data.regions:REGIONS",
    (Pretraining, "data.region_form"): "data.regions:FORMS",
    (Pretraining, "data.format"): "data.datamodule:FORMATS",
    (Pretraining, "data.pipeline"): "data.loaders:PIPELINES",
    (Pretraining, "optimizer.name"): "host.contract:OPTIMIZERS",
    (Pretraining, "performance.compile"): "modules.compiled:NAMED_MODES",
    (Pretraining, "performance.matmul_precision"): "methods.base:MATMUL_PRECISIONS",
    (Pretraining, "evaluation.linear.protocol"): "evaluation.linear:PROTOCOLS",
    (Linear, "head"): "evaluation.linear:HEADS",
    (Linear, "optimizer.name"): "evaluation.linear:OPTIMIZERS",
    (methods.MetaMask, "preset"): "methods.metamask:PRESETS",
    (methods.MetaMask, "redundancy.form"): "methods.metamask:FORMS",
    (methods.MetaMask, "mask.parameterisation"): "modules.dimensional_mask:PARAMETERISATIONS",
    (methods.MetaMask, "meta.estimator"): "bilevel:ESTIMATORS",
    (methods.MetaMask, "meta.trial"): "methods.meta_checks:CHOICES:trial",
    (methods.MetaMask, "meta.trial_on"): "methods.meta_checks:CHOICES:trial_on",
    (methods.MetaMask, "meta.outer_batch"): "methods.meta_checks:CHOICES:outer_batch",
    (methods.MetaMask, "meta.when"): "methods.meta_checks:CHOICES:when",
    (methods.MetaMask, "meta.precision"): "methods.meta_checks:CHOICES:precision",
    (methods.ICLMSR, "preset"): "methods.icl_msr:PRESETS",
    (methods.ICLMSR, "level"): "methods.interventional:LEVELS",
    (methods.ICLMSR, "uniformity.scope"): "methods.icl_msr:SCOPES",
    (methods.ICLMSR, "regularizer.activation"): "modules.semantic_regularizer:ACTIVATIONS",
    (methods.TaskKwargs, "kernel"): "tasks.ssl_hsic:KERNELS",
    (studies.ConfounderAudit, "removal"): "audit.confounders:REMOVALS",
    (studies.Regions, "fit_on"): "evaluation.regions:FIT_ON",
}
"""Where the words of a key are implemented: in the model they stand so that a slip costs no torch."""


@pytest.mark.parametrize(("model", "key"), list(REGISTRIES))
def test_the_models_words_are_those_that_there_are(model, key):
    module, name, *entry = REGISTRIES[model, key].split(":")
    there = getattr(import_module(f"metamask_plugin.{module}"), name)
    there = there[entry[0]] if entry else there
    assert choices(schema_at(model, key.split("."))[0]) == sorted(there)


def test_every_measure_and_method_has_its_model():
    from metamask_plugin.methods import METHODS
    from metamask_plugin.studies.measures import MEASURES

    assert set(studies.MEASURES) == set(MEASURES) and set(methods.METHOD_KWARGS) == set(METHODS) - {"bare"}
