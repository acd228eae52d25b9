"""Do the forces of an isolated system add up to nothing?

An energy that depends on the atoms' relative positions only has ``sum F_i = 0``, and, without
periodic images, ``sum (r_i - c) x F_i = 0``: nothing pushes or turns itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .conservativity import FORCE_FLOOR
from .types import Evaluate, evaluated

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class Balance:
    """What is left of the forces, largest over the structures.

    Attributes:
        force: ``|sum F| / sum |F|``.
        torque: ``|sum (r - c) x F| / sum |r - c||F|``, c the mean position, over the structures
            without periodic directions; None where there is none.
        force_mev_per_a: ``|sum F|``, meV/Å.
        torque_mev: ``|sum (r - c) x F|``, meV, or None.
    """

    force: float
    torque: float | None
    force_mev_per_a: float
    torque_mev: float | None


def balance(evaluate: Evaluate, structures: list[Atoms]) -> Balance:
    """Measure the net force and the net torque of ``evaluate``.

    Forces below 0.01 eV/Å are compared absolutely.

    Raises:
        StructureError: if there are no structures.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    pushes, turns = [], []
    for atoms, answer in zip(structures, evaluated(evaluate, structures), strict=True):
        forces = np.asarray(answer.forces, dtype=np.float64)
        sizes = np.maximum(np.linalg.norm(forces, axis=1), FORCE_FLOOR)
        pushes.append(_left(forces, sizes))
        if not atoms.pbc.any():
            arms = atoms.positions - atoms.positions.mean(axis=0)
            # an atom at the centre, or a single one, turns nothing: 1 Å keeps the scale off zero
            lengths = np.maximum(np.linalg.norm(arms, axis=1), 1.0)
            turns.append(_left(np.cross(arms, forces), lengths * sizes))
    return Balance(
        force=max(relative for relative, _ in pushes),
        torque=max((relative for relative, _ in turns), default=None),
        force_mev_per_a=1e3 * max(absolute for _, absolute in pushes),
        torque_mev=1e3 * max(absolute for _, absolute in turns) if turns else None,
    )


def _left(vectors: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    total = float(np.linalg.norm(vectors.sum(axis=0)))
    return total / float(sizes.sum()), total
