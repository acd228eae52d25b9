"""From a linear problem to the loops of its kernel: operands, products, and where packed data lie.

An **operand** is what a block of the input becomes before it is multiplied: the float input itself,
or integers (or scaled floats) that the kernel's prologue writes for a tile of rows. A **product**
is one weight matrix applied to one operand: a path, cut where an s32 sum could overflow. Weights
are packed in column tiles of ``vectors`` registers, ``[tile][K / step][vectors * lanes][step]``;
4-bit weights keep two neighbouring groups of K in the halves of one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...config import ActivationScheme, activation_scheme
from ...errors import LoweringError
from ...ir.layout import Block, blocks, dim
from ...ir.specs import FLOATS, GRADIENT, LinearPath, LinearSpec, linear_spec
from .vnni import VectorUnit, vector_unit

MAX_DEPTH = {"f32": 1 << 30, "s8": 65536, "s16": 512}
"""How many products an s32 sum may hold: 512 * 32767 * 127 and 65536 * 255 * 127 are below 2^31."""

WEIGHED = ("scaled", "dynamic")
"""Operands that take the weights' scales before the product: a transpose sums over their channels."""


@dataclass(frozen=True)
class LinearProblem:
    """What a linear kernel computes.

    Attributes:
        spec: the :class:`LinearSpec` as text.
        activation: ``"f32"``, an activation scheme such as ``"s8 m8d8"``, or for a gradient that meets
            integer weights ``"g16"``: 16-bit integers with a step per row (numerics.gradients).
        weight: ``"f32"``, ``"s16"`` (multiplied in floats), ``"s8"`` or ``"s4"``.
        transpose: the gradient's map, from irreps_out to irreps_in (activation ``"f32"`` or ``"g16"``,
            no bias).
        bias: whether a float bias is added to the ``0e`` output blocks.
    """

    spec: str
    activation: str = "f32"
    weight: str = "f32"
    transpose: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        if self.weight not in ("f32", "s16", "s8", "s4"):
            raise LoweringError(
                f"unknown weight type {self.weight!r}", where=str(self), fix="f32, s16, s8 or s4"
            )
        if self.transpose and (self.activation not in FLOATS or self.bias):
            raise LoweringError(
                f"a transposed linear takes a gradient, float or {GRADIENT}, and no bias",
                where=str(self),
                fix=f"use activation='f32' or {GRADIENT!r}, bias=False",
            )
        if self.activation == GRADIENT and not (self.transpose and self.weight in ("s8", "s4")):
            raise LoweringError(
                f"{GRADIENT} is for gradients (transposed linears) that meet integer weights",
                where=str(self),
                fix="use activation='f32', or transpose=True with weights s8 or s4",
            )
        if self.scheme is not None and self.scheme.common and self.weight == "f32":
            raise LoweringError(
                "activations on a common grid are for integer weights",
                where=str(self),
                fix="leave 'common' out of the activation scheme, or use weights s8 or s4",
            )
        if self.linear.half and self.weight == "f32":
            raise LoweringError(
                "rows in half precision are for integer weights",
                where=str(self),
                fix="leave '; f16' out of the spec, or use weights s8 or s4",
            )

    @property
    def linear(self) -> LinearSpec:
        return linear_spec(self.spec)

    @property
    def scheme(self) -> ActivationScheme | None:
        """The static scheme of the activations; None for floats and for gradients."""
        return None if self.activation in FLOATS else activation_scheme(self.activation)

    @property
    def half_in(self) -> bool:
        """Whether the kernel reads float16."""
        return self.linear.half and self.transpose

    @property
    def half_out(self) -> bool:
        """Whether the kernel writes float16."""
        return self.linear.half and not self.transpose

    @property
    def irreps_in(self) -> str:
        """Irreps of the kernel's input (the linear's output, if transposed)."""
        return self.linear.irreps_out if self.transpose else self.linear.irreps_in

    @property
    def irreps_out(self) -> str:
        return self.linear.irreps_in if self.transpose else self.linear.irreps_out


