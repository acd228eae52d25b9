"""One GPU kernel for a group of row operators, from the CPU kernels' plan (:mod:`..rows_plan`).

A group in which every value has few elements is a straight line of expressions with a thread for each
row. Any other has a warp for each row: values of few elements are computed by all lanes alike, a
loop along the row is shared by the lanes, and what later stages read lies in the row's part of shared
memory. Sums over an axis are added lane by lane and then across the warp, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....passes.graph_tools import LINEARS
from ....passes.row_groups import FusedRows
from ..emit import kernel_text, literal, loop
from ..launch import most_rows
from ..rows_kernel import DTYPES, in_stretches
from ..rows_operators import components, emit_operator
from ..rows_plan import Argument, Plan, Stage, Step, UnsupportedRowsError, cat_axis, kept_values, make_plan
from ..rows_values import Base, View, contiguous_strides
from .device import Gpu, blocks, empty, on_device
from .emit import SYNC, THREADS, WARP, ThreadEmitter, across_warp, branch, shared

_WARP_ROWS = 4  # rows of a block whose rows are shared by warps
_SHARED_FLOATS = 10240  # of a block: 40 KiB


def lower_rows(fused: FusedRows, gpu: Gpu) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[()]]:
    """The compiled group: its arguments in order -> its results; and no linears, which stay outside.

    Args:
        fused: the group.
        gpu: what to compile for.

    Raises:
        UnsupportedRowsError: for what no kernel is generated for.
        LoweringError: if TVM or nvcc rejects the kernel.
    """
    if any(node.target in LINEARS for node in fused.graph.nodes):
        raise UnsupportedRowsError("linears join groups on CPUs only")
    plan = make_plan(fused, gpu.target)
    given = [n for n in fused.graph.nodes if n.op == "placeholder"]
    used = [k for k, node in enumerate(given) if node in fused.shapes]
    arguments = [a for a in plan.arguments if a.name not in plan.constants]
    by_row = [p for p, a in enumerate(arguments) if a.kind in ("rows", "index")]
    if not by_row:
        raise UnsupportedRowsError("nothing says how many rows there are")
    text, per_block = rows_text(plan)
    kernel, lead = gpu.kernel(text), by_row[0]
    constants = {name: value.contiguous() for name, value in plan.constants.items()}
    results = [(row, dtype) for _, row, dtype in plan.outputs]
    widest = max(math.prod(row) for row in (*(a.row for a in arguments), *(r for r, _ in results)))
    limit = most_rows(widest)

    def run(*values: Any) -> tuple[Tensor, ...]:
        tensors = [values[k] for k in used]
        n = tensors[lead].shape[0]
        if n > limit:  # a kernel's indices are 32-bit
            return in_stretches(run, values, [used[p] for p in by_row], n, limit)
        found = [empty(tensors[lead], n, *row, dtype=dtype) for row, dtype in results]
        named = {a.name: _plain(t) for a, t in zip(arguments, tensors, strict=True)}
        named |= {f"o{k}": _plain(t) for k, t in enumerate(found)}
        kernel((blocks(n, per_block), 1), {**named, **on_device(constants, tensors[lead]), "n": n})
        return tuple(found)

    return run, ()


def _plain(value: Tensor) -> Tensor:
    return value.view(torch.int8) if value.dtype is torch.bool else value


def rows_text(plan: Plan) -> tuple[str, int]:
    """TVMScript of ``main(*arguments, *constants, *results)``, and how many rows a block has.

    Raises:
        UnsupportedRowsError: for an operator without a kernel, or rows too long for shared memory.
    """
    return _Writer(plan).text()


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.warps = any(not stage.across for stage in plan.stages)
        self.out: dict[Base, list[str]] = {}
        for k, (base, _, _) in enumerate(plan.outputs):
            self.out.setdefault(base, []).append(f"o{k}")
        self.dtypes = {a.name: a.dtype for a in plan.arguments}
        self.dtypes |= {f"o{k}": dtype for k, (_, _, dtype) in enumerate(plan.outputs)}
        self.kept = kept_values(plan) if self.warps else set()
        self.arrays: dict[Base, str] = {}

    def text(self) -> tuple[str, int]:
        body: list[str] = []
        for k, stage in enumerate(self.plan.stages):
            body += self._straight(stage, k) if stage.across else self._looped(stage, k)
            if self.warps:
                body.append(SYNC)
        if not self.warps:
            lines = [f"i: T.let = bx * {THREADS} + tx", *branch("i < n", body)]
            return self._kernel(lines, THREADS, THREADS), THREADS
        used = sum(base.size for base in self.arrays)
        rows = _WARP_ROWS
        while rows and rows * used > _SHARED_FLOATS:
            rows //= 2
        if not rows:
            raise UnsupportedRowsError(f"{used} floats of a row do not fit into shared memory")
        lines = [
            *(shared(name, rows * base.size) for base, name in self.arrays.items()),
            f"lane: T.let = tx % {WARP}",
            f"own: T.let = tx // {WARP}",
            f"real: T.let = bx * {rows} + own",
            "i: T.let = T.min(real, n - 1)",  # beyond the last row it is computed again
            *body,
        ]
        return self._kernel(lines, rows, rows * WARP), rows

    def _kernel(self, lines: list[str], rows: int, threads: int) -> str:
        inner = loop(f'tx in T.thread_binding({threads}, thread="threadIdx.x")', lines)
        grid = loop(f'bx in T.thread_binding((n + {rows - 1}) // {rows}, thread="blockIdx.x")', inner)
        return kernel_text(self._buffers(), grid)

    # --- buffers --------------------------------------------------------------------------------

    def _buffers(self) -> list[tuple[str, str, str]]:
        """The kernel's parameters: rows of elements, whatever axes a row has."""
        constants = {name: tuple(value.shape) for name, value in self.plan.constants.items()}
        found = []
        results = [
            Argument(f"o{k}", "rows", row, dtype) for k, (_, row, dtype) in enumerate(self.plan.outputs)
        ]
        for a in (*self.plan.arguments, *results):
            size = math.prod(a.row)
            rows = "n" if a.kind in ("rows", "index") else f"m_{a.name}"
            if a.name in constants and a.kind == "table":
                rows = str(constants[a.name][0])
            shape = {"fixed": str(size), "index": rows}.get(a.kind, f"{rows}, {size}")
            found.append((a.name, shape, DTYPES[a.dtype]))
        return found

    def _place(self, base: Base, element: str) -> str:
        """Where lanes find an element of a kept value.

        Every value has an array of its own: TVM puts barriers between accesses to one array that it cannot
        tell apart, also where only some lanes would meet them.
        """
        name = self.arrays.setdefault(base, f"kept{len(self.arrays)}")
        return f"{name}[own * {base.size} + {element}]"

    def _read(self, base: Base, element: str) -> str:
        """An element of a row, as a float; ``element`` is its place in the base."""
        if base.kind == "number":
            return literal(base.number)
        if base.kind == "value":
            return self._place(base, element)
        if base.kind == "fixed":
            return self._float(base.name, f"{base.name}[{element}]")
        row = "i" if base.kind == "rows" else f'T.Cast("int32", {base.index}[i])'
        return self._float(base.name, f"{base.name}[{row}, {element}]")

    def _float(self, name: str, text: str) -> str:
        return f'T.Cast("float32", {text})' if self.dtypes.get(name) is torch.bool else text

    def _write(self, base: Base, element: str, value: str) -> list[str]:
        """Store an element of a value where it is read: in shared memory, and in results."""
        lines = []
        if base in self.kept:
            lines.append(f"{self._place(base, element)} = {value}")
        for name in self.out.get(base, ()):
            kind = self.dtypes[name] is torch.bool
            stored = f'T.Cast("int8", {value})' if kind else value
            store = [f"{name}[i, {element}] = {stored}"]
            lines += branch("real < n", store) if self.warps else store
        return lines

    # --- values of few elements -----------------------------------------------------------------

    def _straight(self, stage: Stage, k: int) -> list[str]:
        e = ThreadEmitter(f"s{k}_")
        values: dict[Base, list[str]] = {}
        known: dict[tuple[Base, int], str] = {}

        def element(view: View, place: Sequence[int]) -> str:
            base, at = view.base, view.flat(place)
            if base.kind == "number":
                return e.number(base.number)
            if base in values:
                return values[base][at]
            if (base, at) not in known:
                known[base, at] = e.let(self._read(base, str(at)))
            return known[base, at]

        for step in stage.steps:
            values[step.result] = components(step, element, e)
        stores = []
        for base, names in values.items():
            for j, name in enumerate(names):
                stores += self._write(base, str(j), name)
        return [*e.lines, *(branch("lane == 0", stores) if self.warps and stores else stores)]

    # --- along rows -----------------------------------------------------------------------------

    def _looped(self, stage: Stage, k: int) -> list[str]:
        """A stage of one shape: its last axis over the lanes, the others one after another."""
        if stage.steps[0].op == "cat":
            return self._concatenated(stage.steps[0])
        shape, e = stage.shape, ThreadEmitter(f"s{k}_")
        values: dict[Base, str] = {}
        known: dict[str, str] = {}
        before: list[str] = []
        after: list[str] = []

        def operand(view: View, step_shape: tuple[int, ...]) -> str:
            if view.base in values:
                return values[view.base]
            text = self._load(view, step_shape)
            if text not in known:
                known[text] = e.let(text)
            return known[text]

        for number, step in enumerate(stage.steps):
            if step.reduces:
                self._reduced(step, f"sum{k}_{number}", operand, e, before, after)
                continue
            if step.op == "product":
                value = self._widened(step, e)
            else:
                inputs = [operand(v, step.shape) for v in step.operands]
                value = inputs[0] if step.op == "copy" else emit_operator(e, step.node, inputs)
            values[step.result] = value
            e.lines += self._write(step.result, _offset(0, contiguous_strides(step.shape), step.shape), value)
        count = shape[-1]
        inside = e.lines if count % WARP == 0 else branch(f"z * {WARP} + lane < {count}", e.lines)
        turns = loop(f"z in T.serial({-(-count // WARP)})", inside)
        lines = [*before, *turns, *after]
        for axis in range(len(shape) - 2, -1, -1):
            lines = loop(f"d{axis} in T.serial({shape[axis]})", lines)
        return lines

    def _load(self, view: View, step_shape: tuple[int, ...]) -> str:
        return self._read(view.base, _offset(view.offset, view.strides, step_shape))

    def _widened(self, step: Step, e: ThreadEmitter) -> str:
        """A product of a narrow row with a constant matrix of wide rows."""
        left, right = step.operands
        total = ""
        for j in range(right.shape[0]):
            matrix = View(right.base, right.shape[1:], right.strides[1:], right.offset + j * right.strides[0])
            row = View(left.base, right.shape[1:], (0,), left.flat((j,)))
            term = " * ".join(self._load(view, right.shape[1:]) for view in (row, matrix))
            total = e.let(f"{total} + {term}" if total else term)
        return total

    def _reduced(
        self,
        step: Step,
        name: str,
        operand: Callable[[View, tuple[int, ...]], str],
        e: ThreadEmitter,
        before: list[str],
        after: list[str],
    ) -> None:
        """A sum over the loop's last axis, or a product with narrow columns."""
        x = operand(step.operands[0], step.shape)
        factors = [""]
        if step.op == "product":
            right = step.operands[1]
            views = (
                View(right.base, right.shape[:1], right.strides[:1], right.offset + c * right.strides[1])
                for c in range(right.shape[1])
            )
            factors = [f" * {self._load(view, step.shape)}" for view in views]
        outer = tuple(n for n in step.shape if n != 1)[:-1]
        flat = " + ".join(f"d{k} * {s}" for k, s in enumerate(contiguous_strides(outer))) or "0"
        for c, factor in enumerate(factors):
            cell = f"{name}_{c}"
            before.append(f"{cell} = {literal(0.0)}")
            e.lines.append(f"{cell} = {cell} + {x}{factor}")
            after += across_warp(cell, "float32", "{a} + {b}")
            after += branch("lane == 0", self._write(step.result, f"{flat} + {c}", cell))

    def _concatenated(self, step: Step) -> list[str]:
        """Copies of the parts, one after another."""
        lines: list[str] = []
        axis = cat_axis(step)
        strides = contiguous_strides(step.shape)
        for k, view in enumerate(step.operands):
            start = sum(v.shape[axis] for v in step.operands[:k])
            read = self._load(view, view.shape)
            target = _offset(start * strides[axis], strides, view.shape)
            shape = [n for n in view.shape if n != 1] or [1]
            inner = self._write(step.result, target, read)
            inner = branch(f"z * {WARP} + lane < {shape[-1]}", inner) if shape[-1] % WARP else inner
            inner = loop(f"z in T.serial({-(-shape[-1] // WARP)})", inner)
            for d in range(len(shape) - 2, -1, -1):
                inner = loop(f"d{d} in T.serial({shape[d]})", inner)
            lines += inner
        return lines


def _offset(start: int, strides: Sequence[int], shape: Sequence[int]) -> str:
    """An element's place: axes of the loop are d0, d1, ..., and the last is shared by lanes."""
    real = [s for s, n in zip(strides, shape, strict=True) if n != 1]
    terms = [str(start)] + [f"d{k} * {s}" for k, s in enumerate(real[:-1]) if s]
    if real and real[-1]:
        terms.append(f"(z * {WARP} + lane) * {real[-1]}")
    return " + ".join(terms)
