"""Methods: LightningModules that wire tasks, modules, losses and the bi-level engine together.

Importing this package registers them with the host.
"""

from metamask_plugin.host import METHODS, register
from metamask_plugin.methods.baseline import Baseline
from metamask_plugin.methods.icl_msr import ICLMSR
from metamask_plugin.methods.metamask import MetaMask
from metamask_plugin.methods.supervised import Supervised

register("baseline", Baseline)
register("bare", Baseline)  # its earlier name
register("metamask", MetaMask)
register("icl_msr", ICLMSR)
register("supervised", Supervised)

__all__ = ["METHODS", "Baseline", "ICLMSR", "MetaMask", "Supervised"]
