"""Fused equivariant convolution on CPUs: gather, tensor product and scatter in one loop.

    out[n] = sum over edges e with receiver n of TP(x[senders[e]], sh[e], weight[e])

Weights may have one row for edge e and its reverse, e + E / 2; their gradient then is the sum of both.

Both kernels run in parallel over nodes and visit a node's edges in chunks (of 16, unless tuning has
found better: :class:`ConvSchedule`). A chunk's spherical harmonics are contracted with the
Clebsch-Gordan constants once, for all channels (of a head) and a vector of edges at a time:

    A[m1, m3] = coefficient * sum_m2 C[m1, m2, m3] * sh[m2]

Then, block by block and one vector register of channels at a time, ``out[m3] += w * A[m1, m3] *
x[m1]`` runs over the chunk's edges with all sums in registers. That order touches an edge's weights
in pieces, which hardware does not foresee, so the next chunk's are prefetched into the second-level
cache, one line for each line used (measured: twice as fast). The backward kernel owns a *sender*, so that
gradients with respect to x need no atomics and every run gives the same bits; it takes one edge after
another, whole, because what it would keep in registers otherwise is less than what it reads, and an edge's
rows of weights and of the receiver's gradient, 20 KB in SevenNet, are asked for two edges before:

    H[m1] = sum_m3 A[m1, m3] * g[m3]      grad_x[m1] += w * H[m1]      grad_w = sum_m1 x[m1] * H[m1]
    grad_sh[m2] += sum over channels of w * C[m1, m2, m3] * x[m1] * g[m3]

An edge and its reverse have different senders. Where they share a row of weights, all nodes are gone through
twice: first with the edges below E / 2, which write its gradient, then with the others, which add to it. So
no two threads ever meet in a row, and the order of each sum is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from ...ir.layout import Block
from ...ir.specs import GRADIENT_EXPONENT, TensorProductPath
from .build import compile_kernel
from .conv_harmonics import (
    clear_harmonics,
    contract_harmonics,
    gathered_harmonics,
    grad_sh_memory,
    grad_sh_path,
    grad_sh_slot,
    harmonics_memory,
    head_of_tile,
    reduce_grad_sh,
    symbol_place,
    zero_grad_sh,
)
from .conv_schedule import DEFAULT, ConvSchedule, conv_schedule_from
from .conv_terms import Pair, PathTerms, Problem, conv_buffers, conv_width, folded_problem, weight_row
from .database import by_bucket, problem_text, threads, tuned
from .emit import (
    block_lanes,
    kernel_text,
    literal,
    local,
    loop,
    many,
    prefetch,
    signed_sum,
    splat,
    vector,
    vector_lanes,
)
from .launch import Choice, Input, Launch, Output, Part

_SUMS = 12  # registers of sums, where no schedule says how many: more of them spill what a path needs besides
_AHEAD = 2  # edges between asking for what the backward kernel reads and using it

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def conv_forward(spec: str, target: str) -> Launch:
    """The compiled convolution ``(x, sh, weight, edges) -> out``.

    Args:
        spec: a :class:`~gaq_compile.ir.specs.TensorProductSpec` string.
        target: a TVM target in JSON.

    Returns:
        A function of x (N, dim_x), sh (E, dim_sh), weight (E or E / 2, weight_numel), float32 (weights
        float16 where the spec says so), contiguous, component-major, and ``edges = [senders (E),
        receivers (E), receiver_ptr (N+1), receiver_order (E), sender_ptr (N+1), sender_order (E)]``, int32;
        it returns out (N, dim_out).

    Raises:
        IrrepsError: if the spec violates the selection rules.
        LoweringError: if TVM rejects the kernel.
    """
    problem = folded_problem(spec)
    widths = [(conv_width(problem, name),) for name in ("x", "sh", "weight", "out")]
    tensors = [Input(0, widths[0]), Input(1, widths[1]), Input(2, widths[2], _weight_type(problem))]
    edges = [Input(3 + k, dtype=torch.int32) for k in (0, 2, 3)]

    def nothing(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x.new_zeros((x.shape[0], *widths[3]))

    parts: tuple[Part, ...] = (*tensors, *edges, Output(0, widths[3]))
    kernels, known = _kernels("conv", forward_source, spec, target)
    return Launch(parts, kernels, counted=1, empty=nothing, tuning=known)


def conv_backward(spec: str, target: str) -> Launch:
    """The compiled gradient ``(grad, x, sh, weight, edges) -> (grad_x, grad_sh, grad_weight)``.

    ``grad`` is (N, dim_out); the other arguments, shapes and errors are :func:`conv_forward`'s. Each node's
    edges come in ascending order. The gradients have their tensors' shapes.
    """
    problem = folded_problem(spec)
    widths = [(conv_width(problem, name),) for name in ("out", "x", "sh", "weight")]
    dtypes = (*[torch.float32] * 3, _weight_type(problem))
    tensors = [Input(k, row, dtype) for k, (row, dtype) in enumerate(zip(widths, dtypes, strict=True))]
    edges = [Input(4 + k, dtype=torch.int32) for k in (1, 4, 5)]
    made = [Output(t.place, t.row, t.dtype) for t in tensors[1:]]

    def nothing(
        grad: torch.Tensor, x: torch.Tensor, sh: torch.Tensor, weight: torch.Tensor, *_: Any
    ) -> Gradients:
        return torch.zeros_like(x), torch.zeros_like(sh), torch.zeros_like(weight)

    kernels, known = _kernels("conv_backward", backward_source, spec, target)
    parts: tuple[Part, ...] = (*tensors, *edges, *made)
    return Launch(parts, kernels, counted=2, several=True, empty=nothing, tuning=known)


def _weight_type(problem: Problem) -> torch.dtype:
    return torch.float16 if problem.spec.half else torch.float32


def _kernels(
    family: str, source: Callable[[str, int, ConvSchedule], str], spec: str, target: str
) -> tuple[Callable[[int], Choice], tuple[str, str]]:
    """``edges -> kernel``: the default's, or the one tuned for so many; and what tuning knows it by."""
    lanes, problem = vector_lanes(target), {"spec": spec}
    stored = tuned(family, problem, target, threads(), conv_schedule_from)
    kernels = by_bucket(stored, DEFAULT, lambda s: Choice(compile_kernel(source(spec, lanes, s), target)))
    return kernels, (family, problem_text(problem))