@dataclass(frozen=True)
class DenseSchedule:
    """The constants of a linear kernel that tuning may change.

    Attributes:
        rows: rows of a register tile, by its width in vectors (1, 2, 3, ...).
        task_rows: rows that one task quantizes at once and multiplies.
        serial_work: multiplications below which one thread does everything.
        components_first: sweep a block's components outside (rather than inside) its column tiles.
    """

    rows: tuple[int, ...] = (8, 8, 6, 4)
    task_rows: int = 48
    serial_work: int = 1 << 20
    components_first: bool = False


@lru_cache(maxsize=64)
def default_schedule(unit: VectorUnit) -> DenseSchedule:
    """Register tiles that fill a unit's registers without spilling."""
    if unit.dot == "dp4a":  # a tile of columns is a warp wide
        return DenseSchedule(rows=(8,))
    return DenseSchedule() if unit.registers >= 32 else DenseSchedule(rows=(8, 6))


@dataclass(frozen=True)
class Operand:
    """An input block in the form in which it is multiplied.

    Attributes:
        kind: ``"f32"``, ``"s8"`` or ``"s16"``.
        rule: ``"direct"`` (read from x), ``"scaled"`` (times the weights' scales, for gradients),
            ``"dynamic"`` (that in integers, with a step per row and component: numerics.gradients),
            ``"component"``, ``"mddq"`` or ``"exact"`` (numerics.activations).
        block: where it lies in x.
        width: channels per component in the tile buffer.
        offset: its first element in a row of the tile buffer.
        index: its first step's place in ``steps`` (and in ``fine``); for gradients, in ``scale``.
        slot: its place among the operands whose NaNs are watched; -1 where floats carry them.
        step: the first component's place among a row's dynamic steps; -1 where steps are static.
    """

    kind: str
    rule: str
    block: Block
    width: int = 0
    offset: int = 0
    index: int = 0
    slot: int = -1
    step: int = -1


@dataclass(frozen=True)
class ColumnTiles:
    """``count`` column tiles of ``vectors`` registers, the first at vector ``start``."""

    vectors: int
    count: int
    start: int


@dataclass(frozen=True)
class Product:
    """``y[block] (+)= operand[:, first : first + depth] @ codes`` in one stretch of the sum.

    Attributes:
        path: the linear's path.
        operand: index into the plan's operands.
        block: the output block in y.
        first, depth: the range of input channels.
        weight, scale, sums, bias: offsets into the packed weights, scales, column sums and bias;
            -1 where there is none.
        opens: whether it is the first to reach its output block (it stores, later ones add).
        tiles: its column tiles.
    """

    path: LinearPath
    operand: int
    block: Block
    first: int
    depth: int
    weight: int
    scale: int
    sums: int
    bias: int
    opens: bool
    tiles: tuple[ColumnTiles, ...]


