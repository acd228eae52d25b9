"""Small pieces of TVMScript text that the GPU's kernel generators share."""

from __future__ import annotations

from collections.abc import Sequence

from ..emit import kernel_text, loop
from ..row_kernel import Emitter

WARP = 32  # threads that run in step
THREADS = 256  # of a block that has nothing in common
SYNC = 'T.evaluate(T.tvm_storage_sync("shared"))'
_ALL = "T.uint32(0xFFFFFFFF)"  # every lane takes part in a shuffle


class ThreadEmitter(Emitter):
    """Collects statements on the numbers of one thread.

    Every value is a mutable scalar, which TVM leaves where it is: a ``let`` it would put into what uses it,
    which grows without bound along a chain, and the pass that takes common parts out again is off
    (:mod:`.source`). To nvcc both are registers.

    CUDA's ``min`` and ``max`` return the number where the other operand is NaN; bounds are
    therefore chosen by comparing, which keeps NaN.
    """

    def __init__(self, prefix: str = "v") -> None:
        super().__init__(1, prefix)

    def let(self, expression: str) -> str:
        """Name an expression; returns the name."""
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def one_and_exp(self, x: str) -> str:
        """1 + e^-x; a GPU's division does not wait for its sums."""
        return self.let(f"{self.number(1.0)} + {self.exp(self.let(f'{self.number(0.0)} - {x}'))}")

    def at_least(self, bound: str, x: str) -> str:
        """The larger of both; NaN where x is."""
        x = self.let(x)
        return f"T.Select({x} < {bound}, {bound}, {x})"

    def at_most(self, bound: str, x: str) -> str:
        """The smaller of both; NaN where x is."""
        x = self.let(x)
        return f"T.Select({x} > {bound}, {bound}, {x})"


def local(name: str, size: int, dtype: str = "float32") -> str:
    """A small array of a thread's own, in registers where its indices are constants."""
    return f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="local")'


def shared(name: str, size: int, dtype: str = "float32") -> str:
    """An array that the threads of a block share."""
    return f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="shared")'


def dp4a(a: str, b: str, total: str) -> str:
    """``total + sum of four products`` of signed bytes."""
    return f'T.call_pure_extern("int32", "__dp4a", {a}, {b}, {total})'


def from_lane(dtype: str, value: str, distance: int) -> str:
    """The value of the lane whose number differs by ``distance`` (a power of two) in one bit."""
    return f'T.call_extern("{dtype}", "__shfl_xor_sync", {_ALL}, {value}, {distance})'


def across_warp(cell: str, dtype: str, combine: str) -> list[str]:
    """Combine a mutable scalar over the lanes of a warp, in a fixed order; every lane has the result.

    Args:
        cell: the scalar's name.
        dtype: its type.
        combine: of ``{a}`` and ``{b}``, e.g. ``"{a} + {b}"``.
    """
    lines = []
    for distance in (16, 8, 4, 2, 1):
        other = f"{cell}_{distance}"
        lines.append(f"{other} = {from_lane(dtype, cell, distance)}")
        lines.append(f"{cell} = {combine.format(a=cell, b=other)}")
    return lines


def grid_text(
    buffers: Sequence[tuple[str, str, str]],
    body: Sequence[str],
    *,
    blocks: str,
    threads: int,
    parts: int = 1,
) -> str:
    """A kernel whose ``body`` is what one thread does.

    Args:
        buffers: (name, shape, dtype), as :func:`~..emit.kernel_text` takes them.
        body: statements that use block ``bx``, thread ``tx`` and, with several parts, ``by``.
        blocks: how many blocks there are along x, in terms of the buffers' sizes.
        threads: per block.
        parts: blocks along y.
    """
    lines = loop(f'tx in T.thread_binding({threads}, thread="threadIdx.x")', body)
    if parts > 1:
        lines = loop(f'by in T.thread_binding({parts}, thread="blockIdx.y")', lines)
    return kernel_text(buffers, loop(f'bx in T.thread_binding({blocks}, thread="blockIdx.x")', lines))


def branch(condition: str, lines: Sequence[str]) -> list[str]:
    """An ``if`` statement with its body indented."""
    return [f"if {condition}:", *("    " + line for line in lines)]


def chosen(variable: str, cases: Sequence[Sequence[str]]) -> list[str]:
    """Case k where ``variable == k``; without a test where there is one case."""
    if len(cases) == 1:
        return list(cases[0])
    lines: list[str] = []
    for k, case in enumerate(cases):
        lines += branch(f"{variable} == {k}", case)
    return lines


def by_rows(buffers: Sequence[tuple[str, str, str]], body: Sequence[str]) -> str:
    """A kernel with one thread for each of ``n`` rows, ``i``."""
    lines = [f"i: T.let = bx * {THREADS} + tx", *branch("i < n", body)]
    return grid_text(buffers, lines, blocks=f"(n + {THREADS - 1}) // {THREADS}", threads=THREADS)


def by_channels(buffers: Sequence[tuple[str, str, str]], ranges: Sequence[tuple[int, Sequence[str]]]) -> str:
    """A kernel with one thread for each channel of each of ``n`` rows.

    Args:
        buffers: as :func:`grid_text` takes them.
        ranges: how many channels, and what is done for channel ``t`` of them in row ``i``.
    """
    total = sum(count for count, _ in ranges)
    lines = [f"i: T.let = item // {total}", f"unit: T.let = item % {total}"]
    start = 0
    for count, body in ranges:
        own = [f"t: T.let = unit - {start}", *body]
        own = branch(f"unit < {start + count}", own) if start + count < total else own
        lines += branch(f"unit >= {start}", own) if start else own
        start += count
    lines = [f"item: T.let = bx * {THREADS} + tx", *branch(f"item < n * {total}", lines)]
    blocks = f"(n * {total} + {THREADS - 1}) // {THREADS}"
    return grid_text(buffers, lines, blocks=blocks, threads=THREADS)
