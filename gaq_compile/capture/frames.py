"""A structure's own frame: the same orientation however it was turned before.

Where only invariants are rounded, symmetry is exact but for one thing: float32 noise, which differs
from orientation to orientation, carries a value across a rounding boundary now and then, and each
crossing is a whole step. Evaluated in a frame of its own, a structure gives the same bits in every
orientation, and its forces are turned back.
"""

from __future__ import annotations

import numpy as np
from ase import Atoms

GAP = 1e-3  # relative distance of two moments of inertia below which an axis is not determined


def own_frame(atoms: Atoms) -> np.ndarray:
    """The rotation Q (3, 3) that turns a structure into its own frame: ``x' = x @ Q.T``.

    Periodic structures: the standard form of the cell (first vector along x, second in the plane
    xy). Molecules: the principal axes of the second moments of ``Z (x - mean)``, each pointing to
    where the third moment is positive. Structures too symmetric to have such axes are left as they
    are: any orientation is as good.
    """
    if atoms.pbc.any():
        return _cell_frame(atoms)
    weights = atoms.numbers.astype(np.float64)
    x = atoms.positions - weights @ atoms.positions / weights.sum()
    moments, axes = np.linalg.eigh((x.T * weights) @ x)
    largest = moments[-1]
    if largest <= 0 or (moments[1:] - moments[:-1]).min() < GAP * largest:
        return np.eye(3)
    skew = weights @ (x @ axes) ** 3
    axes = axes * np.where(skew < 0, -1.0, 1.0)
    if np.linalg.det(axes) < 0:  # right-handed: a mirror image stays one
        axes[:, 0] = -axes[:, 0]
    return axes.T


def _cell_frame(atoms: Atoms) -> np.ndarray:
    cell = atoms.cell.array
    if atoms.cell.rank < 2:
        return np.eye(3)
    a, b = (v for v in cell if np.linalg.norm(v) > 0) if atoms.cell.rank == 2 else cell[:2]
    x = a / np.linalg.norm(a)
    y = b - (b @ x) * x
    y = y / np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)])
