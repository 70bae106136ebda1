"""Decides which host is in use, once, at import."""

import importlib.util
import inspect
import os
import warnings

from metamask_plugin.errors import UserError, choose

VARIABLE = "METAMASK_HOST"


def _why_not_solo() -> str | None:
    """Why solo-learn cannot be the host; ``None`` if it can, an empty string if it is not there."""
    if importlib.util.find_spec("solo") is None:
        return ""
    try:
        from solo.methods.base import BaseMethod
    except Exception as error:  # whatever breaks another package's import is a reason, not our crash
        return f"its import fails ({type(error).__name__}: {error})"
    if list(inspect.signature(BaseMethod.__init__).parameters)[1:2] != ["cfg"]:
        return "its BaseMethod takes no cfg (older than 1.0.6); install solo-learn's main branch"
    return None


def _decide() -> str:
    wanted = choose(VARIABLE, os.environ.get(VARIABLE, "auto"), ("auto", "solo", "embedded"))
    if wanted == "embedded":
        return "embedded"
    obstacle = _why_not_solo()
    if obstacle is None:
        return "solo"
    if wanted == "solo":
        raise UserError(
            f"{VARIABLE}=solo, but solo-learn cannot be used: {obstacle or 'it is not installed'}"
        )
    if obstacle:
        warnings.warn(f"solo-learn is installed but not used: {obstacle}", stacklevel=2)
    return "embedded"


name: str = _decide()
"""``solo`` or ``embedded``; for messages, tests and ``args.json`` only."""

if name == "solo":
    from metamask_plugin.host import solo as _host
else:
    from metamask_plugin.host import embedded as _host

BaseMethod: type = _host.BaseMethod
METHODS: dict[str, type] = _host.METHODS
put_backbone = _host.put_backbone
release_kwargs = _host.release_kwargs


def register(method: str, cls: type) -> None:
    """Adds a method to the host's ``METHODS``; again is fine, over another class is not.

    Args:
        method: what users write as ``method:`` in a config.
        cls: a subclass of :data:`BaseMethod`.

    Raises:
        UserError: if the name belongs to another class already.
    """
    present = METHODS.setdefault(method, cls)
    # compared by name: a reloaded module makes an equal class anew
    if (present.__module__, present.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UserError(
            f"method {method!r} is already registered by {present.__module__}.{present.__qualname__}; "
            f"cannot register {cls.__module__}.{cls.__qualname__} under the same name"
        )
