"""How far the estimators are from the exact meta-gradient, by precision."""

import copy
from pathlib import Path
from typing import Any

import torch
from common import build_model, device, noise_views, table
from precision import matrix_precision
from trained import load_method, two_batches

from metamask_plugin.bilevel import Estimator, Exact, FiniteDifference, FirstOrder, InnerStep, Unrolled
from metamask_plugin.methods import MetaMask

ESTIMATORS: dict[str, Estimator] = {
    "exact": Exact(),
    "unrolled": Unrolled(),
    "finite difference, r = 1e-2": FiniteDifference(1e-2),
    "finite difference, r = 1e-4": FiniteDifference(1e-4),
    "first order": FirstOrder(),
}


def measure_errors(
    model: MetaMask,
    views: list[torch.Tensor],
    other: list[torch.Tensor],
    trial: InnerStep,
    precisions: list[str],
) -> dict[str, Any]:
    """Relative error and cosine against the float64 oracle, by estimator and precision.

    Args:
        model: computes in float32.
        views: of the batch.
        other: of an independent batch.
        trial: the trial steps.
        precisions: of :data:`PRECISIONS`; float64 comes first in any case. ``bf16`` is the encoder in
            bfloat16 with heads and losses in float32; with it comes ``bf16 everywhere``, under autocast.
    """
    double = copy.deepcopy(model).double()
    exactly = double.meta_problem([x.double() for x in views])
    truth = Unrolled().gradient(exactly, trial).outer_params[0]
    second = Unrolled().gradient(double.meta_problem([x.double() for x in other]), trial).outer_params[0]
    between = torch.cosine_similarity(truth, second, dim=0).item()
    del second

    problem = model.meta_problem(views)
    problems = {"float64": exactly, **{name: problem for name in precisions if name != "bf16"}}
    if "bf16" in precisions:
        lower = copy.deepcopy(model)
        lower.meta.dtype = torch.bfloat16
        problems |= {"bf16": lower.meta_problem(views), "bf16 everywhere": problem}
    errors: dict[str, dict[str, Any]] = {}
    for name, estimator in ESTIMATORS.items():
        errors[name] = {}
        for precision, its_problem in problems.items():
            if precision == "bf16" and name == "unrolled":  # it has no pass that is differentiated once
                errors[name][precision] = {"failed": "computes in float32"}
                continue
            everywhere = precision == "bf16 everywhere"
            # autocast's cache of cast weights would lose their gradients
            cast = torch.autocast(views[0].device.type, torch.bfloat16, everywhere, cache_enabled=False)
            try:
                with matrix_precision(precision), cast:
                    ours = estimator.gradient(its_problem, trial).outer_params[0].double()
            except RuntimeError as error:  # not every estimator exists in every precision
                errors[name][precision] = {"failed": " ".join(str(error).split())[:200]}
                continue
            errors[name][precision] = {
                "relative": ((ours - truth).norm() / truth.norm()).item(),
                "cosine": torch.cosine_similarity(ours, truth, dim=0).item(),
            }
    return {"estimators": errors, "cosine_between_batches": between}


def error_setting(
    backbone: str, batch: int, size: int, seed: int, checkpoint: Path | None
) -> tuple[MetaMask, list[torch.Tensor], list[torch.Tensor]]:
    """A model and two batches: random initialisation and noise, or a checkpoint and its own images."""
    torch.manual_seed(seed)
    if checkpoint is None:
        model = build_model(backbone, size)
        return model, noise_views(batch, size), noise_views(batch, size)
    model, datamodule = load_method(checkpoint, batch)
    return model.to(device()), *two_batches(datamodule, device())


def error_table(errors: dict[str, Any]) -> str:
    """Cosine and relative error, a column a precision."""
    precisions = list(next(iter(errors["estimators"].values())))
    rows = [
        [name, *(_error_cell(found[precision]) for precision in precisions)]
        for name, found in errors["estimators"].items()
    ]
    return table(["cosine / relative error", *precisions], rows)


def _error_cell(found: dict[str, Any]) -> str:
    return "-" if "failed" in found else f"{found['cosine']:.3f} / {found['relative']:.1e}"
