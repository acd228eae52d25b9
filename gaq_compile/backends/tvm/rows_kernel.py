"""One kernel for a group of row operators (:mod:`gaq_compile.passes.fuse_rows`).

Tiles of rows run in parallel. In a tile, stage after stage: values of few elements per row as vectors
across its rows, in a straight line; others in loops along each row (:mod:`.rows_plan`). What later
stages read stays in a scratch of the thread. Sums have a fixed order, so that every run gives the same
bits. A group that adds rows up by index (:class:`.rows_plan.Owner`) goes through its rows in the order
of what they are added to: each thread owns some of the results, and begins them as zeros. TVM simplifies
as if numbers were finite: x - x and x * 0 are 0 for infinities and NaN, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...passes.row_groups import FusedRows
from .build import compile_kernel
from .dense_frame import Frame, declared, tile_buffers
from .dense_kernel import arguments, task_lines
from .emit import block_lanes, kernel_text, literal, loop, many, splat
from .launch import Input, Launch, Output, always, most_rows, refuse
from .linear import LinearKernel
from .row_kernel import LANES, UNTUNED, Emitter, row_loop
from .rows_operators import components, emit_operator
from .rows_plan import (
    Argument,
    Owner,
    Plan,
    Stage,
    Step,
    UnsupportedRowsError,
    cat_axis,
    kept_values,
    make_plan,
)
from .rows_values import TILE, Base, View, contiguous_strides

_OWNED = 4  # results that a thread adds up together
_PRODUCTS_PER_FLOAT = 64  # multiplications of a linear that take as long as a float read and written
DTYPES = {
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float32: "float32",
    torch.bool: "int8",
    torch.int64: "int64",
    torch.int32: "int32",
}


def lower_rows(fused: FusedRows, target: str) -> tuple[Launch, tuple[LinearKernel, ...]]:
    """The compiled group: its arguments in order -> its results; and the linears in it.

    Args:
        fused: the group.
        target: a TVM target in JSON.

    Raises:
        UnsupportedRowsError: for what no kernel is generated for.
        LoweringError: if TVM rejects the kernel.
    """
    plan = make_plan(fused, target)
    given = [n for n in fused.graph.nodes if n.op == "placeholder"]
    used = [k for k, node in enumerate(given) if node in fused.shapes]
    by_row = [p for p, a in enumerate(plan.arguments) if a.kind in ("rows", "index")]
    if not by_row:
        raise UnsupportedRowsError("nothing says how many rows there are")
    outside = [a for a in plan.arguments if a.name not in plan.constants]
    tensors = [
        Input(k, a.row, a.dtype, has_rows=a.kind != "fixed") for k, a in zip(used, outside, strict=True)
    ]
    constants = [value.contiguous() for value in plan.constants.values()]
    constants += [packed for linear in plan.linears.values() for packed in linear.constants]
    lead = used[by_row[0]]
    made = [Output(plan.owner.rows if plan.owner else lead, row, dtype) for _, row, dtype in plan.outputs]
    widest = max(math.prod(row) for row in (*(i.row for i in tensors), *(o.row for o in made)))

    def longer(*arguments: Any) -> tuple[Tensor, ...]:
        rows, limit = arguments[lead].shape[0], most_rows(widest)
        if plan.owner is not None:
            return tuple(fused(*arguments))
        if rows <= limit:  # it is a table that is too long
            return refuse(*arguments)
        return in_stretches(run, arguments, [used[p] for p in by_row], rows, limit)

    chosen = always(compile_kernel(rows_source(plan), target))
    run = Launch((*tensors, *constants, *made), chosen, counted=lead, several=True, longer=longer)
    return run, tuple(plan.linears.values())


def in_stretches(
    run: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Any], by_row: list[int], rows: int, limit: int
) -> tuple[Tensor, ...]:
    """The results of a call with more rows than a kernel can count, joined."""
    parts = []
    for start in range(0, rows, limit):
        some = list(arguments)
        for k in by_row:
            some[k] = some[k][start : start + limit]
        parts.append(run(*some))
    return tuple(torch.cat(results) for results in zip(*parts, strict=True))


def rows_source(plan: Plan) -> str:
    """TVMScript of ``main(*arguments, *constants, *constants of linears, *results)``.

    Raises:
        UnsupportedRowsError: for an operator without a kernel.
    """
    return _Writer(plan).source()


class _Writer:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.out = {base: f"o{k}" for k, (base, _, _) in enumerate(plan.outputs)}
        self.dtypes = {a.name: a.dtype for a in plan.arguments}
        self.dtypes |= {f"o{k}": dtype for k, (_, _, dtype) in enumerate(plan.outputs)}
        self.kept = kept_values(plan)
        self.last = _last_stages(plan)
        self.slots: dict[object, int] = {}
        self.spare: dict[int, list[int]] = {}  # places whose values nobody reads any more, by size
        self.scratch = 0
        self.tiles: dict[str, tuple[int, str]] = {}  # of linears, one after another
        self.work = 0
        self.passing = 0  # places of values within one operator, used again by the next

    def source(self) -> str:
        body: list[str] = []
        for k, stage in enumerate(self.plan.stages):
            body += self._straight(stage, k) if stage.across else self._looped(stage, k)
            self._give_back(k)
        body += self._repeated()
        buffers, flat = self._buffers()
        scratch = f'scratch = T.alloc_buffer(({max(1, self.scratch)},), "float32", scope="global")'
        work, setup = max(1, self.work // TILE), [scratch, *declared(self.tiles)]
        if self.plan.owner is not None:
            rows = self._owned(self.plan.owner, body, work, setup)
        else:
            tile = ["first: T.let = i", f"rows: T.let = T.min({TILE}, n - first)", *body]
            rows = row_loop(tile, work, step=TILE, setup=setup, once=bool(self.plan.linears))
        return kernel_text(buffers, [*flat, *rows])

    def _owned(self, owner: Owner, body: list[str], work: int, setup: list[str]) -> list[str]:
        """``body`` for the rows of a few results at a time, which begin as zeros."""
        zeros: list[str] = []
        for base, name in self.out.items():
            lanes = block_lanes(base.size, LANES)
            place = f"o * {base.size} + t * {lanes}"
            place = place if lanes == 1 else f"T.ramp({place}, 1, {lanes})"
            zero = f"{name}f[{place}] = {splat(literal(0.0), lanes)}"
            zeros += loop(f"t in T.serial({base.size // lanes})", [zero])
        first = f"first: T.let = {owner.starts}[low] + k * {TILE}"
        tile = [first, f"rows: T.let = T.min({TILE}, end - first)"]
        some = [
            *loop("o in T.serial(low, high)", zeros),
            f"end: T.let = {owner.starts}[high]",
            *loop(f"k in T.serial((end - {owner.starts}[low] + {TILE - 1}) // {TILE})", [*tile, *body]),
        ]
        results = "m_o0"
        alone = ["low: T.let = 0", f"high: T.let = {results}", *some]
        each = [
            f"low: T.let = b * {_OWNED}",
            f"high: T.let = T.min(low + {_OWNED}, {results})",
            *setup,
            *some,
        ]
        return [
            f"if n * {work} <= {UNTUNED.serial_work}:",
            *("    " + line for line in loop("b in T.serial(1)", [*setup, *alone])),
            "else:",
            *(
                "    " + line
                for line in loop(f"b in T.parallel(({results} + {_OWNED - 1}) // {_OWNED})", each)
            ),
        ]

    # --- buffers --------------------------------------------------------------------------------

    def _buffers(self) -> tuple[list[tuple[str, str, str]], list[str]]:
        """The kernel's parameters, and flat aliases of those with more than one axis."""
        buffers: list[tuple[str, str, str]] = []
        flat: list[str] = []
        constants = {name: tuple(value.shape) for name, value in self.plan.constants.items()}
        arguments = [a for a in self.plan.arguments if a.name not in constants]
        kind = "rows" if self.plan.owner is None else "owned"
        results = [Argument(f"o{k}", kind, row, dtype) for k, (_, row, dtype) in enumerate(self.plan.outputs)]
        late = [a for a in self.plan.arguments if a.name in constants]
        given = (*arguments, *sorted(late, key=lambda a: list(constants).index(a.name)))
        for a in (*given, *self._linear_constants(), *results):
            first = (
                []
                if a.kind in ("fixed", "packed")
                else ["n" if a.kind in ("rows", "index") else f"m_{a.name}"]
            )
            row = a.row
            if a.name in constants:
                first, row = [], constants[a.name]
            sizes = [*first, *(str(size) for size in row)]
            dtype = DTYPES[a.dtype]
            buffers.append((a.name, ", ".join(sizes), dtype))
            if a.kind not in ("index", "packed", "starts"):
                total = " * ".join(sizes) or "1"
                flat.append(f'{a.name}f = T.decl_buffer(({total},), "{dtype}", data={a.name}.data, align=4)')
        return buffers, flat

    def _linear_constants(self) -> list[Argument]:
        found = []
        for k, linear in enumerate(self.plan.linears.values()):
            names = [name for name in arguments(linear.plan) if name not in ("x", "y")]
            found += [
                Argument(f"l{k}_{name}", "packed", tuple(packed.shape), packed.dtype)
                for name, packed in zip(names, linear.constants, strict=True)
            ]
        return found

    def _slot(self, key: object, size: int) -> int:
        if key not in self.slots:
            spare = self.spare.get(size)
            if not spare:
                spare = [self.scratch]
                self.scratch += size * TILE
            self.slots[key] = spare.pop()
        return self.slots[key]

    def _give_back(self, stage: int) -> None:
        """The places of values that no later stage reads are free."""
        for base, last in self.last.items():
            if last == stage and base in self.slots:
                self.spare.setdefault(base.size, []).append(self.slots.pop(base))

    def _place(self, base: Base, element: str, row: str = "r") -> tuple[str, str]:
        """Buffer and index of an element along a row of the tile."""
        if base.kind == "value" and base.across:
            return "scratch", f"{self._slot(base, base.size)} + ({element}) * {TILE} + {row}"
        if base.kind == "value" and base not in self.out:
            slot = self._slot(base, base.size)
            return "scratch", f"{slot} + {row} * {base.size} + {element}"
        if base.kind == "value":
            return self._place_in_result(base, element, row)
        if base.kind == "fixed":
            return f"{base.name}f", element
        start = self._row(row) if base.kind == "rows" else self._picked(base.index, row)
        return f"{base.name}f", f"{start} * {base.size} + {element}"

    def _place_in_result(self, base: Base, element: str, row: str = "r") -> tuple[str, str]:
        owner = self.plan.owner
        start = self._row(row) if owner is None else self._picked(owner.index, row)
        return f"{self.out[base]}f", f"{start} * {base.size} + {element}"

    def _row(self, row: str) -> str:
        """Which of the group's rows is row ``row`` of the tile."""
        return f"(first + {row})" if self.plan.owner is None else f"{self.plan.owner.order}[first + {row}]"

    def _picked(self, index: str, row: str) -> str:
        return f'T.Cast("int32", {index}[{self._row(row)}])'

    def _float(self, buffer: str, text: str, lanes: int) -> str:
        kind = many("float32", lanes)
        flag = self.dtypes.get(buffer.removesuffix("f")) is torch.bool
        return f'T.Cast("{kind}", {text})' if flag else text

    def _stored(self, buffer: str, text: str, lanes: int) -> str:
        kind = many("int8", lanes)
        flag = self.dtypes.get(buffer.removesuffix("f")) is torch.bool
        return f'T.Cast("{kind}", {text})' if flag else text

    # --- across rows ----------------------------------------------------------------------------

    def _straight(self, stage: Stage, k: int) -> list[str]:
        e = self._emitter(TILE, k)
        values: dict[Base, list[str]] = {}
        loads: list[str] = []
        known: dict[object, str] = {}

        def element(view: View, place: Sequence[int]) -> str:
            base, at = view.base, view.flat(place)
            if base.kind == "number":
                return e.number(base.number)
            if base in values:
                return values[base][at]
            if (base, at) not in known:
                known[base, at] = e.let(self._across_load(base, at, loads))
            return known[base, at]

        for step in stage.steps:
            self.passing = 0
            found = components(step, element, e)
            values[step.result] = self._held(found, step.result, e)
            self.work += 2 * TILE * step.result.size
        copies = []
        for base in (base for base in values if base in self.out):
            slot = self._slot(base, base.size)
            for j in range(base.size):
                buffer, index = self._place_in_result(base, str(j))
                value, place = (
                    self._stored(buffer, f"scratch[{slot + j * TILE} + r]", 1),
                    f"{buffer}[{index}]",
                )
                copies.append(
                    f"{place} = {value}" if self.plan.owner is None else f"{place} = {place} + {value}"
                )
                self.work += TILE
        loading = loop("r in T.serial(rows)", loads) if loads else []
        return [*loading, *e.lines, *(loop("r in T.serial(rows)", copies) if copies else [])]

    def _emitter(self, lanes: int, stage: int) -> Emitter:
        def memory() -> str:
            self.passing += 1
            return _vector(self._slot(("passing", self.passing), 1), lanes)

        return Emitter(lanes, f"s{stage}_", memory)

    def _held(self, names: list[str], result: Base, e: Emitter) -> list[str]:
        """A value in memory (why: :class:`.row_kernel.Emitter`), where later stages find it too."""
        slot = self._slot(result, result.size)
        places = [_vector(slot + j * TILE, TILE) for j in range(result.size)]
        e.lines += [f"{place} = {name}" for place, name in zip(places, names, strict=True)]
        return places

    def _across_load(self, base: Base, at: int, loads: list[str]) -> str:
        """One element of every row of the tile; fetched from along the rows if it lies there."""
        if base.kind == "fixed":
            return splat(self._float(f"{base.name}f", f"{base.name}f[{at}]", 1), TILE)
        if base.kind == "value" and base.across:
            return _vector(self._slot(base, base.size) + at * TILE, TILE)
        fetched = (base, at, "across") in self.slots
        slot = self._slot((base, at, "across"), 1)
        if not fetched:
            buffer, index = self._place(base, str(at))
            loads.append(f"scratch[{slot} + r] = {self._float(buffer, f'{buffer}[{index}]', 1)}")
            self.work += TILE
        return _vector(slot, TILE)

    # --- along rows -----------------------------------------------------------------------------

    def _looped(self, stage: Stage, k: int) -> list[str]:
        if stage.steps[0].op == "linear":
            return self._multiplied(stage.steps[0])
        if stage.steps[0].op == "cat":
            return self._concatenated(stage.steps[0])
        shape = stage.shape
        lanes = block_lanes(shape[-1], LANES)
        e = self._emitter(lanes, k)
        values: dict[Base, str] = {}
        known: dict[str, str] = {}
        before: list[str] = []
        after: list[str] = []

        def operand(view: View, step_shape: tuple[int, ...]) -> str:
            if view.base in values:
                return values[view.base]
            text = self._along_load(view, step_shape, lanes)
            if text not in known:
                known[text] = e.let(text)
                self.work += TILE * math.prod(shape)
            return known[text]

        for step in stage.steps:
            if step.reduces:
                self._reduced(step, operand, e, before, after, lanes)
                continue
            if step.op == "product":
                value = self._widened(step, e, lanes)
            else:
                inputs = [operand(v, step.shape) for v in step.operands]
                self.passing = 0
                value = inputs[0] if step.op in ("copy", "add") else emit_operator(e, step.node, inputs)
                if step.op != "add":
                    place = _vector(self._slot((step, "held"), 1), lanes)
                    e.lines.append(f"{place} = {value}")
                    value = place
            values[step.result] = value
            self.work += 2 * TILE * math.prod(shape)
            if step.result in self.kept or step.result in self.out:
                self._store_along(step, value, e, lanes)
        lines = [*before, *loop(f"t in T.serial({shape[-1] // lanes})", e.lines), *after]
        for axis in range(len(shape) - 2, -1, -1):
            lines = loop(f"d{axis} in T.serial({shape[axis]})", lines)
        return loop("r in T.serial(rows)", lines)

    def _store_along(self, step: Step, value: str, e: Emitter, lanes: int) -> None:
        strides = contiguous_strides(step.shape)
        if step.result.across:  # a narrow value can be copied from here; it stays across
            raise UnsupportedRowsError(f"{step.node}: a narrow value in a loop along rows")
        buffer, index = self._place(step.result, _offset(0, strides, step.shape, lanes))
        place = f"{buffer}[{index}]" if lanes == 1 else f"{buffer}[T.ramp({index}, 1, {lanes})]"
        before = f"{place} + " if step.op == "add" else ""
        e.lines.append(f"{place} = {before}{self._stored(buffer, value, lanes)}")

    def _along_load(self, view: View, step_shape: tuple[int, ...], lanes: int) -> str:
        base = view.base
        if base.kind == "number":
            return splat(literal(base.number), lanes)
        last = _last_stride(view.strides, step_shape)
        offset = _offset(view.offset, view.strides, step_shape, lanes)
        if base.kind == "value" and base.across:
            buffer, index, last = (
                "scratch",
                f"{self._slot(base, base.size)} + ({offset}) * {TILE} + r",
                last * TILE,
            )
        else:
            buffer, index = self._place(base, offset)
        if lanes == 1 or last == 0:
            return splat(self._float(buffer, f"{buffer}[{index}]", 1), lanes)
        return self._float(buffer, f"{buffer}[T.ramp({index}, {last}, {lanes})]", lanes)

    def _widened(self, step: Step, e: Emitter, lanes: int) -> str:
        """A product of a narrow row with a constant matrix of wide rows."""
        left, right = step.operands
        total = ""
        for j in range(right.shape[0]):
            matrix = View(right.base, right.shape[1:], right.strides[1:], right.offset + j * right.strides[0])
            row = View(left.base, right.shape[1:], (0,), left.flat((j,)))
            factors = (self._along_load(view, right.shape[1:], lanes) for view in (row, matrix))
            term = " * ".join(factors)
            total = e.let(f"{total} + {term}" if total else term)
        return total

    def _reduced(
        self,
        step: Step,
        operand: Callable[[View, tuple[int, ...]], str],
        e: Emitter,
        before: list[str],
        after: list[str],
        lanes: int,
    ) -> None:
        """A sum over the loop's last axis, or a product with narrow columns: lanes are added at the end."""
        self.work += 2 * TILE * math.prod(step.shape)
        x = operand(step.operands[0], step.shape)
        columns = 1
        factors = [""]
        if step.op == "product":
            right = step.operands[1]
            columns = right.shape[1]
            views = [
                View(right.base, right.shape[:1], right.strides[:1], right.offset + c * right.strides[1])
                for c in range(columns)
            ]
            factors = [f" * {self._along_load(v, step.shape, lanes)}" for v in views]
        start = self._slot((step, "sums"), -(-columns * lanes // TILE))
        outer = tuple(n for n in step.shape if n != 1)[:-1]
        for c, factor in enumerate(factors):
            first = start + c * lanes
            total = _vector(first, lanes)
            before.append(f"{total} = {splat(literal(0.0), lanes)}")
            e.lines.append(f"{total} = {total} + {x}{factor}")
            half = lanes // 2
            while half > 1:
                low, high = _vector(first, half), _vector(first + half, half)
                after.append(f"{low} = {low} + {high}")
                half //= 2
            total = " + ".join(_vector(first + k, 1) for k in range(min(2, lanes)))
            flat = " + ".join(f"d{k} * {s}" for k, s in enumerate(contiguous_strides(outer))) or "0"
            after.append(self._store_reduced(step.result, f"{flat} + {c}" if columns > 1 else flat, total))

    def _store_reduced(self, base: Base, element: str, total: str) -> str:
        if base.across:
            return f"scratch[{self._slot(base, base.size)} + ({element}) * {TILE} + r] = {total}"
        buffer, index = self._place(base, element)
        return f"{buffer}[{index}] = {total}"

    def _multiplied(self, step: Step) -> list[str]:
        """A linear: the tile is its task (:mod:`.dense_kernel`)."""
        linear, (view,) = self.plan.linears[step.result], step.operands

        def place(base: Base, row: str, column: str, lanes: int) -> str:
            buffer, index = self._place(base, column, row)
            stride = TILE if base.kind == "value" and base.across else 1
            return f"{buffer}[{index}]" if lanes == 1 else f"{buffer}[T.ramp({index}, {stride}, {lanes})]"

        ours = view.base.kind == "value" and (view.base.across or view.base not in self.out)
        frame = Frame(
            x=lambda row, column, lanes: place(view.base, row, f"{view.offset} + {column}", lanes),
            y=lambda row, column, lanes: place(step.result, row, column, lanes),
            last=str(TILE - 1) if ours else "n - 1 - first",
            prefix=f"l{list(self.plan.linears).index(step.result)}_",
            task_rows=TILE,
            asks=step.result in self.out and not step.result.across and self.plan.owner is None,
        )
        for name, (size, dtype) in tile_buffers(linear.plan, TILE).items():
            self.tiles[name] = (max(size, self.tiles.get(name, (0, dtype))[0]), dtype)
        moved = TILE * (view.size + step.result.size)
        self.work += moved + TILE * linear.plan.work_per_row // _PRODUCTS_PER_FLOAT
        return task_lines(linear.plan, frame)

    def _concatenated(self, step: Step) -> list[str]:
        """Copies of the parts, one after another."""
        lines: list[str] = []
        axis = cat_axis(step)
        for k, view in enumerate(step.operands):
            start = sum(v.shape[axis] for v in step.operands[:k])
            strides = contiguous_strides(step.shape)
            source = _offset(view.offset, view.strides, view.shape, 1)
            target = _offset(start * strides[axis], strides, view.shape, 1)
            if view.base.kind == "value" and view.base.across:
                read = f"scratch[{self._slot(view.base, view.base.size)} + ({source}) * {TILE} + r]"
            elif view.base.kind == "number":
                read = literal(view.base.number)
            else:
                buffer, index = self._place(view.base, source)
                read = self._float(buffer, f"{buffer}[{index}]", 1)
            buffer, index = self._place(step.result, target)
            inner = [f"{buffer}[{index}] = {self._stored(buffer, read, 1)}"]
            shape = [n for n in view.shape if n != 1] or [1]
            inner = loop(f"t in T.serial({shape[-1]})", inner)
            for d in range(len(shape) - 2, -1, -1):
                inner = loop(f"d{d} in T.serial({shape[d]})", inner)
            lines += inner
            self.work += 2 * TILE * view.size
        return loop("r in T.serial(rows)", lines)

    def _repeated(self) -> list[str]:
        """Results that are the same value twice, and narrow ones that a loop along rows has made."""
        lines: list[str] = []
        straight = {s.result for stage in self.plan.stages if stage.across for s in stage.steps}
        for k, (base, _, _) in enumerate(self.plan.outputs):
            name = f"o{k}"
            if name == self.out[base] and (base in straight or not base.across):
                continue
            for j in range(base.size if base.across else 1):
                if base.across:
                    read, write = (
                        f"scratch[{self._slot(base, base.size) + j * TILE} + r]",
                        f"(first + r) * {base.size} + {j}",
                    )
                    lines.append(f"{name}f[{write}] = {self._stored(name, read, 1)}")
                else:
                    write = f"(first + r) * {base.size} + t"
                    lines += loop(
                        f"t in T.serial({base.size})", [f"{name}f[{write}] = {self.out[base]}f[{write}]"]
                    )
        return loop("r in T.serial(rows)", lines) if lines else []


def _vector(slot: int, lanes: int) -> str:
    """``lanes`` floats of the scratch."""
    return f"scratch[{slot}]" if lanes == 1 else f"scratch[T.ramp({slot}, 1, {lanes})]"


def _last_stages(plan: Plan) -> dict[Base, int]:
    """The last stage that makes or reads each value; narrow results are read once more, at the end."""
    found: dict[Base, int] = {}
    for k, stage in enumerate(plan.stages):
        found |= {step.result: k for step in stage.steps}
        found |= {v.base: k for step in stage.steps for v in step.operands if v.base.kind == "value"}
    results = {base for base, _, _ in plan.outputs}
    return {base: k for base, k in found.items() if base not in results}


def _last_stride(strides: Sequence[int], shape: Sequence[int]) -> int:
    return [s for s, n in zip(strides, shape, strict=True) if n != 1][-1]


def _offset(start: int, strides: Sequence[int], shape: Sequence[int], lanes: int) -> str:
    """An element's place: axes of the loop are d0, d1, ..., and tile t of the last."""
    real = [s for s, n in zip(strides, shape, strict=True) if n != 1]
    terms = [str(start)] + [f"d{k} * {s}" for k, s in enumerate(real[:-1]) if s]
    if real and real[-1]:
        terms.append(f"t * {lanes * real[-1]}")
    return " + ".join(terms)
