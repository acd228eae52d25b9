"""Fused equivariant convolution on GPUs: gather, tensor product and scatter in one kernel.

    out[n] = sum over edges e with receiver n of TP(x[senders[e]], sh[e], weight[e])

A warp owns one node and 32 channels of one input block, a thread a channel, and visits the node's edges in
their sorted order: no atomics, and every run gives the same bits. Chunks of 32 edges first contract
their harmonics with the Clebsch-Gordan constants, once for all channels, into shared memory::

    A[m1, m3] = coefficient * sum_m2 C[m1, m2, m3] * sh[m2]        out[m3] += w * A[m1, m3] * x[m1]

with all sums in registers. The backward kernel owns a *sender*::

    H[m1] = sum_m3 A[m1, m3] * g[m3]      grad_x[m1] += w * H[m1]      grad_w = sum_m1 x[m1] * H[m1]

What an edge's harmonics feel is a sum over channels, of all warps: each adds up its own, by shuffles, and
writes it; a second kernel adds the warps' parts in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ....ir.layout import Block, blocks, dim
from ....ir.specs import tensor_product_spec
from ..conv_terms import Pair, PathTerms, Problem, conv_buffers, conv_problem, conv_width, weight_row
from ..emit import literal, loop, signed_sum
from .device import Gpu, empty
from .device import blocks as blocks_of
from .emit import SYNC, WARP, across_warp, branch, grid_text, local, shared

_CHUNK = 32  # edges whose harmonics are contracted together, one to a lane
_MOST_SUMS = 36  # of a forward thread, so that nothing leaves the registers
_THREADS = 256  # of the kernel that adds up what warps have found

Forward = Callable[[Tensor, Tensor, Tensor, list[Tensor]], Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, list[Tensor]], Gradients]


@dataclass(frozen=True)
class Group:
    """What one warp works on for 32 channels: the blocks it writes, and the paths that reach them.

    Attributes:
        blocks: of the output (forward) or of x (backward), all with as many channels.
        paths: every path to one of the blocks; none where a block stays zero.
        first: the first of its warps along y of the grid.
    """

    blocks: tuple[Block, ...]
    paths: tuple[PathTerms, ...]
    first: int = 0

    @property
    def channels(self) -> int:
        return self.blocks[0].mul

    @property
    def warps(self) -> int:
        return blocks_of(self.channels, WARP)

    @property
    def symbols(self) -> tuple[int, ...]:
        """The linear forms in the harmonics that some path needs."""
        return tuple(sorted({s for terms in self.paths for s in terms.symbols}))

    @property
    def sums(self) -> int:
        return sum(b.components for b in self.blocks)


def conv_forward(spec: str, gpu: Gpu) -> Forward:
    """The compiled convolution ``(x, sh, weight, edges) -> out``; arguments as the CPU's.

    Raises:
        IrrepsError: if the spec violates the selection rules.
        LoweringError: if TVM or nvcc rejects the kernel.
    """
    kernel = gpu.kernel(forward_text(spec))
    warps = _warps(forward_groups(spec))
    width = dim(tensor_product_spec(spec).irreps_out)

    def run(x: Tensor, sh: Tensor, weight: Tensor, edges: list[Tensor]) -> Tensor:
        out = empty(x, x.shape[0], width)
        given = {"x": x, "sh": sh, "weight": weight, "senders": edges[0], "ptr": edges[2], "order": edges[3]}
        kernel((x.shape[0], warps), {**given, **_sizes(x, sh, weight), "out": out})
        return out

    return run


def conv_backward(spec: str, gpu: Gpu) -> Backward:
    """The compiled gradient ``(grad, x, sh, weight, edges) -> (grad_x, grad_sh, grad_weight)``.

    The kernel finds every edge's gradient of the weights; where a bond has one row, both are added after it.
    """
    kernel, add = gpu.kernel(backward_text(spec)), gpu.kernel(add_text(spec))
    groups, columns = backward_groups(spec), len(conv_problem(spec).columns)

    def run(grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor, edges: list[Tensor]) -> Gradients:
        count = sh.shape[0]
        grad_x, grad_sh, grad_weight = (
            torch.empty_like(x),
            torch.empty_like(sh),
            empty(x, count, weight.shape[1]),
        )
        parts = empty(x, _adding(groups) * count * columns)
        given = {"grad": grad, "x": x, "sh": sh, "weight": weight, "receivers": edges[1]}
        order = {"ptr": edges[4], "order": edges[5], **_sizes(x, sh, weight)}
        results = {"grad_x": grad_x, "grad_weight": grad_weight, "parts": parts}
        kernel((x.shape[0], _warps(groups)), {**given, **order, **results})
        add((blocks_of(count, _THREADS), 1), {"parts": parts, "grad_sh": grad_sh, "edges": count})
        rows = weight.shape[0]
        together = grad_weight if rows == count else grad_weight[:rows] + grad_weight[rows:]
        return grad_x, grad_sh, together

    return run


def _sizes(x: Tensor, sh: Tensor, weight: Tensor) -> dict[str, int]:
    """What the call decides, by name: TVM hands on to the GPU what it cares for."""
    return {"nodes": x.shape[0], "edges": sh.shape[0], "rows": weight.shape[0]}


# Groups ----------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def forward_groups(spec: str) -> tuple[Group, ...]:
    """One group for each output block; those of one input block share its x, as far as registers go."""
    problem = conv_problem(spec)
    shared_x: dict[tuple[int, ...], list[Group]] = {}
    for block in blocks(problem.spec.irreps_out):
        paths = tuple(t for t in problem.terms if t.path.block_out == block)
        sources = tuple(sorted({t.path.block_x.base for t in paths}))
        alone = Group((block,), paths)
        alike = shared_x.setdefault((*sources, -block.mul), [])
        if paths and alike and alike[-1].sums + alone.sums <= _MOST_SUMS:
            alike[-1] = Group((*alike[-1].blocks, block), (*alike[-1].paths, *paths))
        else:
            alike.append(alone)
    return _placed([group for alike in shared_x.values() for group in alike])


@lru_cache(maxsize=256)
def backward_groups(spec: str) -> tuple[Group, ...]:
    """One group for each block of x."""
    problem = conv_problem(spec)
    return _placed(
        [
            Group((block,), tuple(t for t in problem.terms if t.path.block_x == block))
            for block in blocks(problem.spec.irreps_x)
        ]
    )


def _placed(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with their places along y; those without paths come last."""
    found: list[Group] = []
    for group in sorted(groups, key=lambda g: not g.paths):
        found.append(Group(group.blocks, group.paths, _warps(found)))
    return tuple(found)