@dataclass(frozen=True)
class DensePlan:
    """All that a linear kernel's text depends on."""

    problem: LinearProblem
    unit: VectorUnit
    schedule: DenseSchedule
    operands: tuple[Operand, ...]
    products: tuple[Product, ...]

    def row_size(self, dtype: str) -> int:
        """Elements per row of the tile buffer of ``dtype`` (``VectorUnit.storage``)."""
        ends = [o.offset + o.block.components * o.width for o in self._tiled(dtype)]
        return max(ends, default=0)

    def _tiled(self, dtype: str) -> list[Operand]:
        return [o for o in self.operands if o.rule != "direct" and self.unit.storage(o.kind) == dtype]

    def decodes(self, product: Product) -> bool:
        """Whether a product's integer weights are multiplied with floats."""
        return self.problem.weight != "f32" and self.operands[product.operand].kind == "f32"

    @property
    def scaled(self) -> bool:
        """Whether a float gradient meets integer weights."""
        return any(o.rule == "scaled" for o in self.operands)  # all of them, then

    @cached_property
    def watched(self) -> int:
        """How many operands cannot carry a NaN themselves."""
        return sum(o.slot >= 0 for o in self.operands)

    @cached_property
    def dynamic(self) -> int:
        """How many dynamic steps a row has: one per component of each ``"dynamic"`` operand."""
        return sum(o.block.components for o in self.operands if o.rule == "dynamic")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of the packed weights, scales, column sums and bias."""
        ends = {"weight": 0, "scale": 0, "sums": 0, "bias": 0}
        for p in self.products:
            wide = padded(p.block.mul, self.unit.lanes)
            kind = self.operands[p.operand].kind
            ends["weight"] = p.weight + groups(self, kind, p.depth) * self.unit.step(kind) * wide
            ends["scale"] = max(ends["scale"], p.scale + wide if p.scale >= 0 else 0)
            ends["sums"] = max(ends["sums"], p.sums + wide if p.sums >= 0 else 0)
        ends["scale"] = max(ends["scale"], _weighed(self.operands))
        ends["bias"] = sum(padded(b.mul, self.unit.lanes) for b in self.biased)
        return ends

    @property
    def biased(self) -> tuple[Block, ...]:
        return self.problem.linear.bias_blocks if self.problem.bias else ()

    def bias_offset(self, block: Block) -> int:
        """Where a block's bias starts in the padded bias, -1 if it has none."""
        offset = 0
        for b in self.biased:
            if b == block:
                return offset
            offset += padded(b.mul, self.unit.lanes)
        return -1

    @cached_property
    def unreached(self) -> tuple[Block, ...]:
        """Output blocks without a path: zeros, or their bias."""
        reached = {p.block for p in self.products}
        return tuple(b for b in blocks(self.problem.irreps_out) if b not in reached)

    @cached_property
    def work_per_row(self) -> int:
        """Multiplications per row."""
        return sum(p.depth * p.block.mul * p.block.components for p in self.products)

    @property
    def dim_in(self) -> int:
        return dim(self.problem.irreps_in)

    @property
    def dim_out(self) -> int:
        return dim(self.problem.irreps_out)


