"""Equivariant linear maps on CPUs: dense products over channels, in float32 and in integers.

:func:`lower_linear` packs the weights once and returns a function of the float input. Where the
activation scheme is an integer one, the kernel quantizes a tile of rows into a buffer of its own
and multiplies integers (``s8 x s8`` or ``s16 x s8`` into s32): nothing of integer size crosses
memory between kernels. A gradient (``transpose``) is quantized to 16 bits with a step per row
(``"g16"``), or multiplies floats with the integer weights, decoded in registers, or for many rows
once for each call and thread, into memory that all kernels share; no float copy of them is kept.
Where nothing else is asked for, a kernel runs with the schedules that tuning has stored for it
(``database``), one for each bucket of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...ir.layout import Block, blocks, channels, simplified
from ...ir.specs import GRADIENT_EXPONENT
from ...numerics.weights import rows_of
from .build import compile_both, compile_kernel
from .database import BUCKETS, bucket, threads, tuned
from .dense_kernel import arguments, dense_text, sizes
from .dense_plan import DensePlan, DenseSchedule, LinearProblem, Product, groups, make_plan, padded
from .launch import Choice, Input, Launch, Output, most_rows
from .vnni import has_vnni

__all__ = [
    "DenseSchedule",
    "Given",
    "LinearKernel",
    "LinearProblem",
    "arithmetic",
    "check",
    "check_input",
    "has_vnni",
    "lower_linear",
    "packed",
]

DECODED_ROWS = 128
"""Rows from which a float copy of the weights pays, which each thread makes anew in each call: 8 bits from
40 on one thread, from 100 on two. Threads are not asked for, so that they do not change results."""

_DTYPES = {"f32": torch.float32, "s16": torch.int16, "s8": torch.int8, "s4": torch.int8}


@dataclass(frozen=True)
class LinearKernel:
    """A lowered linear: x (N, dim_in) -> y (N, dim_out), float32 unless the spec says float16.

    Attributes:
        plan: what the kernel's text is made from.
        target: a TVM target in JSON.
        constants: the packed weights, scales, column sums, steps and bias that there are.
        tuned: kernels with other schedules, by the bucket of rows that they are for.
    """

    plan: DensePlan
    target: str
    constants: tuple[Tensor, ...]
    tuned: tuple[tuple[int, LinearKernel], ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        dim_in, dim_out = self._dims
        check_input(x, dim_in, self.plan)
        return self.launch(x.contiguous()) if dim_out else torch.empty((x.shape[0], 0), dtype=self._dtypes[1])

    @cached_property
    def launch(self) -> Launch:
        """The call as data."""
        dim_in, dim_out = self._dims
        given, made = self._dtypes
        parts = (Input(0, (dim_in,), given), Output(0, (dim_out,), made))
        more = len(self.constants) + 1
        return Launch(parts, self._choose, more, empty=self._written, longer=self._written)

    def _written(self, x: Tensor) -> Tensor:
        y = torch.empty((x.shape[0], self._dims[1]), dtype=self._dtypes[1])
        self.run(x, y)
        return y

    def run(self, x: Tensor, y: Tensor) -> None:
        """Write the result for x (N, dim_in) into y (N, dim_out); both contiguous."""
        rows, limit = x.shape[0], most_rows(max(self._dims))
        if rows > limit:
            for start in range(0, rows, limit):
                self.run(x[start : start + limit], y[start : start + limit])
        elif rows and self._dims[1]:
            choice = self._choose(rows)
            choice.function(x, y, *choice.more)

    def _for(self, rows: int) -> LinearKernel:
        """The kernel that is tuned for so many rows, or this one."""
        return next((k for size, k in self.tuned if size == bucket(rows)), self) if self.tuned else self

    def _choose(self, rows: int) -> Choice:
        """On all threads where that pays."""
        kernel = self._for(rows)
        parallel, task = launch(kernel.plan, rows, threads())
        shared, alone = kernel._functions
        if parallel and decodes(kernel.plan, rows):
            shared = kernel._decoded
        return Choice(shared if parallel else alone, (*kernel.constants, task))

    @cached_property
    def _dims(self) -> tuple[int, int]:
        return self.plan.dim_in, self.plan.dim_out

    @property
    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of x and y."""
        problem = self.plan.problem
        given, made = (torch.float16 if h else torch.float32 for h in (problem.half_in, problem.half_out))
        return given, made

    def compiled(self) -> LinearKernel:
        """Itself, with every function that some number of rows asks for: nothing is compiled later."""
        sizes = [size for size, _ in self.tuned]
        default = () if set(BUCKETS) <= set(sizes) else (self,)
        for kernel in (*default, *(kernel for _, kernel in self.tuned)):
            _ = kernel._functions
            if decodes(kernel.plan, DECODED_ROWS):
                _ = kernel._decoded
        return self

    @cached_property
    def _functions(self) -> tuple[Callable[..., None], Callable[..., None]]:
        """On all threads, and on the calling one."""
        return compile_both(dense_text(self.plan, parallel=True), self.target)

    @cached_property
    def _decoded(self) -> Callable[..., None]:
        return compile_kernel(dense_text(self.plan, parallel=True, decoded=True), self.target)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed constants (those that tuned kernels share are counted once)."""
        held = {id(t): t for k in (self, *(k for _, k in self.tuned)) for t in k.constants}
        return sum(t.numel() * t.element_size() for t in held.values())


def check_input(x: Tensor, width: int, plan: DensePlan) -> None:
    """Refuse an input that is not (N, width), of float32 or what else the plan reads.

    Raises:
        LoweringError: saying what it must be and what it is.
    """
    dtype = torch.float16 if plan.problem.half_in else torch.float32
    if x.ndim != 2 or x.shape[1] != width or x.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise LoweringError(
            f"expected a {wanted} tensor (N, {width}), got {x.dtype} {tuple(x.shape)}",
            where=plan.problem.spec,
        )


def lower_linear(
    problem: LinearProblem,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    bias: Tensor | None,
    target: str,
    schedule: DenseSchedule | None = None,
) -> LinearKernel:
    """Pack weights and return the function ``x -> y`` of an equivariant linear.

    Args:
        problem: what to compute.
        weight: (spec.weight_numel,) float32, or int8 codes for weights ``"s8"`` and ``"s4"`` and
            int16 codes for ``"s16"``; codes hold
            the input's steps, where there are any (``numerics.weights.with_steps``) and the scheme
            has no grid in common.
        weight_scale: (spec.scale_numel,) float32 steps of the codes; None for float weights.
        x_scale: one float32 step per channel of the spec's irreps_in; None where activations are float.
        bias: float32, concatenated over the 0e output blocks; None without bias.
        target: a TVM target in JSON.
        schedule: the kernel's constants; None takes what the tuning database holds, and the
            default of the target where it holds nothing.

    Returns:
        A function of x (N, dim_in) float32, component-major, returning y (N, dim_out) float32.

    Raises:
        LoweringError: if a tensor does not fit the problem, or TVM rejects the kernel.
    """
    given = Given(weight, weight_scale, x_scale, bias)
    check(problem, given)
    base = _kernel(make_plan(problem, target, schedule), given, target)
    if schedule is not None:
        return base
    stored = tuned("linear", asdict(problem), target, threads(), schedule_from)
    kernels: dict[DenseSchedule, LinearKernel] = {base.plan.schedule: base}
    for best in stored.values():
        if best not in kernels:
            kernels[best] = _kernel(make_plan(problem, target, best), given, target, base)
    other = ((rows, kernels[s]) for rows, s in stored.items() if s != base.plan.schedule)
    return replace(base, tuned=tuple(other))


def launch(plan: DensePlan, rows: int, threads: int) -> tuple[bool, int]:
    """How a kernel runs on so many rows: whether in parallel, and its argument ``task``."""
    schedule = plan.schedule
    if rows * plan.work_per_row <= schedule.serial_work:
        return False, schedule.task_rows
    if decodes(plan, rows):
        return True, -(-rows // threads)
    tasks = padded(-(-rows // schedule.task_rows), threads)  # as many on every thread
    return True, -(-rows // tasks)


def decodes(plan: DensePlan, rows: int) -> bool:
    """Whether a kernel in parallel decodes weights once for a thread's rows, not for every register tile."""
    return rows >= DECODED_ROWS and any(plan.decodes(p) for p in plan.products)


