"""Is a structure's answer its own, whatever else is evaluated with it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import StructureError
from .difference import Difference, largest
from .types import Evaluate, Prediction, evaluated

if TYPE_CHECKING:
    from ase import Atoms


def batching(evaluate: Evaluate, structures: list[Atoms]) -> Difference:
    """Compare each structure's answer alone with its answers in batches.

    The batches are the whole list, the list backwards, and each structure beside a copy of itself.

    Args:
        evaluate: the potential, evaluating a list as one batch.
        structures: two or more, better of different sizes.

    Raises:
        StructureError: for fewer than two structures.
        VerificationError: for answers of wrong shape or numbers that are not finite.
    """
    if len(structures) < 2:
        raise StructureError(
            "a batch of one structure shows nothing", fix="give two or more, of different sizes"
        )
    alone = [evaluated(evaluate, [atoms])[0] for atoms in structures]
    pairs: list[tuple[Prediction, Prediction]] = []
    pairs += zip(alone, evaluated(evaluate, structures), strict=True)
    pairs += zip(alone[::-1], evaluated(evaluate, structures[::-1]), strict=True)
    for origin, atoms in zip(alone, structures, strict=True):
        pairs += [(origin, answer) for answer in evaluated(evaluate, [atoms, atoms.copy()])]
    return largest(pairs)