def padded(n: int, multiple: int) -> int:
    """``n`` rounded up to a multiple."""
    return -(-n // multiple) * multiple


def groups(plan: DensePlan, kind: str, depth: int) -> int:
    """Stored groups of K of a product: ``depth / step``, halved where a byte holds two."""
    count = -(-depth // plan.unit.step(kind))
    return -(-count // 2) if plan.problem.weight == "s4" else count


@lru_cache(maxsize=1024)
def column_tiles(mul: int, lanes: int, rows: tuple[int, ...]) -> tuple[ColumnTiles, ...]:
    """Cut ``mul`` output channels into register tiles with the fewest loads per multiplication.

    A last vector that is not full is stored in part, so its column tile stands alone.
    """
    total = -(-mul // lanes)

    def cut(vectors: int) -> tuple[ColumnTiles, ...]:
        count, rest = divmod(total, vectors)
        if mul % lanes and not rest:
            count, rest = count - 1, vectors
        tiles = (ColumnTiles(vectors, count, 0),) if count else ()
        return tiles + ((ColumnTiles(rest, 1, count * vectors),) if rest else ())

    def cost(tiles: tuple[ColumnTiles, ...]) -> float:
        return sum(t.count * (t.vectors + rows[t.vectors - 1]) / rows[t.vectors - 1] for t in tiles)

    return min((cut(v) for v in range(len(rows), 0, -1)), key=cost)


@lru_cache(maxsize=1024)
def make_plan(problem: LinearProblem, target: str, schedule: DenseSchedule | None = None) -> DensePlan:
    """Choose operands, products and offsets for a problem on a target (TVM target in JSON)."""
    unit = vector_unit(target)
    schedule = schedule or default_schedule(unit)
    operands: list[Operand] = []
    if problem.transpose and problem.weight != "f32":
        scaled = 0
        for path in problem.linear.paths:
            wide = padded(path.block_out.mul, unit.lanes)
            kind, rule = ("s16", "dynamic") if problem.activation == GRADIENT else ("f32", "scaled")
            operands.append(Operand(kind, rule, path.block_out, index=scaled))
            scaled += wide
        choice = {path: i for i, path in enumerate(problem.linear.paths)}
    else:
        sources = [_source(problem, path) for path in problem.linear.paths]
        distinct = tuple(dict.fromkeys(sources))
        operands = [_operand(problem, block) for block in distinct]
        choice = {path: distinct.index(s) for path, s in zip(problem.linear.paths, sources, strict=True)}
    placed = _place(operands, unit)
    return DensePlan(problem, unit, schedule, placed, _products(problem, unit, schedule, placed, choice))


def _source(problem: LinearProblem, path: LinearPath) -> Block:
    return path.block_out if problem.transpose else path.block_in


def _operand(problem: LinearProblem, block: Block) -> Operand:
    scheme = problem.scheme
    if scheme is None:
        return Operand("f32", "direct", block)
    rule = "component" if block.l == 0 else scheme.vector
    if rule == "exact" or problem.weight in ("f32", "s16"):
        return Operand("f32", rule, block, index=block.channel)
    bits = scheme.scalar_bits if block.l == 0 else scheme.vector_bits
    narrow = rule == "component" and bits <= 8 and not scheme.common
    return Operand("s8" if narrow else "s16", rule, block, index=block.channel)


def _weighed(operands: Sequence[Operand]) -> int:
    """Elements of ``scale`` that operands take; products' scales come after them."""
    return max((o.index + o.width for o in operands if o.rule in WEIGHED), default=0)


def _place(operands: list[Operand], unit: VectorUnit) -> tuple[Operand, ...]:
    """Give each operand its place in the tile buffer of its storage type."""
    used: dict[str, int] = {}
    placed, slot, step = [], 0, 0
    for o in operands:
        if o.rule == "direct":
            placed.append(o)
            continue
        dtype = unit.storage(o.kind)
        width = padded(o.block.mul, max(unit.lanes, 4))
        start = used.get(dtype, 0)
        used[dtype] = start + o.block.components * width
        dynamic = o.rule == "dynamic"  # NaNs are in its steps
        watched = o.kind != "f32" and not dynamic
        placed.append(
            replace(
                o,
                width=width,
                offset=start,
                slot=slot if watched else -1,
                step=step if dynamic else -1,
            )
        )
        slot += watched
        step += o.block.components if dynamic else 0
    return tuple(placed)


def _products(
    problem: LinearProblem,
    unit: VectorUnit,
    schedule: DenseSchedule,
    operands: tuple[Operand, ...],
    choice: dict[LinearPath, int],
) -> tuple[Product, ...]:
    found: list[Product] = []
    weight, scale, sums = 0, _weighed(operands), 0
    draft = DensePlan(problem, unit, schedule, operands, ())
    for path in problem.linear.paths:
        operand = operands[choice[path]]
        block = path.block_in if problem.transpose else path.block_out
        wide = padded(block.mul, unit.lanes)
        scales = problem.weight != "f32"
        for first in range(0, operand.block.mul, MAX_DEPTH[operand.kind]):
            depth = min(MAX_DEPTH[operand.kind], operand.block.mul - first)
            opens = all(p.block != block for p in found)
            signed = unit.offset(operand.kind) != 0
            found.append(
                Product(
                    path=path,
                    operand=choice[path],
                    block=block,
                    first=first,
                    depth=depth,
                    weight=weight,
                    scale=scale if scales else -1,
                    sums=sums if signed else -1,
                    bias=draft.bias_offset(block) if opens else -1,
                    opens=opens,
                    tiles=column_tiles(block.mul, unit.lanes, schedule.rows),
                )
            )
            weight += groups(draft, operand.kind, depth) * unit.step(operand.kind) * wide
            sums += wide if signed else 0
        scale += wide if scales else 0
    return tuple(found)
