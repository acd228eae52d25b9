"""What this machine can do, measured: operations per second by arithmetic, bytes per second by size.

Every peak comes from a generated kernel of its own that does nothing else, on the thread pool that
all kernels run on. Arithmetic: a dozen independent sums in registers, with the instruction that
the package's own kernels use (``vector_unit``); a multiplication and an addition are two operations.
Bandwidth: each thread reads (or writes) its part of a buffer again and again, so that a buffer that
fits a cache shows that cache's bandwidth.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.tvm.build import compile_kernel, host_target
from ..backends.tvm.database import threads
from ..backends.tvm.emit import kernel_text, local, loop, splat, vector, vector_lanes
from ..backends.tvm.vnni import VectorUnit, vector_unit

ARITHMETICS = ("f32", "s16", "s8")
SIZES = tuple(1 << power for power in (18, 20, 22, 24, 26, 28))  # bytes: from inside a core's cache to memory
CACHED = 1 << 24  # bytes that a last-level cache usually holds and a core's own does not
_SUMS, _STEPS, _UNROLLED = 12, 64, 8
_SECONDS = 0.05  # of each timed call: the pool's start is then nothing


@dataclass(frozen=True)
class Machine:
    """Measured peaks.

    Attributes:
        threads: of the pool.
        operations: per second, by arithmetic (``ARITHMETICS``).
        read, write: bytes per second, by the size (bytes) of what is read or written again and again.
    """

    threads: int
    operations: dict[str, float]
    read: dict[int, float]
    write: dict[int, float]

    def seconds(self, operations: Mapping[str, float], read: float, written: float) -> tuple[float, float]:
        """The least time for operations, and for bytes that are read and written once.

        Bytes move at the best bandwidth that was seen at their size or a larger one: what fits a cache
        may lie there.
        """
        size = read + written
        computing = sum(count / self.operations[kind] for kind, count in operations.items() if count)
        moving = read / best(self.read, size) + written / best(self.write, size)
        return computing, moving

    def to_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are text."""
        return {**asdict(self), "read": list(self.read.items()), "write": list(self.write.items())}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Machine:
        """The inverse of :meth:`to_dict`."""
        return Machine(data["threads"], dict(data["operations"]), dict(data["read"]), dict(data["write"]))


def best(bandwidth: Mapping[int, float], size: float) -> float:
    """The highest bandwidth measured at ``size`` bytes or more; beyond all, the largest size's."""
    found = [speed for measured, speed in bandwidth.items() if measured >= size]
    return max(found) if found else bandwidth[max(bandwidth)]


def processor() -> str:
    """This machine's CPU, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def measure_machine(seconds: float = _SECONDS, tries: int = 5) -> Machine:
    """Measure; takes some ``20 * tries * seconds`` and compiles five small kernels the first time.

    Args:
        seconds: how long each timed call takes.
        tries: timed calls of each kernel, of which the fastest counts.
    """
    target = host_target()
    unit, lanes = vector_unit(target), vector_lanes(target)
    operations = {kind: _operations(kind, unit, target, seconds, tries) for kind in ARITHMETICS}
    reading, writing = (compile_kernel(text, target) for text in (read_source(lanes), write_source(lanes)))
    buffer = torch.ones(SIZES[-1] // 4)  # written: pages that nobody has touched are all the same one
    return Machine(
        threads(),
        operations,
        {size: _bandwidth(reading, buffer[: size // 4], seconds, tries) for size in SIZES},
        {size: _bandwidth(writing, buffer[: size // 4], seconds, tries) for size in SIZES},
    )


def _operations(kind: str, unit: VectorUnit, target: str, seconds: float, tries: int) -> float:
    kernel, lanes, step = compile_kernel(peak_source(kind, unit), target), unit.lanes, unit.step(kind)
    dtype = {"float32": torch.float32, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8}
    kept = dtype[_operand(kind, unit)]
    a = torch.ones(_SUMS, lanes * step, dtype=kept)
    w = torch.ones(_STEPS, lanes * step, dtype=kept)
    out = torch.zeros(threads(), _SUMS * lanes, dtype=torch.float32 if kind == "f32" else torch.int32)
    each = 2.0 * threads() * _SUMS * _STEPS * lanes * step
    return each * _rate(lambda repeats: kernel(a, w, out, repeats), seconds, tries)


def _bandwidth(kernel: Callable[..., None], buffer: Tensor, seconds: float, tries: int) -> float:
    out = torch.zeros(threads(), 16)
    parts = buffer[: len(buffer) // len(out) // 1024 * 1024 * len(out)].view(len(out), -1)
    return 4.0 * parts.numel() * _rate(lambda repeats: kernel(parts, out, repeats), seconds, tries)


def _rate(run: Callable[[int], None], seconds: float, tries: int) -> float:
    """Repetitions per second in the fastest call of about so many seconds."""
    repeats = 1
    while (spent := _seconds(run, repeats)) < seconds / 4:
        repeats = max(2 * repeats, int(repeats * seconds / max(spent, 1e-6) / 2))
    repeats = max(1, round(repeats * seconds / spent))
    return repeats / min(_seconds(run, repeats) for _ in range(tries))


def _seconds(run: Callable[[int], None], repeats: int) -> float:
    start = time.perf_counter()
    run(repeats)
    return time.perf_counter() - start


# --- kernels ------------------------------------------------------------------------------------


def _operand(kind: str, unit: VectorUnit) -> str:
    """What one operand's register is made of."""
    if kind == "f32":
        return "float32"
    return {1: "int32", 2: "int16", 4: "int8"}[unit.step(kind)]


