"""The settings of the meta step that whole iterations are measured with."""

from typing import Any

Settings = dict[str, Any]

FULL: dict[str, Settings] = {
    "exact, k = 1": {},
    "exact, k = 4": {"every_n_steps": 4},
    "exact, k = 8": {"every_n_steps": 8},
    "exact, shared forward, k = 1": {"when": "before_step"},
    "exact, shared forward, k = 4": {"when": "before_step", "every_n_steps": 4},
    "exact, shared forward, k = 8": {"when": "before_step", "every_n_steps": 8},
    "exact, half the batch, k = 1": {"batch_share": 0.5},
    "exact, half the batch, k = 4": {"batch_share": 0.5, "every_n_steps": 4},
    "exact, heads alone, k = 1": {"trial_on": "heads"},
    "exact, heads alone, k = 4": {"trial_on": "heads", "every_n_steps": 4},
    "first order, k = 1": {"estimator": "first_order"},
    "finite difference, k = 1": {"estimator": "finite_difference"},
    "unrolled, k = 1": {"estimator": "unrolled"},
}
"""Settings of ``method_kwargs.meta`` by the name under which they are timed."""

RELEASE = "release, float32, k = 1"


def meta_settings(settings: Settings) -> Settings:
    """The same as overrides of :func:`common.build_model`."""
    return {f"method_kwargs__meta__{key}": value for key, value in settings.items()}


def own_precision(precision: str) -> Settings:
    """How the meta step is told to compute."""
    return {"precision": "bf16"} if precision == "bf16" else {}