def _warps(groups: Sequence[Group]) -> int:
    return sum(g.warps for g in groups)


def _adding(groups: Sequence[Group]) -> int:
    """Warps that add to the gradient of the harmonics."""
    return _warps([g for g in groups if g.paths])


# Text ------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def forward_text(spec: str) -> str:
    """TVMScript of ``main(x, sh, weight, senders, ptr, order, out)``."""
    problem, groups = conv_problem(spec), forward_groups(spec)
    body = _grouped(groups, [_forward(problem, group) for group in groups])
    buffers = conv_buffers(problem, "x", "sh", "weight", "senders", "ptr", "order", "out")
    body = [*_memory(groups), *body]
    return grid_text(buffers, body, blocks="nodes", threads=WARP, parts=_warps(groups))


@lru_cache(maxsize=256)
def backward_text(spec: str) -> str:
    """TVMScript of ``main(grad, x, sh, weight, receivers, ptr, order, grad_x, grad_weight, parts)``.

    ``parts`` (warps, edges, columns of sh that are used) is what each warp has found of the
    harmonics' gradient.
    """
    problem, groups = conv_problem(spec), backward_groups(spec)
    body = _grouped(groups, [_backward(problem, group) for group in groups])
    given = ("grad", "x", "sh", "weight", "receivers", "ptr", "order")
    buffers = conv_buffers(problem, *given, "grad_x")
    buffers.append(("grad_weight", f"edges, {conv_width(problem, 'weight')}", "float32"))
    buffers.append(("parts", "several", "float32"))
    body = [*_memory(groups), *body]
    return grid_text(buffers, body, blocks="nodes", threads=WARP, parts=_warps(groups))


@lru_cache(maxsize=256)
def add_text(spec: str) -> str:
    """TVMScript of ``main(parts, grad_sh)``: the warps' parts in order, an edge to a thread."""
    problem = conv_problem(spec)
    columns, warps = problem.columns, _adding(backward_groups(spec))
    lines = []
    for column in range(conv_width(problem, "sh")):
        if column not in columns:
            lines.append(f"grad_sh[e, {column}] = {literal(0.0)}")
            continue
        place = f"e * {len(columns)} + {columns.index(column)}"
        terms = [f"parts[edges * {warp * len(columns)} + {place}]" for warp in range(warps)]
        lines.append(f"grad_sh[e, {column}] = {' + '.join(terms)}")
    body = [f"e: T.let = bx * {_THREADS} + tx", *branch("e < edges", lines)]
    buffers = [("parts", "several", "float32"), *conv_buffers(problem, "grad_sh")]
    return grid_text(buffers, body, blocks=f"(edges + {_THREADS - 1}) // {_THREADS}", threads=_THREADS)


