"""Labelled structures, and batches of them whose neighbours are looked for once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import kcal, mol
from torch import Tensor

from ..capture.graphs import GraphFormat, Pairs, Tensors, batched, checked_pairs
from ..errors import FileFormatError, StructureError

_ARRAYS = ("nuclear_charges", "coords", "energies", "forces")


def read_rmd17(path: str | Path) -> list[Atoms]:
    """The frames of an rMD17 file (Christensen and von Lilienfeld, 2020; figshare 12672038), in eV and eV/Å.

    Args:
        path: an ``.npz`` with ``nuclear_charges``, ``coords`` (Å), ``energies`` (kcal/mol) and ``forces``
            (kcal/mol/Å).

    Raises:
        FileFormatError: if the file is missing, truncated, or has other arrays.
    """
    try:
        with np.load(path) as file:
            numbers, positions, energies, forces = (file[name] for name in _ARRAYS)
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise FileFormatError(f"no rMD17 frames: {error}", where=str(path)) from error
    if positions.shape != forces.shape or positions.shape[:2] != (len(energies), len(numbers)):
        raise FileFormatError(
            f"coords {positions.shape}, forces {forces.shape}, energies {energies.shape} do not match",
            where=str(path),
        )
    unit = kcal / mol
    return [
        labelled(Atoms(numbers, at), unit * float(energy), unit * force)
        for at, energy, force in zip(positions, energies, forces, strict=True)
    ]


def labelled(atoms: Atoms, energy: float, forces: np.ndarray) -> Atoms:
    """A structure with its reference energy (eV) and forces (eV/Å), as ASE keeps them."""
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


@dataclass(frozen=True)
class Batch:
    """Structures with labels.

    Attributes:
        tensors: a model's inputs.
        energies: (graphs,) eV, float64.
        forces: (N, 3) eV/Å.
        atoms: of each graph, float64.
    """

    tensors: Tensors
    energies: Tensor
    forces: Tensor
    atoms: Tensor


class Frames:
    """Labelled structures for training.

    Args:
        structures: each with an energy and forces, as ASE's calculators give them.
        form: a model's inputs.

    Raises:
        StructureError: for structures without labels, or that cannot be used.
        UnknownElementError: for an element that the model does not know.
    """

    def __init__(self, structures: Sequence[Atoms], form: GraphFormat) -> None:
        self.structures, self.form = list(structures), form
        self._pairs: list[Pairs] = checked_pairs(self.structures, form)
        try:
            self.energies = np.array([a.get_potential_energy() for a in self.structures])
            self.forces = [np.asarray(a.get_forces(), np.float32) for a in self.structures]
        except (RuntimeError, NotImplementedError) as error:
            raise StructureError(
                f"a structure without energy or forces: {error}",
                fix="give each a calculator, e.g. ase.calculators.singlepoint.SinglePointCalculator",
            ) from error
        if not np.isfinite(self.energies).all() or not all(np.isfinite(f).all() for f in self.forces):
            raise StructureError("labels with NaN or infinite entries", fix="leave those structures out")

    def __len__(self) -> int:
        return len(self.structures)

    @property
    def neighbours(self) -> float:
        """The mean number of an atom's neighbours."""
        return 2 * sum(len(p.receivers) for p in self._near()) / sum(map(len, self.structures))

    def _near(self) -> list[Pairs]:
        return [p.within(self.form.cutoff) for p in self._pairs]

    def batch(self, which: Sequence[int]) -> Batch:
        """Some of the structures as one batch."""
        chosen = [self.structures[k] for k in which]
        return Batch(
            batched(chosen, [self._pairs[k] for k in which], self.form),
            torch.tensor(self.energies[list(which)]),
            torch.from_numpy(np.concatenate([self.forces[k] for k in which])),
            torch.tensor([len(a) for a in chosen], dtype=torch.float64),
        )

    def batches(self, size: int, seed: int | None = None) -> Iterator[Batch]:
        """All structures once, in order or shuffled."""
        order = np.arange(len(self))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size].tolist())

    def element_energies(self, elements: Sequence[int], energies: np.ndarray | None = None) -> list[float]:
        """Energies of elements (eV) whose sums are the structures' (or other) energies, by least squares: of
        many such, as where all structures have one composition, the smallest."""
        energies = self.energies if energies is None else energies
        counts = np.array([[np.count_nonzero(a.numbers == z) for z in elements] for a in self.structures])
        return np.linalg.lstsq(counts.astype(float), energies, rcond=None)[0].tolist()

    @property
    def force_rms(self) -> float:
        """Of a component, eV/Å."""
        return float(np.sqrt(np.mean(np.concatenate([f.ravel() for f in self.forces]) ** 2)))
