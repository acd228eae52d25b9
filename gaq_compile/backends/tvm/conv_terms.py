"""A convolution's tensor product, unrolled into its nonzero Clebsch-Gordan constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from e3nn.o3 import wigner_3j

from ...ir.layout import Block, blocks, dim
from ...ir.specs import TensorProductPath, TensorProductSpec, tensor_product_spec

_DIGITS = 12  # Clebsch-Gordan constants that agree to this many digits are the same number
_NONE = 1e-12  # and those below are zero

Form = tuple[tuple[int, float], ...]  # a linear form in sh: ((column, value), ...)


@dataclass(frozen=True)
class Triple:
    """One nonzero constant: ``value = coefficient * C[m1, m2, m3]``; ``column`` is m2's place in sh."""

    m1: int
    column: int
    m3: int
    value: float


@dataclass(frozen=True)
class Pair:
    """``A[m1, m3] = sign * symbol``; a symbol is one linear form in a chunk's harmonics."""

    m1: int
    m3: int
    symbol: int
    sign: int


@dataclass(frozen=True)
class PathTerms:
    """One instruction, unrolled into its nonzero constants; ``half``: its weights are float16."""

    path: TensorProductPath
    triples: tuple[Triple, ...]
    pairs: tuple[Pair, ...]
    half: bool = False

    @property
    def symbols(self) -> set[int]:
        return {pair.symbol for pair in self.pairs}


@dataclass(frozen=True)
class Problem:
    """A convolution with everything that its kernels need to know.

    ``symbols[k]`` is the linear form ``sum value * sh[column]`` as ``((column, value), ...)``.

    Attributes:
        heads: how often the terms are repeated (:func:`folded_problem`): blocks have so many equal parts, and
            each part harmonics of its own, ``step`` columns behind those of the part before.
    """

    spec: TensorProductSpec
    terms: tuple[PathTerms, ...]
    symbols: tuple[Form, ...]
    heads: int = 1
    step: int = 0

    @property
    def columns(self) -> tuple[int, ...]:
        """The columns of sh that some path reads."""
        return tuple(sorted({t.column for p in self.terms for t in p.triples}))

    @property
    def by_input(self) -> tuple[tuple[PathTerms, ...], ...]:
        """The paths grouped by their block of x."""
        groups: dict[int, list[PathTerms]] = {}
        for terms in self.terms:
            groups.setdefault(terms.path.block_x.base, []).append(terms)
        return tuple(tuple(group) for group in groups.values())


def conv_buffers(problem: Problem, *names: str) -> list[tuple[str, str, str]]:
    """Tensors of a convolution's kernels by name: name, shape, dtype.

    x, out, sh, weight and their gradients (``grad`` is out's); senders, receivers and ``order``, an entry for
    each edge; ``ptr``, where each node's edges begin.
    """
    return [(name, *_buffer(problem, name)) for name in names]


def _buffer(problem: Problem, name: str) -> tuple[str, str]:
    if name in ("senders", "receivers", "order"):
        return "edges", "int32"
    if name == "ptr":
        return "ends", "int32"
    tensor = "out" if name == "grad" else name.removeprefix("grad_")
    rows = {"weight": "rows", "sh": "edges"}.get(tensor, "nodes")
    half = tensor == "weight" and problem.spec.half
    return f"{rows}, {conv_width(problem, tensor)}", "float16" if half else "float32"


def weight_row(edge: str) -> str:
    """Where an edge's weights are: there is one row per edge, or one for an edge and its reverse."""
    return f"T.Select({edge} < rows, {edge}, {edge} - rows)"


def conv_width(problem: Problem, tensor: str) -> int:
    """Elements of a row of x, sh, weight or out."""
    return problem.spec.weight_numel if tensor == "weight" else dim(getattr(problem.spec, f"irreps_{tensor}"))


@lru_cache(maxsize=256)
def conv_problem(spec: str) -> Problem:
    """Unroll a :class:`TensorProductSpec` string into constants.

    Raises:
        IrrepsError: if the spec violates the selection rules.
    """
    parsed = tensor_product_spec(spec)
    return _unrolled(parsed, parsed.paths)


def _unrolled(spec: TensorProductSpec, paths: Sequence[TensorProductPath]) -> Problem:
    known: dict[Form, int] = {}
    terms = tuple(replace(_path_terms(path, known), half=spec.half) for path in paths)
    return Problem(spec, terms, tuple(known))


@lru_cache(maxsize=256)
def folded_problem(spec: str) -> Problem:
    """The same with paths that repeat for every head as one, of all heads' channels and the first's columns.

    Heads are parts of a block with harmonics of their own (:mod:`....passes.scale_harmonics`). As paths of
    their own they would be so many times the code.

    Raises:
        IrrepsError: if the spec violates the selection rules.
    """
    parsed = tensor_product_spec(spec)
    heads = _heads(parsed)
    if heads == 1:
        return conv_problem(spec)
    whole = []
    for first in parsed.paths[::heads]:
        x, out = (replace(b, mul=b.mul * heads) for b in (first.block_x, first.block_out))
        whole.append(replace(first, block_x=x, block_out=out))
    return replace(_unrolled(parsed, whole), heads=heads, step=dim(parsed.irreps_sh) // heads)


def _heads(spec: TensorProductSpec) -> int:
    """How many paths in a row are the same path of one head after another."""
    entries = spec.irreps_sh.split("+")
    for heads in range(len(entries), 1, -1):
        alike = entries == entries[: len(entries) // heads] * heads
        if alike and len(spec.paths) % heads == 0 and _repeats(spec, heads):
            return heads
    return 1


def _repeats(spec: TensorProductSpec, heads: int) -> bool:
    """Whether every path of head ``h`` is the first head's, ``h`` times its size further on."""
    step = dim(spec.irreps_sh) // heads
    for k, path in enumerate(spec.paths):
        first, h = spec.paths[k - k % heads], k % heads
        x, out = (_moved(b, h * b.mul, h * b.mul) for b in (first.block_x, first.block_out))
        sh = _moved(first.block_sh, h * step, h * (len(blocks(spec.irreps_sh)) // heads))
        if path != replace(first, block_x=x, block_out=out, block_sh=sh, offset=first.offset + h * x.mul):
            return False
    return True


def _moved(block: Block, base: int, channel: int) -> Block:
    return replace(block, base=block.base + base, channel=block.channel + channel)


def _path_terms(path: TensorProductPath, known: dict[Form, int]) -> PathTerms:
    sh = path.block_sh
    constants = wigner_3j(path.block_x.l, sh.l, path.block_out.l, dtype=torch.float64)
    triples: list[Triple] = []
    forms: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for m1, m2, m3 in constants.nonzero().tolist():
        constant = float(constants[m1, m2, m3])
        if abs(constant) > _NONE:
            value = float(f"{constant * path.coefficient:.{_DIGITS}g}")
            triple = Triple(m1, sh.base + m2 * sh.stride, m3, value)
            triples.append(triple)
            forms.setdefault((m1, m3), []).append((triple.column, value))
    pairs = []
    for (m1, m3), form in sorted(forms.items()):
        sign = 1 if form[0][1] > 0 else -1
        key = tuple((column, sign * value) for column, value in form)
        pairs.append(Pair(m1, m3, known.setdefault(key, len(known)), sign))
    return PathTerms(path, tuple(triples), tuple(pairs))
