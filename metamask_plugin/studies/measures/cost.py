"""What a training costs: parameters and time, after MetaMask's Table 3."""

import statistics

from torch import nn

from metamask_plugin.studies.subject import Measured, Subject

NOT_THE_METHOD = ("classifier",)
"""solo-learn's online classifier only watches."""

META_LEARNED = ("mask", "regularizer")
"""Parts that stay as they were initialised where there is no meta step."""


PREDICTOR = 512
"""Hidden width of the prediction MLPs in MetaMask's release."""


def cost(subject: Subject, predictors: bool = False) -> Measured:
    """Rows ``parameters`` (and by part), ``epochs``, ``seconds``, ``cpu_seconds``, and these ``_per_epoch``.

    Times are those of the training alone, without evaluation. The epoch's is a median over all but the first,
    which warms up, where there are others; the whole's is the sum. Parameters are counted as the method has
    them, a target network's copies included.

    Args:
        subject: the encoder, its run and its method.
        predictors: whether there is also ``parameters_with_predictors``, MetaMask's own count: its release
            builds a prediction MLP (lightly's SimSiam's) behind each head and never uses it.
    """
    rows = [{"metric": "parameters", "value": 0.0}]
    meta = (subject.encoders["last"].args.get("method_kwargs") or {}).get("meta") or {}
    left_out = NOT_THE_METHOD + (() if meta.get("enabled", True) else META_LEARNED)
    for name, part in subject.model.named_children():
        if name not in left_out:
            count = float(sum(parameter.numel() for parameter in part.parameters()))
            rows[0]["value"] += count
            rows.append({"metric": f"parameters: {name}", "value": count})
    if predictors:
        unused = sum(predictor_parameters(dim) for dim in _head_widths(subject.model))
        rows.append({"metric": "parameters_with_predictors", "value": rows[0]["value"] + unused})
    epochs = subject.history()
    rows.append({"metric": "epochs", "value": float(len(epochs))})
    for column, metric in (
        ("train_seconds", "seconds_per_epoch"),
        ("train_cpu_seconds", "cpu_seconds_per_epoch"),
    ):
        seconds = [float(epoch[column]) for epoch in epochs if epoch.get(column)]
        if seconds:
            rows.append({"metric": metric, "value": statistics.median(seconds[1:] or seconds)})
            rows.append({"metric": metric.removesuffix("_per_epoch"), "value": sum(seconds)})
    return Measured(rows)


def predictor_parameters(dim: int) -> int:
    """Of a linear layer to 512, BatchNorm, ReLU, and a linear layer back to ``dim``, with biases."""
    return (dim + 1) * PREDICTOR + 2 * PREDICTOR + (PREDICTOR + 1) * dim


def _head_widths(model: nn.Module) -> list[int]:
    """Output widths of the task's projection head and of MetaMask's second one."""
    second = [model.redundancy.proj_output_dim] if hasattr(model, "redundancy_head") else []
    return [model.task.projection_dim, *second]
