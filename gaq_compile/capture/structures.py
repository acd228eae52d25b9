"""Structures that no potential can evaluate are turned away with their reason."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from ..errors import StructureError

SHORTEST = 0.1  # Å; two nuclei nearer than this are a broken file, not chemistry


def check_structure(atoms: Atoms, *, where: str = "") -> None:
    """Raise where positions, cell or atoms make no physical sense.

    Raises:
        StructureError: for a wrong type or shape, no atoms, NaN or infinite positions or cell, a
            singular cell with periodic boundaries, or two atoms nearer than 0.1 Å.
    """
    if not isinstance(atoms, Atoms):
        raise StructureError(f"expected ase.Atoms, got {type(atoms).__name__}", where=where)
    if len(atoms) == 0:
        raise StructureError("the structure has no atoms", where=where)
    _check_positions(atoms, where)
    _check_cell(atoms, where)
    _check_distances(atoms, where)


def _check_positions(atoms: Atoms, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
    if bad.size:
        raise StructureError(
            f"{bad.size} atoms have NaN or infinite positions, the first is atom {bad[0]}",
            where=where,
            fix="look at the step that produced these positions (an exploded trajectory, a bad file)",
        )


def _check_cell(atoms: Atoms, where: str) -> None:
    if not atoms.pbc.any():
        return
    if not np.isfinite(atoms.cell.array).all():
        raise StructureError("the cell has NaN or infinite entries", where=where, fix="set atoms.cell")
    if bool(np.any(np.linalg.norm(atoms.cell.array[atoms.pbc], axis=1) < 1e-6)) or (
        bool(atoms.pbc.all()) and abs(atoms.cell.volume) < 1e-6
    ):
        raise StructureError(
            "periodic boundaries are on but the cell has no volume", where=where, fix="set atoms.cell or atoms.pbc=False"
        )


def _check_distances(atoms: Atoms, where: str) -> None:
    from vesin import NeighborList

    box = atoms.cell.array if atoms.pbc.any() else np.zeros((3, 3))
    finder = NeighborList(cutoff=SHORTEST, full_list=False)
    i, j, d = finder.compute(
        points=atoms.positions, box=box, periodic=tuple(bool(p) for p in atoms.pbc), quantities="ijd"
    )
    if len(i):
        raise StructureError(
            f"atoms {int(i[0])} and {int(j[0])} are {float(d[0]):.3f} Å apart",
            where=where,
            fix="remove the duplicate atom or check the cell and units",
        )
