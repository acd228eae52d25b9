"""gaq_compile: trained equivariant potentials in low-bit integers, with their symmetry intact.

>>> import gaq_compile
>>> fast = gaq_compile.quantize("so3lr", atoms)   # capture, quantize, fuse, lower, verify
>>> print(fast.report)                            # what ran where, what it cost and gained
>>> fast(atoms).forces                            # eV/Å
"""

from . import errors
from .api import load, quantize
from .config import QuantConfig, preset
from .ir.draw import draw
from .potential import Potential
from .tools.sensitivity import Sensitivity, sensitivity
from .tools.tradeoff import Tradeoff, tradeoff
from .training.finetune import finetune
from .verify.report import Report

__version__ = "0.1.0"
__all__ = [
    "Potential",
    "QuantConfig",
    "Report",
    "Sensitivity",
    "Tradeoff",
    "draw",
    "errors",
    "finetune",
    "load",
    "preset",
    "quantize",
    "sensitivity",
    "tradeoff",
]
