"""The one seam to solo-learn.

With solo-learn importable, :data:`BaseMethod` and :data:`METHODS` are solo-learn's own; without it
they are the embedded host's, which keeps the same contract (:mod:`metamask_plugin.host.contract`).
The environment variable ``METAMASK_HOST`` (``auto``, ``solo`` or ``embedded``) overrides the choice.
Nothing outside this package asks which host is in use. Importing it lets evaluators build solo-learn's
networks (:data:`metamask_plugin.evaluation.encoder.BUILDERS`), whichever host is in use.
"""

from metamask_plugin.host import solo_networks as _  # noqa: F401  (registers what it builds)
from metamask_plugin.host.switch import METHODS, BaseMethod, name, register, release_kwargs

__all__ = ["METHODS", "BaseMethod", "name", "register", "release_kwargs"]
