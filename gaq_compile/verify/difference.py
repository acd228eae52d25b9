"""How far apart answers are that ought to be one: by symmetry, or alone and in company.

The energy's difference is taken twice and the larger one counts: atom by atom where predictions
carry ``energies``, which keeps digits that a float32 total has lost, and between the totals, less
what their own rounding explains. A term that only the total has cannot hide behind the first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from .types import Prediction, energy_difference, energy_resolution

TOTAL_ROUNDINGS = 4.0  # spacings of a total that a sum in another order may be off by


@dataclass(frozen=True)
class Difference:
    """The largest differences over all pairs of answers.

    Attributes:
        energy_mev_per_atom: largest ``|E' - E| / n``, meV/atom.
        force_mev_per_a: largest vector norm ``|F' - F|`` of an atom, meV/Å.
        stress_mae: largest mean over components of ``|stress' - stress|``, meV/Å^3; None where no
            pair has both.
        pairs: how many pairs were compared.
    """

    energy_mev_per_atom: float
    force_mev_per_a: float
    stress_mae: float | None
    pairs: int


def largest(pairs: Iterable[tuple[Prediction, Prediction]]) -> Difference:
    """The :class:`Difference` over pairs (expected, found) of equally many atoms."""
    energies, forces, stresses = [], [], []
    for expected, found in pairs:
        energies.append(_energy(expected, found) / len(expected.forces))
        gap = np.asarray(found.forces, np.float64) - np.asarray(expected.forces, np.float64)
        forces.append(float(np.linalg.norm(gap, axis=1).max()))
        if expected.stress is not None and found.stress is not None:
            stresses.append(float(np.abs(found.stress - expected.stress).mean()))
    return Difference(
        energy_mev_per_atom=1e3 * max(energies),
        force_mev_per_a=1e3 * max(forces),
        stress_mae=1e3 * max(stresses) if stresses else None,
        pairs=len(energies),
    )


def _energy(expected: Prediction, found: Prediction) -> float:
    """eV."""
    totals = [replace(prediction, energies=None) for prediction in (expected, found)]
    # a total may be a float32 by chance, two are so by nature
    rounding = TOTAL_ROUNDINGS * min(energy_resolution(total) for total in totals)
    return max(abs(energy_difference(found, expected)), abs(found.energy - expected.energy) - rounding)
