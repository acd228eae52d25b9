"""How far a run of dynamics is and what its steps take, told while it runs and kept beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

BLOCK = 200  # steps that are timed as one
TOLD = 50  # lines of a log in a whole run


class Stopwatch:
    """The median time of a step, over blocks of steps; of all processes that took part in a run.

    Args:
        file: one line with a block's milliseconds per step is added to it at a time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.latest: float | None = None
        self._last: tuple[int, int] | None = None  # step, ns

    def lap(self, step: int) -> bool:
        """Whether a block is complete; to be called after every step."""
        if self._last is None:
            self._last = step, time.perf_counter_ns()
        elif step - self._last[0] == BLOCK:
            self._close(step)
            return True
        return False

    def _close(self, step: int) -> None:
        begun, since = self._last or (step, 0)
        now = time.perf_counter_ns()
        self.latest = 1e-6 * (now - since) / (step - begun)
        with self.file.open("a") as file:
            file.write(f"{self.latest:.4f}\n")
        self._last = step, now

    def stop(self, step: int) -> None:
        """The run ends here; one shorter than a block is a block."""
        if self._last is not None and step > self._last[0] and self.median_ms is None:
            self._close(step)

    @property
    def median_ms(self) -> float | None:
        """Milliseconds; None for a run that was never timed."""
        if not self.file.exists():
            return None
        lines = self.file.read_text().splitlines()
        # the last may be torn
        times = [float(line) for line in lines if line.replace(".", "", 1).isdecimal()]
        return float(np.median(times)) if times else None


@contextmanager
def watched(label: str, steps: int, timer: Stopwatch, console: Console) -> Iterator[Callable[[int], None]]:
    """What a run is to call after every step: a bar where there is a terminal, else a line now and then."""
    reached = 0
    with _bar(label, steps, console) if console.is_terminal else _log(label, steps) as show:

        def tell(step: int) -> None:
            nonlocal reached
            reached = step
            if timer.lap(step):
                show(step, timer.latest or 0.0)

        yield tell
    timer.stop(reached)


@contextmanager
def _bar(label: str, steps: int, console: Console) -> Iterator[Callable[[int, float], None]]:
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    speed = TextColumn("{task.fields[speed]}")
    # drawn once a second: at ten times, a hundredth of the steps' time went into it
    with Progress(*columns, speed, console=console, transient=True, refresh_per_second=1) as bar:
        task = bar.add_task(label, total=steps, speed="")
        yield lambda step, ms: bar.update(task, completed=step, speed=f"{ms:.2f} ms/step")


@contextmanager
def _log(label: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    told = -1

    def show(step: int, ms: float) -> None:
        nonlocal told
        part = step * TOLD // steps
        if part > told >= 0:
            left = ms * (steps - step) / 60_000
            line = f"{label}: {100 * step / steps:.0f} %, step {step} of {steps}"
            line += f", {ms:.2f} ms/step, {left:.0f} min left"
            print(line, flush=True)
        told = part

    yield show