def _memory(groups: Sequence[Group]) -> list[str]:
    """What the lanes share: the chunk's edges, their other ends, and their contracted harmonics."""
    return [
        shared("edge", _CHUNK, "int32"),
        shared("node", _CHUNK, "int32"),
        shared("A", max(1, *(_stride(g) for g in groups)) * _CHUNK),
    ]


def _stride(group: Group) -> int:
    """Symbols of an edge in shared memory, whole vectors of four."""
    return -(-len(group.symbols) // 4) * 4


def _grouped(groups: Sequence[Group], bodies: Sequence[list[str]]) -> list[str]:
    """Each group's statements on its own warps."""
    lines: list[str] = []
    for group, body in zip(groups, bodies, strict=True):
        last = group.first + group.warps
        by = "by" if _warps(groups) > 1 else "0"
        own = [
            f"channel: T.let = ({by} - {group.first}) * {WARP} + tx",
            f"u: T.let = T.min(channel, {group.channels - 1})",
            *body,
        ]
        if _warps(groups) > 1:
            own = branch(f"{by} >= {group.first}", branch(f"{by} < {last}", own))
        lines += own
    return lines


def _forward(problem: Problem, group: Group) -> list[str]:
    sums = {
        (b.base, m): k for k, (b, m) in enumerate((b, m) for b in group.blocks for m in range(b.components))
    }
    lines = [local("sums", len(sums)), *(f"sums[{k}] = {literal(0.0)}" for k in sums.values())]
    edge: list[str] = []
    read = dict.fromkeys((t.path.block_x, m) for t in group.paths for m in range(t.path.block_x.components))
    edge += [f"x{b.base}_{m}: T.let = x[n, {b.base + m * b.stride} + u]" for b, m in read]
    for k, terms in enumerate(group.paths):
        held = {
            m: f"sums[{sums[terms.path.block_out.base, m]}]" for m in range(terms.path.block_out.components)
        }
        edge += _forward_path(terms, k, group, held)
    if group.paths:
        lines += _chunks(problem, group, "senders", edge)
    stores = [
        f"out[bx, {b.base + m * b.stride} + u] = sums[{sums[b.base, m]}]"
        for b in group.blocks
        for m in range(b.components)
    ]
    return lines + _valid(group, stores)


def _valid(group: Group, lines: Sequence[str]) -> list[str]:
    """Only for channels that there are: a warp may reach beyond the last."""
    return list(lines) if group.channels % WARP == 0 else branch(f"channel < {group.channels}", lines)


def _chunks(problem: Problem, group: Group, other: str, edge: Sequence[str]) -> list[str]:
    """``edge`` for every edge of node ``bx``: its number ``e``, its weights' ``row``, its place ``j`` in
    the chunk, its other end ``n``."""
    stage = ["mine: T.let = order[first + tx]", "edge[tx] = mine", f"node[tx] = {other}[mine]"]
    for k, symbol in enumerate(group.symbols):
        form = [(1, f"sh[mine, {column}] * {literal(value)}") for column, value in problem.symbols[symbol]]
        stage.append(f"A[tx * {_stride(group)} + {k}] = {signed_sum(form)}")
    ends = ["e: T.let = edge[j]", "n: T.let = node[j]", f"row: T.let = {weight_row('e')}"]
    chunk = [
        f"first: T.let = low + c * {_CHUNK}",
        f"count: T.let = T.min(high - first, {_CHUNK})",
        SYNC,
        *branch("tx < count", stage),
        SYNC,
        *loop("j in T.serial(count)", [*ends, *edge]),
    ]
    return [
        "low: T.let = ptr[bx]",
        "high: T.let = ptr[bx + 1]",
        *loop(f"c in T.serial((high - low + {_CHUNK - 1}) // {_CHUNK})", chunk),
    ]


def _symbol(group: Group, pair: Pair) -> str:
    return f"A[j * {_stride(group)} + {group.symbols.index(pair.symbol)}]"


def _by(pairs: Sequence[Pair], key: str) -> dict[int, list[Pair]]:
    found: dict[int, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(getattr(pair, key), []).append(pair)
    return found


def _forward_path(terms: PathTerms, k: int, group: Group, sums: dict[int, str]) -> list[str]:
    """One path on one edge, in the cheapest of three orders of multiplication."""
    path = terms.path
    x = {m: f"x{path.block_x.base}_{m}" for m in range(path.block_x.components)}
    lines = [f"w{k}: T.let = weight[row, {path.offset} + u]"]
    if len(terms.symbols) == 1:
        lines.append(f"a{k}: T.let = w{k} * {_symbol(group, terms.pairs[0])}")
        for m3, pairs in _by(terms.pairs, "m3").items():
            products = [(p.sign, f"a{k} * {x[p.m1]}") for p in pairs]
            lines.append(f"{sums[m3]} = {signed_sum(products, sums[m3])}")
    elif path.block_x.l <= path.block_out.l:
        lines += [f"y{k}_{m}: T.let = w{k} * {name}" for m, name in x.items()]
        for m3, pairs in _by(terms.pairs, "m3").items():
            products = [(p.sign, f"{_symbol(group, p)} * y{k}_{p.m1}") for p in pairs]
            lines.append(f"{sums[m3]} = {signed_sum(products, sums[m3])}")
    else:
        for m3, pairs in _by(terms.pairs, "m3").items():
            inner = signed_sum([(p.sign, f"{_symbol(group, p)} * {x[p.m1]}") for p in pairs])
            lines.append(f"{sums[m3]} = {sums[m3]} + w{k} * ({inner})")
    return lines


def _backward(problem: Problem, group: Group) -> list[str]:
    (block,) = group.blocks
    comps = range(block.components)
    columns = sorted({t.column for terms in group.paths for t in terms.triples})
    lines = [f"x{m}: T.let = x[bx, {block.base + m * block.stride} + u]" for m in comps]
    lines += [local("sums", len(comps)), *(f"sums[{m}] = {literal(0.0)}" for m in comps)]
    edge = [f"s{c} = {literal(0.0)}" for c in columns]
    for k, terms in enumerate(group.paths):
        edge += _backward_path(terms, k, group)
        edge += _harmonics_path(terms, k)
    stores = []
    for c in columns:
        if group.channels % WARP:
            edge.append(f"s{c} = T.Select(channel < {group.channels}, s{c}, {literal(0.0)})")
        edge += across_warp(f"s{c}", "float32", "{a} + {b}")
    by = "by" if _warps(backward_groups(str(problem.spec))) > 1 else "0"
    for place, c in enumerate(problem.columns):
        value = f"s{c}" if c in columns else literal(0.0)
        stores.append(f"parts[({by} * edges + e) * {len(problem.columns)} + {place}] = {value}")
    edge += branch("tx == 0", stores)
    if group.paths:
        lines += _chunks(problem, group, "receivers", edge)
    ends = [f"grad_x[bx, {block.base + m * block.stride} + u] = sums[{m}]" for m in comps]
    return lines + _valid(group, ends)


def _backward_path(terms: PathTerms, k: int, group: Group) -> list[str]:
    """``H[m1]``, then grad_x and grad_weight; leaves ``w`` and ``g`` bound."""
    path = terms.path
    lines = [f"w{k}: T.let = weight[row, {path.offset} + u]"]
    for m3 in range(path.block_out.components):
        place = path.block_out.base + m3 * path.block_out.stride
        lines.append(f"g{k}_{m3}: T.let = grad[n, {place} + u]")
    by_in = _by(terms.pairs, "m1")
    for m1, pairs in by_in.items():
        total = signed_sum([(p.sign, f"{_symbol(group, p)} * g{k}_{p.m3}") for p in pairs])
        lines.append(f"h{k}_{m1} = {total}")
        lines.append(f"sums[{m1}] = sums[{m1}] + w{k} * h{k}_{m1}")
    total = signed_sum([(1, f"x{m1} * h{k}_{m1}") for m1 in by_in]) or literal(0.0)
    return lines + _valid(group, [f"grad_weight[e, {path.offset} + u] = {total}"])


def _harmonics_path(terms: PathTerms, k: int) -> list[str]:
    """Add one path to the edge's harmonics' gradient; products with the same constant are summed first."""
    lines = [f"y{k}_{m}: T.let = w{k} * x{m}" for m in range(terms.path.block_x.components)]
    for column in sorted({t.column for t in terms.triples}):
        own = [t for t in terms.triples if t.column == column]
        for size in sorted({abs(t.value) for t in own}):
            products = [
                (1 if t.value > 0 else -1, f"y{k}_{t.m1} * g{k}_{t.m3}") for t in own if abs(t.value) == size
            ]
            lines.append(f"s{column} = s{column} + ({signed_sum(products)}) * {literal(size)}")
    return lines
