"""Symmetries besides rotation: where a structure stands, and in which order its atoms are listed.

With a translation t, lattice vectors L and a permutation P of equal descriptions of one structure::

    E(x + t) = E(x)             F(x + t) = F(x)
    E(x_i + L_i) = E(x)         F(x_i + L_i) = F(x)      (periodic directions, each atom its own L_i)
    E(Px) = E(x)                F(Px) = P F(x)

Rotations and reflections are :mod:`.equivariance`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .difference import Difference, largest
from .structures import displaced
from .types import Evaluate, Prediction, evaluated

if TYPE_CHECKING:
    from ase import Atoms


def translation(
    evaluate: Evaluate, structures: list[Atoms], *, trials: int = 3, distance: float = 10.0, seed: int = 0
) -> Difference:
    """What moving a whole structure changes; its atoms also go to other cells where there are any.

    Args:
        evaluate: the potential.
        structures: rattled ones.
        trials: random translations of each.
        distance: standard deviation of the translation's components, Å.
        seed: of the translations.

    Raises:
        StructureError: if there are no structures.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Prediction, Prediction]] = []
    for atoms, origin in zip(structures, evaluated(evaluate, structures), strict=True):
        moved = []
        for _ in range(trials):
            cells = rng.integers(-1, 2, size=(len(atoms), 3)) * atoms.pbc
            moved.append(displaced(atoms, rng.normal(scale=distance, size=3) + cells @ atoms.cell.array))
        pairs += [(origin, answer) for answer in evaluated(evaluate, moved)]
    return largest(pairs)


def permutation(evaluate: Evaluate, structures: list[Atoms], *, trials: int = 3, seed: int = 0) -> Difference:
    """What listing the atoms in another order changes; arguments and errors as :func:`translation`.

    The first trial reverses the order, the others are random.
    """
    rng = np.random.default_rng(seed)
    pairs: list[tuple[Prediction, Prediction]] = []
    for atoms, origin in zip(structures, evaluated(evaluate, structures), strict=True):
        count = len(atoms)
        orders = [np.arange(count)[::-1], *(rng.permutation(count) for _ in range(trials - 1))]
        answers = evaluated(evaluate, [displaced(atoms, np.zeros(3))[order] for order in orders])
        pairs += [(_ordered(origin, order), answer) for order, answer in zip(orders, answers, strict=True)]
    return largest(pairs)


def _ordered(prediction: Prediction, order: np.ndarray) -> Prediction:
    energies = None if prediction.energies is None else np.asarray(prediction.energies)[order]
    return replace(prediction, forces=np.asarray(prediction.forces)[order], energies=energies)
