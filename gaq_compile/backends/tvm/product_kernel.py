"""The channelwise tensor product of per-row tensors and its gradients on CPUs.

    y[m3, u] += w[u] * A[m1, m3] * x[m1, u],   A[m1, m3] = coefficient * sum_m2 C[m1, m2, m3] * sh[m2]

One row after another, unrolled over nonzero constants and vectorised over channels; without the
gather and scatter that :mod:`.conv` fuses in. Results that no path reaches are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from ...ir.layout import Block, blocks, dim
from ...ir.specs import TensorProductSpec, tensor_product_spec
from .build import compile_kernel
from .conv_terms import Pair, PathTerms, Problem, conv_problem
from .emit import block_lanes, kernel_text, literal, local, signed_sum, splat, vector
from .launch import Input, Launch, Output, Part, always
from .row_kernel import LANES, Emitter, at, row_loop, tiled

Gradients = tuple[Tensor, Tensor, Tensor]


def lower_product(spec: str, target: str) -> Launch:
    """The compiled product (x (N, dim_x), sh (N, dim_sh), weight (N, weight_numel)) -> y (N, dim_out).

    Args:
        spec: a :class:`~gaq_compile.ir.specs.TensorProductSpec` string.
        target: a TVM target in JSON.

    Raises:
        IrrepsError: if the spec violates the selection rules.
        LoweringError: if TVM rejects the kernel.
    """
    *given, out = ((width,) for width in _widths(tensor_product_spec(spec)).values())
    parts: tuple[Part, ...] = (*(Input(k, row) for k, row in enumerate(given)), Output(0, out))
    return Launch(parts, always(compile_kernel(product_source(spec), target)))


def lower_product_backward(spec: str, target: str) -> Launch:
    """The compiled gradients (grad, x, sh, weight) -> (gx, gsh, gw); else as :func:`lower_product`."""
    *given, out = ((width,) for width in _widths(tensor_product_spec(spec)).values())
    tensors = [Input(k, row) for k, row in enumerate((out, *given))]
    made = [Output(k, row) for k, row in enumerate(given, start=1)]
    kernel = compile_kernel(product_backward_source(spec), target)
    return Launch((*tensors, *made), always(kernel), several=True)


@lru_cache(maxsize=256)
def product_source(spec: str) -> str:
    """TVMScript of ``main(x, sh, weight, y)``; arguments and errors as :func:`lower_product`."""
    work = sum(_widths(tensor_product_spec(spec)).values())
    return kernel_text(product_buffers(spec), row_loop(product_lines(spec, LANES), work))


def product_buffers(spec: str) -> list[tuple[str, str, str]]:
    """The parameters of :func:`product_source`."""
    widths = _widths(tensor_product_spec(spec))
    return [(name, f"n, {widths[name]}", "float32") for name in ("x", "sh", "weight", "y")]


def product_lines(spec: str, most: int) -> list[str]:
    """Statements on row ``i``, on at most so many channels at once."""
    problem = conv_problem(spec)
    body, written = _contract(problem), set[tuple[int, int]]()
    for k, terms in enumerate(problem.terms):
        body += _forward_path(terms, k, written, most)
    return body + _zero_rest("y", blocks(problem.spec.irreps_out), written, most)


@lru_cache(maxsize=256)
def product_backward_source(spec: str) -> str:
    """TVMScript of ``main(grad, x, sh, weight, gx, gsh, gw)``; else as :func:`product_source`."""
    work = 2 * sum(_widths(tensor_product_spec(spec)).values())
    return kernel_text(product_backward_buffers(spec), row_loop(product_backward_lines(spec, LANES), work))


def product_backward_buffers(spec: str) -> list[tuple[str, str, str]]:
    """The parameters of :func:`product_backward_source`."""
    widths = _widths(tensor_product_spec(spec))
    like = {"grad": "y", "x": "x", "sh": "sh", "weight": "weight", "gx": "x", "gsh": "sh", "gw": "weight"}
    return [(name, f"n, {widths[of]}", "float32") for name, of in like.items()]


def product_backward_lines(spec: str, most: int, own: Callable[[str, int], str] = local) -> list[str]:
    """Statements on row ``i``, on at most so many channels at once; ``own`` declares a small array."""
    problem = conv_problem(spec)
    widths = _widths(problem.spec)
    widest = max((_lanes(p.path.block_x, most) for p in problem.terms), default=1)
    places = {column: k * widest for k, column in enumerate(problem.columns)}
    zero = splat(literal(0.0), widest)
    body = _contract(problem)
    if places:
        body.append(own("sums", len(places) * widest))
        body += [f"{vector('sums', str(place), widest)} = {zero}" for place in places.values()]
    written = set[tuple[int, int]]()
    for k, terms in enumerate(problem.terms):
        body += _backward_path(terms, k, written, places, most)
    body += _zero_rest("gx", blocks(problem.spec.irreps_x), written, most)
    for column in range(widths["sh"]):
        lanes = range(widest) if column in places else ()
        total = [f"sums[{places[column] + lane}]" for lane in lanes]
        body.append(f"gsh[i, {column}] = {' + '.join(total) or literal(0.0)}")
    return body


def _widths(s: TensorProductSpec) -> dict[str, int]:
    return {"x": dim(s.irreps_x), "sh": dim(s.irreps_sh), "weight": s.weight_numel, "y": dim(s.irreps_out)}


def _lanes(block: Block, most: int) -> int:
    return block_lanes(block.mul, most)


def _contract(problem: Problem) -> list[str]:
    """``A`` of every distinct linear form in the row's harmonics."""
    return [
        f"A{k}: T.let = " + signed_sum([(1, f"sh[i, {column}] * {literal(value)}") for column, value in form])
        for k, form in enumerate(problem.symbols)
    ]