def peak_source(kind: str, unit: VectorUnit) -> str:
    """TVMScript of ``main(a, w, out, repeats)``: ``out[i] = sum over repeats and k of a[i] . w[k]``."""
    lanes, wide, dtype = unit.lanes, unit.lanes * unit.step(kind), _operand(kind, unit)
    total = "float32" if kind == "f32" else "int32"
    sums = [vector(f"s{i}", "0", lanes) for i in range(_SUMS)]
    zero = splat(f"T.{total}(0)", lanes)
    products = [f"w0: T.let = {vector('w', '0', wide, 'k')}"]
    products += [f"{held} = {unit.accumulate(kind, held, f'a{i}', 'w0')}" for i, held in enumerate(sums)]
    task = [
        *(local(f"s{i}", lanes, total) for i in range(_SUMS)),
        *(f"a{i}: T.let = {vector('a', '0', wide, str(i))}" for i in range(_SUMS)),
        *(f"{held} = {zero}" for held in sums),
        *loop("n in T.serial(repeats)", loop(f"k in T.serial({_STEPS})", products)),
        *(f"{vector('out', str(i * lanes), lanes, 't')} = {held}" for i, held in enumerate(sums)),
    ]
    buffers = [
        ("a", f"{_SUMS}, {wide}", dtype),
        ("w", f"{_STEPS}, {wide}", dtype),
        ("out", f"tasks, {_SUMS * lanes}", total),
    ]
    return _with_repeats(kernel_text(buffers, loop("t in T.parallel(tasks)", task)))


def read_source(lanes: int) -> str:
    """TVMScript of ``main(x, out, repeats)``: adds up each row of x (tasks, many), again and again."""
    sums = [vector(f"s{i}", "0", lanes) for i in range(_UNROLLED)]
    add = [
        f"{held} = {held} + {vector('x', f'j * {_UNROLLED * lanes} + {i * lanes}', lanes, 't')}"
        for i, held in enumerate(sums)
    ]
    task = [
        *(local(f"s{i}", lanes) for i in range(_UNROLLED)),
        *(f"{held} = {splat('T.float32(0)', lanes)}" for held in sums),
        *loop("n in T.serial(repeats)", loop(f"j in T.serial(many // {_UNROLLED * lanes})", add)),
        *(f"{vector('out', '0', lanes, 't')} = {vector('out', '0', lanes, 't')} + {held}" for held in sums),
    ]
    return _with_repeats(kernel_text(_BUFFERS, loop("t in T.parallel(tasks)", task)))


def write_source(lanes: int) -> str:
    """TVMScript of ``main(x, out, repeats)``: fills each row of x, with another number each time."""
    value = splat('T.Cast("float32", n)', lanes)
    fill = [
        f"{vector('x', f'j * {_UNROLLED * lanes} + {i * lanes}', lanes, 't')} = {value}"
        for i in range(_UNROLLED)
    ]
    task = loop("n in T.serial(repeats)", loop(f"j in T.serial(many // {_UNROLLED * lanes})", fill))
    return _with_repeats(kernel_text(_BUFFERS, loop("t in T.parallel(tasks)", task)))


_BUFFERS = [("x", "tasks, many", "float32"), ("out", "tasks, 16", "float32")]


def _with_repeats(text: str) -> str:
    """The kernel with a number as its last argument."""
    return text.replace("out_h: T.handle)", "out_h: T.handle, repeats: T.int32)")
