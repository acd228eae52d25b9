"""The cases of ``speed.py``: what is evaluated at once, and what potentials are calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.build import bulk

from gaq_compile.datasets import example_structures
from gaq_compile.verify.structures import displaced, rattled

TIMESTEP_FS = {"sevennet-0": 1.0, "so3lr": 0.5}
"""Of dynamics; SO3LR's molecules have hydrogen."""


@dataclass(frozen=True)
class Case:
    """What is evaluated at once: one structure, or several."""

    model: str
    name: str
    structures: Callable[[], list[Atoms]]


def frame(molecule: str, count: int = 1) -> list[Atoms]:
    """A frame that calibration does not see, again and again."""
    return [example_structures(molecule)[5].copy() for _ in range(count)]


def silicon(cells: int) -> Atoms:
    return rattled(bulk("Si", cubic=True) * (cells, cells, cells), 0.05, 3)


def salt(cells: int) -> Atoms:
    return rattled(bulk("NaCl", "rocksalt", 5.64, cubic=True) * (cells, cells, cells), 0.05, 3)


def ethanol_box(molecules: int, spacing: float = 6.0) -> Atoms:
    """So many ethanol molecules along each side of a periodic box."""
    frames = example_structures("ethanol")
    box = Atoms(cell=[molecules * spacing] * 3, pbc=True)
    for k in range(molecules**3):
        place = np.array([k // molecules**2, k // molecules % molecules, k % molecules])
        atoms = frames[5 + k % 5]
        box += displaced(atoms, spacing * place - atoms.positions.mean(0))
    return box


CASES = [
    Case("sevennet-0", "ethanol", lambda: frame("ethanol")),
    Case("sevennet-0", "NaCl 64", lambda: [salt(2)]),
    Case("sevennet-0", "Si 216", lambda: [silicon(3)]),
    Case("sevennet-0", "Si 512", lambda: [silicon(4)]),
    Case("sevennet-0", "Si 1000", lambda: [silicon(5)]),
    Case("sevennet-0", "Si 1728", lambda: [silicon(6)]),
    Case("sevennet-0", "Si 4096", lambda: [silicon(8)]),
    Case("so3lr", "ethanol", lambda: frame("ethanol")),
    Case("so3lr", "aspirin", lambda: frame("aspirin")),
    Case("so3lr", "azobenzene", lambda: frame("azobenzene")),
    Case("so3lr", "64 ethanols in a box", lambda: [ethanol_box(4)]),
    Case("so3lr", "batch of 64 azobenzenes", lambda: frame("azobenzene", 64)),
    Case("so3lr", "216 ethanols in a box", lambda: [ethanol_box(6)]),
]


def calibration(model: str) -> list[Atoms]:
    """What all of a model's potentials are calibrated on: small pieces of its cases."""
    if model == "so3lr":
        return [a for m in ("ethanol", "aspirin", "azobenzene") for a in example_structures(m)[:2]]
    return [*example_structures("ethanol")[:2], salt(1), silicon(1)]
