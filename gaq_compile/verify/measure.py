"""Time and memory, measured so that the answer can be repeated.

Time: the two sides alternate, in an order that itself alternates, after a warm-up of both, so that
a machine that slows down slows both. Memory: in a process of its own, because a peak can never be
taken back and an allocator never returns all that it took.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ..errors import ConfigError, VerificationError

_SAMPLE_SECONDS = 1e-3
_TURN_MS = 20.0  # of a side's turn
_LONG_MS = 200.0  # what takes so long is not ruled by what caches held before


@dataclass(frozen=True)
class Timing:
    """Two callables timed alternately.

    Attributes:
        a_ms: median wall time of ``a``, ms.
        b_ms: median wall time of ``b``, ms.
        ratio: median over pairs of ``a_ms / b_ms``: how many times faster ``b`` is.
        ratio_low, ratio_high: quartiles of the pairs' ratios.
        spread: ``(ratio_high - ratio_low) / ratio``; above some 0.2 the machine was not quiet.
        runs: timed pairs.
    """

    a_ms: float
    b_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    spread: float
    runs: int


def alternate(a: Callable[[], object], b: Callable[[], object], runs: int = 20, warmup: int = 5) -> Timing:
    """Time ``a`` and ``b`` in pairs of turns: a b, b a, a b, ... (:func:`alternate_all`).

    Args:
        a: one side, e.g. the original model. Must not return before its work is done.
        b: the other side, e.g. the compiled one.
        runs: timed pairs, two or more.
        warmup: untimed pairs before; compilers and allocators need several.

    Raises:
        ConfigError: for fewer than two runs or a negative warm-up.
    """
    times = alternate_all({"a": a, "b": b}, runs, warmup)
    times_a, times_b = times["a"], times["b"]
    ratios = [x / y for x, y in zip(times_a, times_b, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Timing(
        a_ms=statistics.median(times_a),
        b_ms=statistics.median(times_b),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        spread=(high - low) / ratio,
        runs=runs,
    )


def alternate_all(
    calls: Mapping[str, Callable[[], object]], runs: int = 20, warmup: int = 5
) -> dict[str, list[float]]:
    """Time several callables in rounds of turns: a b c, c b a, a b c, ...

    A turn is one call that does not count, which finds the caches as the side before has left them, and
    calls that count, for some hundredths of a second: as in dynamics, where a potential runs again and
    again. Of calls that take long every one counts.

    Args:
        calls: by name; each must not return before its work is done.
        runs: timed rounds, two or more.
        warmup: untimed rounds before.

    Returns:
        The wall time (ms) of each, round by round: the median of its turn.

    Raises:
        ConfigError: for fewer than two runs or a negative warm-up.
    """
    if runs < 2 or warmup < 0:
        raise ConfigError(
            f"cannot time {runs} runs after {warmup} warm-up runs", fix="runs >= 2, warmup >= 0"
        )
    for _ in range(warmup):
        for call in calls.values():
            call()
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(runs):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            times[name].append(_turn(calls[name]))
    return times


def _turn(call: Callable[[], object]) -> float:
    first = _milliseconds(call)
    if first >= _LONG_MS:
        return first
    times, spent = [_milliseconds(call)], 0.0
    while (spent := spent + times[-1]) < _TURN_MS:
        times.append(_milliseconds(call))
    return statistics.median(times)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return max(time.perf_counter_ns() - start, 1) * 1e-6


@dataclass(frozen=True)
class MeasuredRun:
    """A command that ran in a fresh process: its peak resident memory (bytes), time, and output."""

    peak_bytes: int
    seconds: float
    stdout: str


# A process inherits the peak of the one that forked it, through exec. A small launcher in between
# keeps a large parent's gigabytes out of the child's figure.
_LAUNCHER = """
import json, os, sys, time
report, argv = int(sys.argv[1]), sys.argv[2:]
os.set_inheritable(report, False)
start = time.perf_counter()
try:
    pid = os.posix_spawnp(argv[0], argv, os.environ)
