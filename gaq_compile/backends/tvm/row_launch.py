"""Which of a small kernel's functions runs: the one tuned for so many rows, or the default."""

from __future__ import annotations

from collections.abc import Callable

from .build import compile_kernel
from .database import BUCKETS, bucket, problem_text, threads, tuned
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
    schedules = {rows: stored.get(rows, UNTUNED) for rows in BUCKETS}
    made = {s: Choice(compile_kernel(source(s), target)) for s in schedules.values()}
    choices = {rows: made[schedule] for rows, schedule in schedules.items()}
    return Launch(parts, lambda rows: choices[bucket(rows)], tuning=(family, problem_text(problem)))