@lru_cache(maxsize=256)
def forward_source(spec: str, lanes: int, schedule: ConvSchedule = DEFAULT) -> str:
    """TVMScript of ``main(x, sh, weight, senders, receiver_ptr, receiver_order, out)``.

    Args:
        spec: a tensor product spec string.
        lanes: float32 per vector register of the target.
        schedule: the kernel's constants.
    """
    problem = folded_problem(spec)
    inner: list[str] = []
    for group in _accumulator_groups(problem, schedule.sums or _SUMS):
        inner += _forward_group(problem, group, lanes, schedule)
    sides = _Sides("senders", "out", conv_width(problem, "out"))
    body = _per_node(problem, lanes, sides, inner, schedule.chunk)
    return kernel_text(
        conv_buffers(problem, "x", "sh", "weight", "senders", "ptr", "order", "out"),
        body,
    )


@lru_cache(maxsize=256)
def backward_source(spec: str, lanes: int, schedule: ConvSchedule = DEFAULT) -> str:
    """TVMScript of ``main(grad, x, sh, weight, receivers, sender_ptr, sender_order, grad_x, grad_sh,
    grad_weight)``; arguments as for :func:`forward_source`."""
    problem = folded_problem(spec)
    widest = max((_lanes(problem, g[0].path.block_x, lanes) for g in problem.by_input), default=1)
    edge = zero_grad_sh(problem, widest)
    for group in problem.by_input:
        edge += _backward_group(problem, group, (lanes, widest), schedule)
    edge += reduce_grad_sh(problem, widest)
    inner = [*grad_sh_memory(problem, widest), *loop("j in T.serial(count)", edge)]
    sides = _Sides("receivers", "grad_x", conv_width(problem, "x"), sweeps=True)
    body = _per_node(problem, lanes, sides, inner, schedule.chunk)
    given = ("grad", "x", "sh", "weight", "receivers", "ptr", "order")
    return kernel_text(conv_buffers(problem, *given, "grad_x", "grad_sh", "grad_weight"), body)


@dataclass(frozen=True)
class _Sides:
    """Which end of an edge is gathered, the per-node result that the loop owns, and whether edges that share
    their weights with one before come in a second ``sweep``."""

    gathered: str
    result: str
    width: int
    sweeps: bool = False


