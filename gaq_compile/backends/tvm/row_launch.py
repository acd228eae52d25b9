"""Which of a small kernel's functions runs: the one tuned for so many rows, or the default."""

from __future__ import annotations

from collections.abc import Callable

from .build import compile_kernel
from .database import by_bucket, problem_text, threads, tuned
from .launch import Choice, Launch, Part
from .row_kernel import UNTUNED, RowSchedule, row_schedule_from


def row_launch(
    family: str,
    problem: dict[str, str],
    parts: tuple[Part, ...],
    source: Callable[[RowSchedule], str],
    target: str,
) -> Launch:
    """A kernel whose rows are worked through by :func:`.row_kernel.row_loop`.

    Args:
        family, problem: as the tuning database knows it.
        parts: what the kernel takes, in its order.
        source: its text with a schedule.
        target: a TVM target in JSON.

    Raises:
        LoweringError: if TVM rejects the kernel.
    """
    stored = tuned(family, problem, target, threads(), row_schedule_from)
    choose = by_bucket(stored, UNTUNED, lambda schedule: Choice(compile_kernel(source(schedule), target)))
    return Launch(parts, choose, tuning=(family, problem_text(problem)))
