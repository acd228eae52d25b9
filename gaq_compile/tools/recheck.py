"""The checks of a saved potential, run again on structures of the user's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ase import Atoms

from ..capture.base import Original
from ..capture.graphs import collate
from ..config import is_conservative
from ..potential import Potential
from ..subject import evaluator
from ..verify import checks
from ..verify.parity import parity
from ..verify.report import Report
from ..verify.types import Evaluate

ROTATED = 4  # structures that are rotated
DISPLACED = 2  # structures whose energy is differenced


def recheck(potential: Potential, structures: Sequence[Atoms], original: Original | None) -> Report:
    """The report of ``potential`` with every figure measured anew on ``structures``.

    Args:
        potential: a compiled or loaded potential.
        structures: one or more; atoms and edges in the report are those of the first. Errors are
            taken over all of them, LEE over the first four, the gradient over the first two.
        original: the model it was made from; without it ``accuracy`` stays empty.

    Raises:
        StructureError: for structures that cannot be evaluated, or none.
        VerificationError: if forces that are claimed to be the energy's gradient are not.
    """
    frames = list(structures)
    first = collate(frames[:1], potential.form)
    accuracy = {} if original is None else _accuracy(potential, frames, evaluator(original))
    kept = ("weights_fp32_bytes", "weights_bytes")
    return replace(
        potential.report,
        atoms=len(frames[0]),
        edges=int(first["edge_vec"].shape[0]),
        accuracy=accuracy,
        equivariance=checks.equivariance_figures(potential.predict, frames[:ROTATED]),
        conservativity=checks.conservativity_figures(
            potential.predict, frames[:DISPLACED], is_conservative(potential.config)
        ),
        speed={},
        memory={name: potential.report.memory[name] for name in kept if name in potential.report.memory},
    )


def _accuracy(potential: Potential, frames: list[Atoms], original: Evaluate) -> dict[str, float]:
    found = parity(original, potential.predict, frames)
    return {
        "energy_mev_per_atom": found.energy_mev_per_atom,
        "force_mae_mev_per_a": found.force_mae_mev_per_a,
        "force_rel": found.force_rel,
        "force_max_mev_per_a": found.force_max_mev_per_a,
        "structures": found.structures,
    }