def schedule_from(fields: Mapping[str, Any]) -> DenseSchedule:
    """A schedule from its fields in JSON.

    Raises:
        ValueError, TypeError, KeyError: if they make no schedule.
    """
    rows = tuple(int(r) for r in fields["rows"])
    task, serial = int(fields["task_rows"]), int(fields["serial_work"])
    if not rows or len(rows) > 8 or min(rows) < 1 or max(rows) > 32 or not 1 <= task <= 4096 or serial < 0:
        raise ValueError(f"constants out of range: {dict(fields)}")
    return DenseSchedule(rows, task, serial, bool(fields["components_first"]))


@dataclass(frozen=True)
class Given:
    """The tensors that a linear is lowered with."""

    weight: Tensor
    weight_scale: Tensor | None
    x_scale: Tensor | None
    bias: Tensor | None


def _kernel(plan: DensePlan, given: Given, target: str, other: LinearKernel | None = None) -> LinearKernel:
    """Pack what a plan reads, or share what ``other`` has packed in the same order."""
    if other is not None and other.plan.products == plan.products:
        return LinearKernel(plan, target, other.constants)
    constants = packed(plan, given)
    return LinearKernel(plan, target, tuple(constants[k] for k in arguments(plan) if k in constants))


def packed(plan: DensePlan, given: Given) -> dict[str, Tensor]:
    """Every constant of a kernel by name, as the kernel reads it; empty where it has none."""
    steps = torch.zeros(0) if given.x_scale is None else given.x_scale.detach().float().cpu().clone()
    found = sizes(plan)
    return {
        "weight": _pack_weights(plan, given.weight),
        "scale": _pack_scales(plan, given.weight_scale, given.x_scale),
        "sums": _column_sums(plan, given.weight),
        "steps": steps[: found["steps"]].clone(),
        "fine": _pack_fine(plan, steps)[: found["fine"]].clone(),
        "bias": _pack_bias(plan, given.bias),
    }