def _per_node(problem: Problem, lanes: int, sides: _Sides, inner: Sequence[str], size: int) -> list[str]:
    """The loops over nodes and chunks of ``size`` edges, around what is done with a chunk."""
    gather = [
        "edge[j] = order[first + j]",
        f"ahead[j] = {_ahead_edge(sides, size)}",
        f"row[j] = {weight_row('edge[j]')}",
        f"ahead_row[j] = {weight_row('ahead[j]')}",
        f"node[j] = {sides.gathered}[edge[j]]",
        f"ahead_node[j] = {sides.gathered}[ahead[j]]",
    ]
    gather += gathered_harmonics(problem, size)
    chunk = [
        f"first: T.let = start + c * {size}",
        f"count: T.let = T.min(stop - first, {size})",
        *loop("j in T.serial(count)", gather),
        *contract_harmonics(problem, lanes, size),
        *inner,
    ]
    node = [
        local("edge", size, "int32"),
        local("ahead", size, "int32"),
        local("row", size, "int32"),
        local("ahead_row", size, "int32"),
        local("node", size, "int32"),
        local("ahead_node", size, "int32"),
        *harmonics_memory(problem, size),
        "low: T.let = ptr[i]",
        "high: T.let = ptr[i + 1]",
        *clear_harmonics(problem, lanes, size),
        *_begin(sides, lanes),
        *loop(f"c in T.serial((stop - start + {size - 1}) // {size})", chunk),
    ]
    if not sides.sweeps:
        return loop("i in T.parallel(nodes)", node)
    places = [f"i: T.let = {_from_both_ends('p')}", f"following: T.let = {_from_both_ends('behind')}"]
    nodes = loop("p in T.parallel(nodes)", ["behind: T.let = T.min(p + 1, nodes - 1)", *places, *node])
    return loop("sweep in T.serial(T.Select(rows < edges, 2, 1))", nodes)


def _from_both_ends(place: str) -> str:
    """The node that comes at a place in the order first, last, second, last but one, ...

    Of a bond's two edges the first often has the later sender: the first sweep has most to do for the last
    nodes, the second for the first ones. Taken from both ends, every thread's part is as large.
    """
    return f"T.Select({place} % 2 == 0, {place} // 2, nodes - 1 - {place} // 2)"


def _ahead_edge(sides: _Sides, size: int) -> str:
    """The edge that comes a chunk later; in sweeps, two later, of this node or of the one that follows."""
    if not sides.sweeps:
        return f"order[T.min(first + j + {size}, edges - 1)]"
    here = f"first + j + {_AHEAD}"
    return f"order[T.min(T.Select({here} < stop, {here}, {here} - stop + after), edges - 1)]"


def _begin(sides: _Sides, lanes: int) -> list[str]:
    """Where a node's edges ``start`` and ``stop``, in this sweep; and a result of zeros, once."""
    lanes = block_lanes(sides.width, lanes)
    zero = f"{vector(sides.result, f'z * {lanes}', lanes, 'i')} = {splat(literal(0.0), lanes)}"
    zeros = loop(f"z in T.serial({sides.width // lanes})", [zero])
    if not sides.sweeps:
        return ["start: T.let = low", "stop: T.let = high", *zeros]
    return [
        local("middle", 2, "int32"),
        *_middle(0, "i"),
        *_middle(1, "following"),
        "start: T.let = T.Select(sweep == 0, low, middle[0])",
        "stop: T.let = T.Select(sweep == 0, middle[0], high)",
        "after: T.let = T.Select(sweep == 0, ptr[following], middle[1])",
        "if sweep == 0:",
        *("    " + line for line in zeros),
    ]


def _middle(k: int, node: str) -> list[str]:
    """Where a node's edges begin that belong to the second sweep, as ``middle[k]``."""
    count = f"middle[{k}] = middle[{k}] + T.Select(order[ptr[{node}] + k] < rows, 1, 0)"
    return [f"middle[{k}] = ptr[{node}]", *loop(f"k in T.serial(ptr[{node} + 1] - ptr[{node}])", [count])]


def _accumulator_groups(problem: Problem, budget: int) -> list[tuple[PathTerms, ...]]:
    """Paths of one input block that fit ``budget`` vector registers of sums."""
    groups: list[tuple[PathTerms, ...]] = []
    for paths in problem.by_input:
        group: list[PathTerms] = []
        used = 0
        for terms in paths:
            need = terms.path.block_out.components
            if group and used + need > budget:
                groups.append(tuple(group))
                group, used = [], 0
            group.append(terms)
            used += need
        groups.append(tuple(group))
    return groups