except OSError as error:
    sys.exit(f"cannot start {argv[0]}: {error}")
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
os.write(report, json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss, seconds]).encode())
"""


def measured_run(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> MeasuredRun:
    """Run a command in a fresh process and measure its peak resident memory.

    The figure is of the command itself, not of processes that it starts in turn.

    Args:
        argv: program and arguments, e.g. ``[sys.executable, "script.py"]``.
        env: its whole environment; by default this process's.
        timeout: seconds after which it is ended.

    Raises:
        VerificationError: if it cannot be started, fails, or runs out of time.
    """
    where = " ".join(argv)
    read_end, write_end = os.pipe()
    try:
        done = _launch(argv, write_end, env, timeout)
    except subprocess.TimeoutExpired:
        os.close(read_end)
        raise VerificationError(f"no end after {timeout} s", where=where) from None
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        report = pipe.read()
    if not report:
        raise VerificationError("the measured command did not start", where=f"{where}\n{done.stderr[-2000:]}")
    code, peak, seconds = json.loads(report)
    if code != 0:
        raise VerificationError(
            f"the measured command failed with exit status {code}", where=f"{where}\n{done.stderr[-2000:]}"
        )
    return MeasuredRun(_maxrss_bytes(peak), seconds, done.stdout)


def _launch(
    argv: Sequence[str], report: int, env: Mapping[str, str] | None, timeout: float | None
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(report), *argv]
    with subprocess.Popen(
        launcher,
        env=None if env is None else dict(env),
        pass_fds=[report],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            # Whatever it is, and it may be Ctrl-C or a test's time limit: nobody else would end the launcher
            # and the command, which have a session of their own, and leaving the block waits for them.
            os.killpg(process.pid, 9)
            raise
    return subprocess.CompletedProcess(launcher, process.returncode, stdout, stderr)


def peak_memory(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> int:
    """Peak resident memory (bytes) of a command in a fresh process; see :func:`measured_run`."""
    return measured_run(argv, env=env, timeout=timeout).peak_bytes


def _maxrss_bytes(value: int) -> int:
    return value if sys.platform == "darwin" else value * 1024


def _own_peak() -> int:
    import resource  # not on every system: only where it is used

    return _maxrss_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@dataclass
class MemoryGrowth:
    """What :func:`memory_growth` found; complete after its block.

    Attributes:
        baseline_bytes: resident memory before the block.
        peak_bytes: highest resident memory within it.
        method: ``"reset"`` (the kernel's high-water mark, reset before the block), ``"sampled"``
            (read every millisecond: may miss a short peak) or ``"maxrss"`` (the process's peak
            since its start: an earlier, higher peak hides the block's).
    """

    baseline_bytes: int
    peak_bytes: int
    method: str

    @property
    def growth_bytes(self) -> int:
        return max(self.peak_bytes - self.baseline_bytes, 0)


def tensor_peak(run: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once during ``run()``, beyond those alive before.

    Counted by torch's allocator, so it is exact at any size and the same every time; a kernel's own
    scratch space (tiles of some KiB) and the libraries are not in it. The largest structures are
    better measured as whole processes (:func:`memory_growth`).
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler's library writes past Python to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    sizes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return max(accumulate((size for *_, size in sizes), initial=0))


@contextmanager
def memory_growth(*, allow_reset: bool = True) -> Iterator[MemoryGrowth]:
    """Measure how far resident memory rises above the present during a block.

    To be used in the measured process itself, after the model is loaded and before it first runs.
    The kernel counts pages per CPU: figures are exact to some hundred KiB.

    >>> with memory_growth() as memory:
    ...     _ = bytearray(10)
    >>> memory.growth_bytes >= 0
    True
    """
    gc.collect()
    if _status("VmRSS") is None:
        start = _own_peak()
        growth = MemoryGrowth(start, start, "maxrss")
        try:
            yield growth
        finally:
            growth.peak_bytes = _own_peak()
        return
    was_reset = allow_reset and _reset_high_water()
    baseline, mark = _status("VmRSS") or 0, _status("VmHWM") or 0
    growth = MemoryGrowth(baseline, baseline, "reset" if was_reset else "sampled")
    sampler = None if was_reset else _Sampler()
    try:
        yield growth
    finally:
        sampled = sampler.stop() if sampler else 0
        after = _status("VmHWM") or 0
        # without a reset, a mark that rose during the block is the block's own peak, exactly
        exact = after if was_reset or after > mark else 0
        growth.peak_bytes = max(exact, sampled, _status("VmRSS") or 0, baseline)


def _status(field: str) -> int | None:
    """``/proc/self/status``'s memory field in bytes; None where there is no such file or field."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _reset_high_water() -> bool:
    """Set the kernel's high-water mark of resident memory to the present; False if not permitted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    now, mark = _status("VmRSS"), _status("VmHWM")
    # some kernels and sandboxes accept the write and do nothing
    return now is not None and mark is not None and mark - now < 1 << 20


class _Sampler:
    """A thread that keeps the highest resident memory seen."""

    def __init__(self) -> None:
        self._highest = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self._highest = max(self._highest, _status("VmRSS") or 0)
            if self._ended.wait(_SAMPLE_SECONDS):
                return

    def stop(self) -> int:
        """End the thread; the highest resident memory in bytes."""
        self._ended.set()
        self._thread.join()
        return self._highest