def arithmetic(problem: LinearProblem, target: str) -> str:
    """What is multiplied with what: ``"f32"``, ``"s8·s8→s32"``, ``"s8·s4→s32 + s16·s4→s32"``, ..."""
    plan = make_plan(problem, target)
    found: dict[str, None] = {}
    for product in plan.products:
        kind = plan.operands[product.operand].kind
        total = "f32" if kind == "f32" else "s32"
        floats = kind == problem.weight == "f32"
        found["f32" if floats else f"{kind}·{problem.weight}→{total}"] = None
    return " + ".join(found) or "f32"


def check(problem: LinearProblem, given: Given) -> None:
    """Refuse tensors that do not fit a problem.

    Raises:
        LoweringError: naming the tensor, what it must be and what it is.
    """
    weight, x_scale = given.weight, given.x_scale
    spec, quantized = problem.linear, problem.weight != "f32"
    held = problem.transpose and quantized and x_scale is not None
    scales = channels(spec.irreps_in) if problem.scheme is not None or held else None
    expected = (
        ("weight", weight, spec.weight_numel, _DTYPES[problem.weight]),
        ("weight_scale", given.weight_scale, spec.scale_numel if quantized else None, torch.float32),
        ("x_scale", x_scale, scales, torch.float32),
        ("bias", given.bias, sum(b.mul for b in spec.bias_blocks) if problem.bias else None, torch.float32),
    )
    for name, tensor, numel, dtype in expected:
        if numel is None:
            continue
        if tensor is None or tuple(tensor.shape) != (numel,) or tensor.dtype != dtype:
            got = None if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise LoweringError(f"{name} must be {dtype} ({numel},), got {got}", where=problem.spec)
    if problem.activation == "f32" and not problem.transpose and x_scale is not None:
        raise LoweringError(
            "x_scale is for quantized activations and for gradients",
            where=problem.spec,
            fix="leave it out where activations stay float",
        )
    top = {"s8": 127, "s4": 7}.get(problem.weight)
    if top and weight.numel() and int(weight.to(torch.int32).abs().max()) > top:
        raise LoweringError(f"a weight code exceeds {top}", where=problem.spec, fix="requantize the weights")


def _matrix(plan: DensePlan, p: Product, weight: Tensor) -> Tensor:
    """A product's matrix (depth, output channels) in the kernel's direction."""
    path = p.path
    flat = weight.detach().cpu()[path.offset : path.offset + path.numel]
    full = flat.view(path.block_in.mul, path.block_out.mul)
    full = full.T if plan.problem.transpose else full
    return full[p.first : p.first + p.depth]