def _element(block: Block, component: int, lanes: int) -> str:
    """The first element of channel tile ``t`` of one component."""
    return f"{block.base + component * block.stride} + t * {lanes}"


def _lanes(problem: Problem, block: Block, lanes: int) -> int:
    """Channels of a block that are computed at once: of one head."""
    return block_lanes(block.mul // problem.heads, lanes)


def _symbol(problem: Problem, block: Block, lanes: int, chunk: int, pair: Pair, place: str = "j") -> str:
    head = head_of_tile(problem, block.mul, lanes)
    return splat(f"A[{symbol_place(problem, pair.symbol, head, chunk, place)}]", lanes)


def _every_tile(path: TensorProductPath) -> str:
    """An edge's place in ``A`` as the backward kernel's tiles read it.

    A path that couples a vector or more has more constants than there are registers: LLVM would spread each
    over a register before the loop over tiles and spill it, 64 bytes for 4. ``ptr[0]`` is zero, which LLVM
    does not know, so they are read where they are used (a quarter of the kernel's time without its misses).
    """
    return "j + t * ptr[0]" if path.block_x.l else "j"


def _ahead(buffer: str, index: str, level: int, row: str = "ahead_row[j]") -> list[str]:
    """Fetch what is needed soon into a cache (TVM counts locality down from 3, the first level)."""
    text = prefetch(buffer, index, row)
    return [text.replace(", 0, 2, 1))", f", 0, {4 - level}, 1))")] if level else []


def _forward_group(
    problem: Problem, group: Sequence[PathTerms], lanes: int, schedule: ConvSchedule
) -> list[str]:
    """``out[m3] += w * A[m1, m3] * x[m1]`` over a chunk, sums in registers."""
    block = group[0].path.block_x
    lanes = _lanes(problem, block, lanes)
    name = f"sum_{block.base}_{group[0].path.offset}"
    slots: dict[tuple[int, int], int] = {}
    opening, closing = [], []
    for terms in group:
        target = terms.path.block_out
        for m3 in range(target.components):
            if (target.base, m3) not in slots:
                slots[target.base, m3] = len(slots)
                held = vector(name, str(slots[target.base, m3] * lanes), lanes)
                home = vector("out", _element(target, m3, lanes), lanes, "i")
                opening.append(f"{held} = {home}")
                closing.append(f"{home} = {held}")
    edge = [
        f"x{m}: T.let = {vector('x', _element(block, m, lanes), lanes, 'node[j]')}"
        for m in range(block.components)
    ]
    for k, terms in enumerate(group):
        sums = {
            m3: vector(name, str(slots[terms.path.block_out.base, m3] * lanes), lanes)
            for m3 in range(terms.path.block_out.components)
        }
        edge += _forward_path(problem, terms, k, lanes, sums, schedule)
    tile = [*opening, *loop("j in T.serial(count)", edge), *closing]
    return [local(name, len(slots) * lanes), *loop(f"t in T.serial({block.mul // lanes})", tile)]


def _forward_path(
    problem: Problem, terms: PathTerms, k: int, lanes: int, sums: dict[int, str], schedule: ConvSchedule
) -> list[str]:
    """One path on one edge, in the cheapest of three orders of multiplication."""
    path = terms.path
    weight = f"{path.offset} + t * {lanes}"
    lines = [
        *_ahead("weight", weight, schedule.prefetch),
        f"w{k}: T.let = {_weight(terms, 'weight', weight, lanes)}",
    ]
    symbol = partial(_symbol, problem, path.block_x, lanes, schedule.chunk)
    by_out: dict[int, list[Pair]] = {}
    for pair in terms.pairs:
        by_out.setdefault(pair.m3, []).append(pair)
    if len(terms.symbols) == 1:
        lines.append(f"a{k}: T.let = w{k} * {symbol(terms.pairs[0])}")
        for m3, pairs in by_out.items():
            lines.append(
                f"{sums[m3]} = " + signed_sum([(p.sign, f"a{k} * x{p.m1}") for p in pairs], sums[m3])
            )
    elif path.block_x.l <= path.block_out.l:
        lines += [f"y{k}_{m}: T.let = w{k} * x{m}" for m in range(path.block_x.components)]
        for m3, pairs in by_out.items():
            products = [(p.sign, f"{symbol(p)} * y{k}_{p.m1}") for p in pairs]
            lines.append(f"{sums[m3]} = {signed_sum(products, sums[m3])}")
    else:
        for m3, pairs in by_out.items():
            inner = signed_sum([(p.sign, f"{symbol(p)} * x{p.m1}") for p in pairs])
            lines.append(f"{sums[m3]} = {sums[m3]} + w{k} * ({inner})")
    return lines


def _backward_group(
    problem: Problem, group: Sequence[PathTerms], widths: tuple[int, int], schedule: ConvSchedule
) -> list[str]:
    """All gradients of the paths of one input block over a chunk of the sender's edges.

    ``widths`` are the lanes of a register and of the widest partial sums of grad_sh.
    """
    block = group[0].path.block_x
    lanes, widest = _lanes(problem, block, widths[0]), widths[1]
    head = head_of_tile(problem, block.mul, lanes)
    components = range(block.components)
    columns = sorted({t.column for terms in group for t in terms.triples})
    slots = {c: vector("partial", grad_sh_slot(problem, c, widest, head), lanes) for c in columns}
    tile = [f"x{m}: T.let = {vector('x', _element(block, m, lanes), lanes, 'i')}" for m in components]
    tile += [f"s{c}_0: T.let = {slot}" for c, slot in slots.items()]
    sums: dict[int, list[str]] = {m: [] for m in components}
    version = dict.fromkeys(columns, 0)
    for k, terms in enumerate(group):
        tile += _backward_path(problem, terms, k, lanes, sums, schedule)
        tile += grad_sh_path(terms, k, version)
    for m, found in sums.items():
        if found:
            home = vector("grad_x", _element(block, m, lanes), lanes, "i")
            tile.append(f"{home} = {signed_sum([(1, term) for term in found], home)}")
    tile += [f"{slot} = s{c}_{version[c]}" for c, slot in slots.items()]
    return loop(f"t in T.serial({block.mul // lanes})", tile)


def _backward_path(
    problem: Problem,
    terms: PathTerms,
    k: int,
    lanes: int,
    sums: Mapping[int, list[str]],
    schedule: ConvSchedule,
) -> list[str]:
    """``H[m1]``, terms of grad_x, and grad_weight; leaves ``w``, ``g`` and ``y = w * x`` bound."""
    path = terms.path
    weight = f"{path.offset} + t * {lanes}"
    lines = [
        *_ahead("weight", weight, schedule.prefetch),
        *_ahead("grad_weight", weight, schedule.prefetch),
        f"w{k}: T.let = {_weight(terms, 'weight', weight, lanes)}",
    ]
    for m3 in range(path.block_out.components):
        place = _element(path.block_out, m3, lanes)
        lines += _ahead("grad", place, schedule.prefetch, "ahead_node[j]")
        lines.append(f"g{k}_{m3}: T.let = {vector('grad', place, lanes, 'node[j]')}")
    by_in: dict[int, list[Pair]] = {}
    for pair in terms.pairs:
        by_in.setdefault(pair.m1, []).append(pair)
    symbol = partial(_symbol, problem, path.block_x, lanes, schedule.chunk, place=_every_tile(path))
    symbols = {p: symbol(p) for p in terms.pairs}
    for m1, pairs in by_in.items():
        total = signed_sum([(p.sign, f"{symbols[p]} * g{k}_{p.m3}") for p in pairs])
        lines.append(f"h{k}_{m1}: T.let = {total}")
        sums[m1].append(f"w{k} * h{k}_{m1}")
    place, zero = _weight(terms, "grad_weight", weight, lanes), splat(literal(0.0), lanes)
    before = f"T.Select({splat('sweep == 1', lanes)}, {place}, {zero})"
    products = [(1, f"x{m1} * h{k}_{m1}") for m1 in by_in]
    if terms.half:
        unit = splat(literal(2.0**GRADIENT_EXPONENT), lanes)
        total = f'T.Cast("{many("float16", lanes)}", {before} + ({signed_sum(products)}) * {unit})'
    else:
        total = signed_sum(products, before)
    lines.append(f"{vector('grad_weight', weight, lanes, 'row[j]')} = {total}")
    return lines


def _weight(terms: PathTerms, buffer: str, place: str, lanes: int) -> str:
    """Weights of edge ``j``, or their gradient, as they are stored, in float32."""
    stored = vector(buffer, place, lanes, "row[j]")
    return f'T.Cast("{many("float32", lanes)}", {stored})' if terms.half else stored
