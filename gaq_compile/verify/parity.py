"""How far a candidate's answers are from a reference's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .types import Evaluate, Prediction, evaluated

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True)
class Parity:
    """Differences between two evaluators over a set of structures.

    Attributes:
        energy_mev_per_atom: mean over structures of ``|dE| / n``, meV/atom.
        energy_max_mev_per_atom: the largest of them.
        force_mae_mev_per_a: mean over all force components of ``|dF|``, meV/Å.
        force_max_mev_per_a: the largest ``|dF|`` of a component, meV/Å.
        force_rel: ``force_mae / mean |F_ref|``, both over the same components; 0 where both
            vanish, infinite where only the reference does (a perfect crystal: rattle it first).
        stress_mae: mean over the nine components of ``|d stress|``, meV/Å^3, over the structures
            where both have a stress; None where there is none.
        structures: how many structures were compared.
        stress_structures: how many of them had a stress on both sides.
    """

    energy_mev_per_atom: float
    energy_max_mev_per_atom: float
    force_mae_mev_per_a: float
    force_max_mev_per_a: float
    force_rel: float
    stress_mae: float | None
    structures: int
    stress_structures: int


def parity(reference: Evaluate, candidate: Evaluate, structures: list[Atoms]) -> Parity:
    """Compare ``candidate`` with ``reference`` on ``structures``.

    Raises:
        StructureError: if there are no structures.
        VerificationError: if either answers with wrong shapes or numbers that are not finite.
    """
    return compare(evaluated(reference, structures), evaluated(candidate, structures))


def compare(reference: list[Prediction], candidate: list[Prediction]) -> Parity:
    """:class:`Parity` of predictions that are already there, e.g. labels of a data set."""
    pairs = list(zip(reference, candidate, strict=True))
    energy = np.array([abs(b.energy - a.energy) / len(a.forces) for a, b in pairs])
    difference = np.concatenate([np.abs(_f64(b.forces) - _f64(a.forces)).ravel() for a, b in pairs])
    magnitude = float(np.concatenate([np.abs(_f64(a.forces)).ravel() for a, _ in pairs]).mean())
    stress = [
        np.abs(_f64(b.stress) - _f64(a.stress)).mean()
        for a, b in pairs
        if a.stress is not None and b.stress is not None
    ]
    force_mae = float(difference.mean())
    return Parity(
        energy_mev_per_atom=1e3 * float(energy.mean()),
        energy_max_mev_per_atom=1e3 * float(energy.max()),
        force_mae_mev_per_a=1e3 * force_mae,
        force_max_mev_per_a=1e3 * float(difference.max()),
        force_rel=relative(force_mae, magnitude),
        stress_mae=1e3 * float(np.mean(stress)) if stress else None,
        structures=len(pairs),
        stress_structures=len(stress),
    )


def relative(error: float, scale: float) -> float:
    """``error / scale``; 0 for 0/0, infinite for an error where the scale is 0."""
    if scale > 0.0:
        return error / scale
    return 0.0 if error == 0.0 else float("inf")


def _f64(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)
