"""Labels without reference data: a teacher's energies and forces on structures made from a few examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ..errors import ConfigError
from ..verify.structures import rattled
from ..verify.types import Evaluate
from .frames import labelled

SHAKES = (0.02, 0.04, 0.07, 0.1)  # Å, standard deviations of displacements


def shaken(examples: Sequence[Atoms], count: int, seed: int = 0) -> list[Atoms]:
    """So many copies of the examples, atoms displaced at random by 0.02 to 0.1 Å (standard deviation).

    Args:
        examples: taken in turn.
        count: of copies.
        seed: another one gives other displacements.

    Raises:
        ConfigError: without examples.
    """
    if not examples:
        raise ConfigError("no structures to make others from", fix="pass one ase.Atoms or more")
    seeds = np.random.default_rng(seed).integers(2**31, size=count)
    found = []
    for k, one in enumerate(seeds):
        atoms = examples[k % len(examples)]
        copy = rattled(atoms, SHAKES[(k // len(examples)) % len(SHAKES)], int(one))
        copy.info.update({name: v for name, v in atoms.info.items() if name in ("charge", "spin")})
        found.append(copy)
    return found


def taught(structures: Sequence[Atoms], teacher: Evaluate, batch: int = 16) -> list[Atoms]:
    """Copies of structures with the teacher's energies (eV) and forces (eV/Å) as labels.

    Args:
        structures: to be labelled.
        teacher: gives predictions for a list of structures, as a compiled potential does.
        batch: how many it is given at a time.
    """
    found = []
    for start in range(0, len(structures), batch):
        some = list(structures[start : start + batch])
        for atoms, answer in zip(some, teacher(some), strict=True):
            copy = atoms.copy()
            copy.info.update({name: v for name, v in atoms.info.items() if name in ("charge", "spin")})
            found.append(labelled(copy, answer.energy, answer.forces))
    return found
