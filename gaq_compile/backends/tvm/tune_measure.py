"""Building and timing candidates in worker processes, so that a bad one cannot take anything along.

Candidates are compiled by MetaSchedule's ``LocalBuilder`` (a pool of processes, a time limit each). They
are timed in one process of the pool that MetaSchedule's ``LocalRunner`` uses too; its own evaluator is
not used, because a candidate is timed in alternation with the default, on the same data, after its
outputs have been compared with the default's. On a machine that others use as well, the ratio of two
alternating medians is steady where single times are not. (Other machines: :mod:`.tune_remote`.)
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from torch import Tensor

from .build import _load_library, build_executable, import_tvm
from .database import KernelKey, threads
from .tune_space import FAMILIES, Call, Candidate

Timer = Callable[[int], float]
"""Calls a kernel so many times and returns the seconds of one call."""
TOLERANCE = 1e-5
"""Relative to the largest output: float sums may be contracted otherwise, integers never differ."""
OTHER_RESULT = "another result than the default's"
_SAMPLE = 3e-3  # seconds that one timing lasts at least
_HOPELESS = 1.3


@dataclass(frozen=True)
class Timing:
    """One candidate against the default: medians of alternating timings, in seconds per call.

    Attributes:
        seconds: the candidate's.
        default_seconds: the default's.
        wins: the share of pairs that the candidate won.
        floor: the candidate's fastest timing over the default's fastest.
        error: why there is no result, else empty.
    """

    seconds: float = 0.0
    default_seconds: float = 0.0
    wins: float = 0.0
    floor: float = 4.0
    error: str = ""

    @property
    def ratio(self) -> float:
        """Candidate over default, the larger of medians' and minima's ratio; 4 for a failed candidate.

        On a machine that others use, a median can be disturbed on one side: a minimum rarely is.
        """
        return 4.0 if self.error else max(self.seconds / self.default_seconds, self.floor)


class Workers:
    """The processes that build and time candidates on this machine; use it as a context.

    Args:
        timeout: seconds after which a build or a measurement is given up.

    Attributes:
        pool: one process, started again if something takes it down.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        import_tvm()
        from tvm.s_tir.meta_schedule.builder import LocalBuilder
        from tvm.support.popen_pool import PopenPoolExecutor

        self._folder = TemporaryDirectory(prefix="gaq-tune-")
        self._builder = LocalBuilder(
            max_workers=max(1, torch.get_num_threads()),
            timeout_sec=timeout,
            f_build=_build,
            f_export=partial(_export, folder=self._folder.name),
        )
        self.pool = PopenPoolExecutor(max_workers=1, timeout=timeout)
        self._built: dict[str, Path | str] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self._folder.cleanup()

    def build(self, candidates: Sequence[Candidate], target: str) -> list[Path | str]:
        """A compiled library for each candidate, or what went wrong; none is built twice."""
        tvm = import_tvm()
        from tvm.s_tir.meta_schedule.builder import BuilderInput

        described = tvm.target.Target("llvm")  # the text's own target travels with the text
        names = [hashlib.sha256((target + c.source).encode()).hexdigest() for c in candidates]
        new = {n: c for n, c in zip(names, candidates, strict=True) if n not in self._built}
        inputs = [
            BuilderInput(tvm.IRModule({}, attrs={"gaq_source": c.source, "gaq_target": target}), described)
            for c in new.values()
        ]
        for name, made in zip(new, self._builder.build(inputs) if inputs else [], strict=True):
            failed = made.error_msg is not None
            self._built[name] = _short(made.error_msg) if failed else Path(str(made.artifact_path))
        return [self._built[name] for name in names]

    def measure(self, key: KernelKey, default: Built, other: Built, rounds: int) -> Timing:
        """Time a candidate against the default, ``rounds`` times each, in the worker."""
        future = self.pool.submit(_compare, key, default, other, rounds)
        try:
            return future.result()
        except TimeoutError:
            return Timing(error="gave no result in time")
        except ChildProcessError:
            return Timing(error="took its process down")


@dataclass(frozen=True)
class Built:
    """A schedule's fields and its compiled library."""

    schedule: dict[str, Any]
    library: str


def _short(message: Any) -> str:
    lines = [line for line in str(message).strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


# In the workers ---------------------------------------------------------------------------------


def _build(mod: Any, _target: Any, _params: Any) -> Any:
    return build_executable(str(mod.attrs["gaq_source"]), str(mod.attrs["gaq_target"]))


def _export(executable: Any, *, folder: str) -> str:
    path = str(Path(mkdtemp(dir=folder)) / "kernel.so")
    executable.export_library(path)
    return path


def _compare(key: KernelKey, default: Built, other: Built, rounds: int) -> Timing:
    """Check a candidate's outputs against the default's, then time both in alternation."""
    torch.set_num_threads(1)  # torch's own pool spins for a while after it has worked
    family = FAMILIES[key.family]
    first, second = (
        family.example(key, built.schedule, threads(), _load_library(Path(built.library)))
        for built in (default, other)
    )
    wanted = [t.clone() for t in first()]
    if not agree(wanted, second()):
        return Timing(error=OTHER_RESULT)
    return alternate(partial(_seconds, first), partial(_seconds, second), rounds)


def agree(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether a candidate's outputs are the default's, to ``TOLERANCE``."""
    return all(
        bool(torch.isfinite(got).all())
        and float((got - want).abs().max()) <= TOLERANCE * float(want.abs().max())
        for want, got in zip(wanted, found, strict=True)
    )


def alternate(first: Timer, second: Timer, rounds: int) -> Timing:
    """Time the default (``first``) and a candidate by turns; a hopeless candidate gets three rounds."""
    calls = max(1, int(_SAMPLE / max(first(3), 1e-7)))
    second(calls)
    pairs: list[tuple[float, float]] = []
    for i in range(rounds):
        pairs.append((first(calls), second(calls)))
        if i == 2 and min(s for _, s in pairs) > _HOPELESS * min(f for f, _ in pairs):
            break
    wins = sum(s < f for f, s in pairs) / len(pairs)
    floor = min(s for _, s in pairs) / min(f for f, _ in pairs)
    return Timing(statistics.median(s for _, s in pairs), statistics.median(f for f, _ in pairs), wins, floor)


def _seconds(call: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times
