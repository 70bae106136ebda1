"""solo-learn's factories of encoders, for whoever reads its checkpoints, whichever host is in use."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping

from torch import nn


def solo_factories() -> Mapping[str, Callable[..., nn.Module]]:
    """solo-learn's factories by backbone name, ``factory(method, **kwargs)``; empty where it is not there.

    Imports solo-learn, so it is called only where a checkpoint needs it.
    """
    if importlib.util.find_spec("solo") is None:
        return {}
    try:
        from solo import backbones
    except Exception as error:  # whatever breaks another package's import is a reason, not our crash
        warnings.warn(f"solo-learn's backbones are not used: {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return {name: getattr(backbones, name) for name in backbones.__all__}
