"""Structures to measure on: checked, rattled, rotated, strained.

Every function returns a new structure without constraints or calculator and leaves its argument
alone. Rotations act on rows: ``x' = x @ R.T``, and a periodic cell turns with the atoms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from ..capture.structures import check_structure

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["check_structure", "displaced", "random_rotations", "rattled", "rotated", "strained"]


def rattled(atoms: Atoms, stdev: float, seed: int = 0) -> Atoms:
    """Gaussian displacements of every coordinate, standard deviation ``stdev`` Å."""
    return displaced(atoms, np.random.default_rng(seed).normal(scale=stdev, size=(len(atoms), 3)))


def displaced(atoms: Atoms, displacement: np.ndarray) -> Atoms:
    """Atoms moved by ``displacement (n, 3)``, Å."""
    moved = _plain(atoms)
    moved.positions = moved.positions + displacement
    return moved


def random_rotations(count: int, seed: int = 0, *, reflections: bool = False) -> np.ndarray:
    """``(count, 3, 3)`` rotations, uniform on SO(3); with ``reflections``, every second is improper.

    An improper one is ``-R``: inversion times rotation, so together they cover O(3).
    """
    matrices = Rotation.random(count, np.random.default_rng(seed)).as_matrix()
    if reflections:
        matrices[1::2] *= -1.0
    return matrices


def rotated(atoms: Atoms, rotation: np.ndarray) -> Atoms:
    """Positions and cell turned by ``rotation (3, 3)`` about the origin."""
    turned = _plain(atoms)
    turned.set_cell(np.asarray(turned.cell.array) @ rotation.T, scale_atoms=False)
    turned.positions = turned.positions @ rotation.T
    return turned


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    """Positions and cell under a homogeneous strain: ``x' = x @ (1 + strain)``; symmetric: no rotation."""
    deformation = np.eye(3) + np.asarray(strain)
    deformed = _plain(atoms)
    deformed.set_cell(np.asarray(deformed.cell.array) @ deformation, scale_atoms=False)
    deformed.positions = deformed.positions @ deformation
    return deformed


def _plain(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.set_constraint()
    return copy
