"""Structures that no potential can evaluate are turned away with their reason."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from ..errors import StructureError

WIDEST = 1e5  # Å; beyond, neighbour lists overflow
COINCIDENT = 0.1  # Å; below this no potential was ever trained
THIN = 1.0  # Å between neighbouring images; no solid's lattice planes are so close
SINGULAR = 1e-6  # smallest singular value of the normalised periodic cell vectors


def check_structure(atoms: Atoms) -> None:
    """Refuse a structure that no potential can evaluate.

    Raises:
        StructureError: what :func:`check_arrays` says, or two atoms (or an atom and its own image)
            closer than 0.1 Å; names the atoms.
    """
    check_arrays(atoms)
    check_distances(atoms)


def check_arrays(atoms: Atoms) -> None:
    """Refuse a structure for anything but its distances.

    Raises:
        StructureError: for an empty structure, arrays of wrong shape, positions or cell that are
            NaN or infinite, atoms too far apart, or a singular cell where the structure is periodic.
    """
    if not isinstance(atoms, Atoms):
        raise StructureError(f"expected ase.Atoms, got {type(atoms).__name__}", fix="pass an ase.Atoms")
    positions = np.asarray(atoms.arrays["positions"])
    numbers = np.asarray(atoms.arrays["numbers"])
    where = f"{numbers.size} atoms"
    if positions.ndim != 2 or positions.shape[1:] != (3,) or numbers.shape != positions.shape[:1]:
        raise StructureError(
            f"positions of shape {positions.shape} for atomic numbers of shape {numbers.shape}",
            fix="give positions (n, 3) and numbers (n,)",
        )
    if numbers.size == 0:
        raise StructureError("a structure without atoms", fix="give at least one atom")
    finite = np.isfinite(positions)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        named = ", ".join(_atom(atoms, int(i)) for i in bad[:5]) + (", ..." if bad.size > 5 else "")
        raise StructureError(
            f"positions that are NaN or infinite: {named}",
            where=where,
            fix="look where the structure was made: an exploded trajectory or a damaged file",
        )
    extent = float((positions.max(axis=0) - positions.min(axis=0)).max())
    if extent > WIDEST:
        raise StructureError(
            f"atoms up to {extent:.3g} Å apart",
            where=where,
            fix="look where the structure was made: an exploded trajectory or wrong units",
        )
    _check_cell(atoms)


def _check_cell(atoms: Atoms) -> None:
    cell = np.asarray(atoms.cell.array if hasattr(atoms.cell, "array") else atoms.cell, dtype=np.float64)
    if cell.shape != (3, 3):
        raise StructureError(f"a cell of shape {cell.shape}", fix="give three cell vectors (3, 3)")
    if not np.isfinite(cell).all():
        raise StructureError("a cell with NaN or infinite entries")
    periodic = cell[np.asarray(atoms.pbc, dtype=bool)]
    if not periodic.size:
        return
    lengths = np.linalg.norm(periodic, axis=1)
    singular = bool((lengths == 0).any())
    if not singular:
        singular = bool(np.linalg.svd(periodic / lengths[:, None], compute_uv=False)[-1] < SINGULAR)
    if singular:
        raise StructureError(
            "a periodic structure whose cell is singular",
            where=f"pbc {tuple(bool(p) for p in atoms.pbc)}, cell {cell.tolist()}",
            fix="set the cell, or pbc=False for a molecule",
        )


def is_thin(atoms: Atoms) -> bool:
    """Whether images follow each other within 1 Å, so that a search with a long cutoff finds very many.

    Takes a cell that :func:`check_arrays` accepts.
    """
    if not atoms.pbc.any():
        return False
    periodic = atoms.cell.array[atoms.pbc]
    lengths = np.linalg.norm(periodic, axis=1)
    if lengths.min() < THIN:
        return True
    directions = periodic / lengths[:, None]
    # The distances of lattice planes are the inverse lengths of the reciprocal vectors.
    reciprocal = np.linalg.inv(directions @ directions.T).diagonal() / lengths**2
    return bool((reciprocal > THIN**-2).any())


def check_distances(atoms: Atoms) -> None:
    """Refuse two atoms, or an atom and its own image, closer than 0.1 Å.

    Raises:
        StructureError: names the closest pair.
    """
    from ase.neighborlist import neighbor_list

    i, j, distance = neighbor_list("ijd", atoms, COINCIDENT)
    if len(i) == 0:
        return
    nearest = int(np.argmin(distance))
    a, b = int(i[nearest]), int(j[nearest])
    pair = f"{_atom(atoms, a)} and " + ("its own periodic image" if a == b else _atom(atoms, b))
    raise StructureError(
        f"coincident atoms: {pair} are {distance[nearest]:.4f} Å apart",
        where=f"{len(atoms)} atoms, {len(i) // 2} such pairs",
        fix="remove duplicates (also those that a cell or a supercell made), or relax first",
    )


def _atom(atoms: Atoms, index: int) -> str:
    from ase.data import chemical_symbols

    number = int(atoms.arrays["numbers"][index])
    symbol = chemical_symbols[number] if 0 <= number < len(chemical_symbols) else f"Z={number}"
    return f"{symbol}[{index}]"