def _element(buffer: str, block: Block, component: int, lanes: int) -> str:
    return vector(buffer, at(block.base + component * block.stride, lanes), lanes, "i")


def _grouped(pairs: tuple[Pair, ...], key: str) -> dict[int, list[Pair]]:
    found: dict[int, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(getattr(pair, key), []).append(pair)
    return found


def _add(e: Emitter, home: str, value: str, fresh: bool) -> None:
    """``home = value`` for the first term that reaches it, ``home += value`` for later ones."""
    e.lines.append(f"{home} = {value}" if fresh else f"{home} = {home} + {value}")


def _forward_path(terms: PathTerms, k: int, written: set[tuple[int, int]], most: int) -> list[str]:
    """One instruction; ``written`` holds the (block, component) pairs of y that already have a value."""
    path, lanes = terms.path, _lanes(terms.path.block_x, most)
    e = Emitter(lanes, f"p{k}_")
    w = e.let(vector("weight", at(path.offset, lanes), lanes, "i"))
    used = {p.m1 for p in terms.pairs}
    x = {m: e.let(f"{w} * {_element('x', path.block_x, m, lanes)}") for m in sorted(used)}
    for m3, pairs in _grouped(terms.pairs, "m3").items():
        total = signed_sum([(p.sign, f"{x[p.m1]} * {splat(f'A{p.symbol}', lanes)}") for p in pairs])
        place = (path.block_out.base, m3)
        _add(e, _element("y", path.block_out, m3, lanes), f"({total})", place not in written)
        written.add(place)
    return tiled(path.block_x.mul, lanes, e.lines)


def _backward_path(
    terms: PathTerms, k: int, written: set[tuple[int, int]], places: dict[int, int], most: int
) -> list[str]:
    """One instruction's gradients; H[m1] = sum_m3 A[m1, m3] grad[m3] serves both x and w."""
    path, lanes = terms.path, _lanes(terms.path.block_x, most)
    e = Emitter(lanes, f"p{k}_")
    w = e.let(vector("weight", at(path.offset, lanes), lanes, "i"))
    x = [e.let(_element("x", path.block_x, m, lanes)) for m in range(path.block_x.components)]
    g = [e.let(_element("grad", path.block_out, m, lanes)) for m in range(path.block_out.components)]
    weight_terms = []
    for m1, pairs in _grouped(terms.pairs, "m1").items():
        bent = [(p.sign, f"{g[p.m3]} * {splat(f'A{p.symbol}', lanes)}") for p in pairs]
        h = e.let(signed_sum(bent))
        weight_terms.append((1, f"{x[m1]} * {h}"))
        place = (path.block_x.base, m1)
        _add(e, _element("gx", path.block_x, m1, lanes), f"{w} * {h}", place not in written)
        written.add(place)
    gw = signed_sum(weight_terms) or e.number(0.0)
    e.lines.append(f"{vector('gw', at(path.offset, lanes), lanes, 'i')} = {gw}")
    weighted = [e.let(f"{w} * {value}") for value in x]
    for column in sorted({t.column for t in terms.triples}):
        products = [
            (1, f"{weighted[t.m1]} * {g[t.m3]} * {e.number(t.value)}")
            for t in terms.triples
            if t.column == column
        ]
        home = vector("sums", str(places[column]), lanes)
        _add(e, home, f"({signed_sum(products)})", False)
    return tiled(path.block_x.mul, lanes, e.lines)


def _zero_rest(buffer: str, found: tuple[Block, ...], written: set[tuple[int, int]], most: int) -> list[str]:
    """Zero what no instruction has written."""
    lines: list[str] = []
    for block in found:
        lanes = _lanes(block, most)
        for c in range(block.components):
            if (block.base, c) not in written:
                zero = splat(literal(0.0), lanes)
                lines += tiled(block.mul, lanes, [f"{_element(buffer, block, c, lanes)} = {zero}"])
    return lines
