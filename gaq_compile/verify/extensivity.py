"""Is twice the system twice the energy?

Two copies farther apart than anything reaches do not know of each other::

    E(A + A) = 2 E(A)       F(A + A) = (F(A), F(A))

A periodic structure is repeated along its first periodic direction instead, where the same holds
exactly and the stress stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from .difference import Difference, largest
from .structures import displaced
from .types import Evaluate, Prediction, evaluated

if TYPE_CHECKING:
    from ase import Atoms

FAR = 20.0  # Å; beyond the longest cutoff of the common potentials


def extensivity(evaluate: Evaluate, structures: list[Atoms], *, far: float = FAR) -> Difference:
    """Compare twice each structure with two of it.

    Args:
        evaluate: the potential.
        structures: rattled ones.
        far: the gap between two copies that are not periodic, Å; must exceed every cutoff.

    Raises:
        ConfigError: for a gap that is not positive.
        StructureError: if there are no structures.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    if not far > 0.0:
        raise ConfigError(f"two copies cannot be {far} Å apart", fix="give a distance beyond every cutoff")
    single = evaluated(evaluate, structures)
    double = evaluated(evaluate, [doubled(atoms, far) for atoms in structures])
    return largest((_twice(one), two) for one, two in zip(single, double, strict=True))


def doubled(atoms: Atoms, far: float) -> Atoms:
    """The structure and its copy: a gap of ``far`` Å along x, or the cell repeated once.

    Total charge and spin (``info``), where given, double too.
    """
    plain = displaced(atoms, np.zeros(3))
    if plain.pbc.any():
        repeats = [1, 1, 1]
        repeats[int(np.argmax(plain.pbc))] = 2
        both = plain.repeat(repeats)
    else:
        both = plain + displaced(plain, np.array([np.ptp(plain.positions[:, 0]) + far, 0.0, 0.0]))
    both.info.update({key: 2 * plain.info[key] for key in ("charge", "spin") if key in plain.info})
    return both


def _twice(one: Prediction) -> Prediction:
    energies = None if one.energies is None else np.tile(one.energies, 2)
    return Prediction(2.0 * one.energy, np.tile(one.forces, (2, 1)), one.stress, energies)