def _pack_weights(plan: DensePlan, weight: Tensor) -> Tensor:
    """All products' matrices as the kernel reads them (layout: ``dense_plan``)."""
    lanes, parts = plan.unit.lanes, []
    for p in plan.products:
        kind = plan.operands[p.operand].kind
        step, stored = plan.unit.step(kind), groups(plan, kind, p.depth)
        steps = stored * (2 if plan.problem.weight == "s4" else 1)
        matrix = _matrix(plan, p, weight)
        full = matrix.new_zeros(steps * step, padded(p.block.mul, lanes))
        full[: matrix.shape[0], : matrix.shape[1]] = matrix
        grouped = full.view(steps, step, -1).transpose(1, 2)  # (steps, columns, step)
        for t in p.tiles:
            wide = t.vectors * lanes
            tile = grouped[:, t.start * lanes : t.start * lanes + t.count * wide]
            tile = tile.reshape(steps, t.count, wide * step).transpose(0, 1)
            parts.append((_pair(tile) if plan.problem.weight == "s4" else tile).reshape(-1))
    return torch.cat(parts).contiguous() if parts else torch.zeros(0)


def _pair(codes: Tensor) -> Tensor:
    """(count, 2 groups, n) int8 codes to (count, groups, n) bytes: code + 8, the even group low."""
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _pack_scales(plan: DensePlan, weight_scale: Tensor | None, x_scale: Tensor | None) -> Tensor:
    """What an accumulator is multiplied by, per path and padded output channel; before that a gradient."""
    packed = torch.zeros(plan.sizes["scale"])
    if weight_scale is None:
        return packed
    scale, scheme = weight_scale.detach().float().cpu(), plan.problem.scheme
    if plan.problem.transpose:
        stored = 2.0**-GRADIENT_EXPONENT if plan.problem.half_in else 1.0
        for o, path in zip(plan.operands, plan.problem.linear.paths, strict=True):
            mul = path.block_out.mul
            packed[o.index : o.index + mul] = stored * scale[path.scale_offset : path.scale_offset + mul]
        for p in plan.products:
            held = 1.0 if x_scale is None else 1.0 / rows_of(x_scale.detach().float().cpu(), p.path)[:, 0]
            packed[p.scale : p.scale + p.block.mul] = held
        return packed
    for p in plan.products:
        o, mul = plan.operands[p.operand], p.block.mul
        unit = torch.ones(())
        if scheme is not None:
            steps = _steps_around(plan, o.block, x_scale) if scheme.common else unit
            unit = steps.max() * 2.0 ** -scheme.fraction_bits(o.block.l)
        packed[p.scale : p.scale + mul] = scale[p.path.scale_offset : p.path.scale_offset + mul] * unit
    return packed


def _steps_around(plan: DensePlan, block: Block, x_scale: Tensor | None) -> Tensor:
    """The steps of all channels on one grid with a block's: those of its simplified block."""
    if x_scale is None:
        return torch.ones(1)
    owners = blocks(simplified(plan.problem.irreps_in))
    owner = next(o for o in owners if o.base <= block.base < o.base + o.stride)
    return x_scale.detach().float().cpu()[owner.channel :][: owner.mul]


def _pack_fine(plan: DensePlan, steps: Tensor) -> Tensor:
    """``s[u] / S 2^f`` of every channel, with S the largest step of its block."""
    scheme = plan.problem.scheme
    if scheme is None or not scheme.common:
        return torch.zeros(0)
    owners = blocks(simplified(plan.problem.irreps_in))
    parts = [(b.l, steps[b.channel :][: b.mul]) for b in owners]
    return torch.cat([s / s.max() * 2.0 ** scheme.fraction_bits(l) for l, s in parts])


def _column_sums(plan: DensePlan, weight: Tensor) -> Tensor:
    """Minus the share of the unsigned offset in each s32 sum: ``-128 * sum_u C[u, w]``."""
    packed = torch.zeros(plan.sizes["sums"], dtype=torch.int32)
    for p in plan.products:
        if p.sums >= 0:
            total = _matrix(plan, p, weight).to(torch.int32).sum(0, dtype=torch.int32)
            offset = plan.unit.offset(plan.operands[p.operand].kind)
            packed[p.sums : p.sums + p.block.mul] = -offset * total
    return packed


def _pack_bias(plan: DensePlan, bias: Tensor | None) -> Tensor:
    packed = torch.zeros(plan.sizes["bias"])
    start = 0
    for b in plan.biased:
        if bias is not None:
            at = plan.bias_offset(b)
            packed[at : at + b.mul] = bias.detach().float().cpu()[start : start + b.mul]
        start += b.mul
    return packed
