"""What every instrument measures: an evaluator, structures in, predictions out.

The instruments know nothing of graphs, kernels or model families. Anything that maps a list of
``ase.Atoms`` to a list of :class:`Prediction` can be measured: the original model, the compiled
one, or an analytic potential in a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import StructureError, VerificationError

if TYPE_CHECKING:
    from ase import Atoms


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a potential says about one structure of n atoms.

    Attributes:
        energy: total energy, eV.
        forces: ``(n, 3)``, eV/Å.
        stress: ``(3, 3)``, eV/Å^3, ``(1/V) dE/dstrain`` (ASE's sign), or None.
        energies: ``(n,)`` per-atom energies, eV, that sum to ``energy``, or None. A total of
            thousands of eV in float32 has lost the digits that a difference of two needs; the
            per-atom energies still have them (:func:`energy_difference`).
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None = None
    energies: np.ndarray | None = None


Evaluate = Callable[["list[Atoms]"], "list[Prediction]"]


def from_calculator(calculator: Any, *, stress: bool | None = None) -> Evaluate:
    """An evaluator from an ASE calculator.

    Constraints on the structures are ignored: the instruments want the potential's own forces.

    Args:
        calculator: any ASE calculator with ``energy`` and ``forces``.
        stress: whether to ask for the stress of fully periodic structures; by default where the
            calculator offers it.
    """
    offered = set(calculator.implemented_properties)
    wants_stress = "stress" in offered if stress is None else stress

    def one(atoms: Atoms) -> Prediction:
        plain = atoms.copy()
        plain.set_constraint()
        energy = float(calculator.get_property("energy", plain))
        forces = np.array(calculator.get_property("forces", plain), dtype=np.float64)
        tensor = None
        if wants_stress and plain.pbc.all():
            tensor = full_stress(calculator.get_property("stress", plain))
        energies = None
        if "energies" in offered:
            energies = np.array(calculator.get_property("energies", plain), dtype=np.float64)
        return Prediction(energy, forces, tensor, energies)

    return lambda structures: [one(atoms) for atoms in structures]


def full_stress(voigt: np.ndarray) -> np.ndarray:
    """The ``(3, 3)`` tensor of ASE's six numbers (xx, yy, zz, yz, xz, xy); a tensor is kept."""
    values = np.asarray(voigt, dtype=np.float64)
    if values.shape == (3, 3):
        return values.copy()
    xx, yy, zz, yz, xz, xy = values
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def evaluated(evaluate: Evaluate, structures: list[Atoms]) -> list[Prediction]:
    """Call an evaluator and refuse answers that no instrument could judge.

    A NaN would otherwise slip through every ``error > tolerance``.

    Raises:
        StructureError: if there are no structures.
        VerificationError: for a wrong number of predictions, a wrong shape, a number that is not
            finite, or per-atom energies that do not sum to the energy.
    """
    if not structures:
        raise StructureError("no structures to evaluate", fix="give at least one structure")
    predictions = evaluate(structures)
    if len(predictions) != len(structures):
        raise VerificationError(
            f"the evaluator returned {len(predictions)} predictions for {len(structures)} structures"
        )
    for index, (atoms, prediction) in enumerate(zip(structures, predictions, strict=True)):
        _check_prediction(prediction, len(atoms), f"structure {index}, {atoms.get_chemical_formula()}")
    return predictions


def _check_prediction(prediction: Prediction, n: int, where: str) -> None:
    parts: list[tuple[str, Any, tuple[int, ...]]] = [
        ("energy", prediction.energy, ()),
        ("forces", prediction.forces, (n, 3)),
        ("stress", prediction.stress, (3, 3)),
        ("energies", prediction.energies, (n,)),
    ]
    for name, value, shape in parts:
        if value is None:
            continue
        if np.shape(value) != shape:
            raise VerificationError(f"{name} of shape {np.shape(value)}, expected {shape}", where=where)
        if not np.isfinite(value).all():
            raise VerificationError(f"{name} is not finite", where=where)
    if prediction.energies is not None:
        energies = np.asarray(prediction.energies, dtype=np.float64)
        gap = abs(energies.sum() - prediction.energy)
        # float32 sums of n terms; anything above it is a term that the per-atom energies lack
        if gap > 1e-5 * max(np.abs(energies).sum(), 1.0):
            raise VerificationError(
                f"per-atom energies sum to {energies.sum():.6f} eV, but the energy is "
                f"{prediction.energy:.6f} eV",
                where=where,
                fix="leave `energies` out (None) where some term of the energy is not per atom",
            )


def energy_difference(a: Prediction, b: Prediction) -> float:
    """``E(a) - E(b)`` in eV, with as many digits as the predictions hold.

    Where both carry per-atom energies, these are differenced atom by atom in float64 and then
    summed; the total's float32 rounding never enters.
    """
    if a.energies is not None and b.energies is not None:
        return float(
            np.sum(np.asarray(a.energies, dtype=np.float64) - np.asarray(b.energies, dtype=np.float64))
        )
    return float(a.energy) - float(b.energy)


def energy_resolution(prediction: Prediction) -> float:
    """The rounding (eV) to expect in an energy difference, from how the numbers are stored.

    The spacing of floats at the energy, in float32 if the number is exactly a float32. With
    per-atom energies the independent roundings of the n atoms add up as a root of squares.
    """
    values = np.atleast_1d(
        np.asarray(
            prediction.energy if prediction.energies is None else prediction.energies, dtype=np.float64
        )
    )
    single = values.astype(np.float32)
    in_float32 = bool(np.all(single.astype(np.float64) == values))
    spacing = np.spacing(np.abs(single)) if in_float32 else np.spacing(np.abs(values))
    return float(np.sqrt(np.sum(spacing.astype(np.float64) ** 2)))
