"""A compiled potential as an ASE calculator.

>>> atoms.calc = GAQCalculator("azobenzene.gaq")
>>> atoms.get_forces()  # eV/Å
"""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from ..errors import StructureError
from ..potential import Potential


class GAQCalculator(Calculator):
    """Energy, forces and stress from a :class:`Potential`, in ASE's units and conventions.

    One evaluation answers for all properties, and an unchanged structure is never evaluated twice.
    Total charge and spin are read from ``atoms.info["charge"]`` and ``atoms.info["spin"]``; a
    change of either counts as a change of the structure.

    Properties: ``energy`` and ``free_energy`` (eV), ``energies`` (n,) eV, ``forces`` (n, 3) eV/Å,
    ``stress`` (6,) eV/Å^3 in Voigt order xx, yy, zz, yz, xz, xy (fully periodic structures only).

    Args:
        potential: a compiled potential, or the path of a ``.gaq`` file.
        settings: ASE's own calculator settings (``label``, ``atoms``, ``directory``).

    Raises:
        FileFormatError: if the file is truncated, damaged or foreign.
        StructureError: when evaluated on NaN positions, coincident atoms or unknown elements.
    """

    implemented_properties = ["energy", "free_energy", "energies", "forces", "stress"]  # noqa: RUF012
    # No potential here reads them, so they must not cost an evaluation.
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(self, potential: Potential | str | Path, **settings: Any) -> None:
        super().__init__(**settings)
        self._last: Atoms | None = None  # the structure evaluated last; ASE forgets it at every change
        if isinstance(potential, Potential):
            self.potential = potential
        else:
            from ..api import load

            self.potential = load(potential)

    def check_state(self, atoms: Atoms, tol: float | None = None) -> list[str]:
        """ASE's list of changes since the last evaluation, charge and spin included.

        Without ``tol`` (ASE's is 1e-15) any other number is a change, which is several times faster to
        see; dynamics ask twice a step.
        """
        changes = _changes(self.atoms, atoms) if tol is None else list(super().check_state(atoms, tol=tol))
        if self.atoms is not None and _charge_and_spin(self.atoms) != _charge_and_spin(atoms):
            changes.append("info")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Evaluate every property of ``atoms`` at once into ``results``.

        Raises:
            StructureError: for a structure that cannot be evaluated, or none at all.
            PropertyNotImplementedError: for the stress of a structure that is not fully periodic.
        """
        wanted = properties or ["energy"]
        if "energy" not in self.results or system_changes:
            if atoms is not None:
                self.atoms = self._last = self._copied(atoms, system_changes)
            self.results = {}  # should this evaluation fail, the last one's answer must not survive
            self.results = self._evaluate()
        missing = [name for name in wanted if name not in self.results]
        if missing:
            raise PropertyNotImplementedError(
                f"{', '.join(missing)}: only for structures that are periodic in all three directions"
            )

    def _copied(self, atoms: Atoms, system_changes: list[str]) -> Atoms:
        """A copy of ``atoms``; where they only moved, from the one before, for a fraction of the time."""
        if self._last is None or list(system_changes) != ["positions"]:
            return atoms.copy()
        made = copy(self._last)
        made.arrays = {name: values.copy() for name, values in atoms.arrays.items()}
        made.info = dict(atoms.info)
        return made

    def _evaluate(self) -> dict[str, Any]:
        if self.atoms is None:
            raise StructureError("no structure was given", fix="atoms.calc = calculator, or pass atoms=")
        found = self.potential.predict([self.atoms])[0]
        results: dict[str, Any] = {
            "energy": float(found.energy),
            "free_energy": float(found.energy),
            "forces": np.asarray(found.forces, dtype=np.float64),
        }
        if found.energies is not None:
            results["energies"] = np.asarray(found.energies, dtype=np.float64)
        if found.stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(found.stress)
        return results


def _changes(known: Atoms | None, atoms: Atoms) -> list[str]:
    """Of what potentials read, all that differs, by ASE's names."""
    if known is None:
        return list(all_changes)
    pairs = {
        "positions": (known.arrays["positions"], atoms.arrays["positions"]),
        "numbers": (known.arrays["numbers"], atoms.arrays["numbers"]),
        "cell": (known.cell.array, atoms.cell.array),
        "pbc": (known.pbc, atoms.pbc),
    }
    return [name for name, (a, b) in pairs.items() if a.shape != b.shape or not (a == b).all()]


def _charge_and_spin(atoms: Atoms) -> tuple[float, float]:
    return float(atoms.info.get("charge", 0.0)), float(atoms.info.get("spin", 0.0))
