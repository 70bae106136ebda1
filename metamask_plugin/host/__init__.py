"""The one seam to solo-learn.

With solo-learn importable, :data:`BaseMethod` and :data:`METHODS` are solo-learn's own; without it
they are the embedded host's, which keeps the same contract (:mod:`metamask_plugin.host.contract`).
The environment variable ``METAMASK_HOST`` (``auto``, ``solo`` or ``embedded``) overrides the choice.
Nothing outside this package asks which host is in use. Whichever it is, :func:`load_encoder` reads the
checkpoints of both.
"""

from metamask_plugin.host.solo_networks import load_encoder
from metamask_plugin.host.switch import METHODS, BaseMethod, name, put_backbone, register, release_kwargs

__all__ = ["METHODS", "BaseMethod", "load_encoder", "name", "put_backbone", "register", "release_kwargs"]
