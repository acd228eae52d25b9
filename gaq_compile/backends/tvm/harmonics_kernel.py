"""Real spherical harmonics and their gradient on CPUs, vectorised over vectors.

The recursion over the degree of :mod:`...operators.harmonics`, unrolled into its nonzero constants. Rows
are handled in tiles, one per lane: a tile is transposed on the way in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from ...errors import IrrepsError
from ...ir.layout import blocks
from ...operators.harmonics import recursion, scale_factor
from .build import compile_kernel
from .emit import kernel_text, local, loop, signed_sum, vector
from .launch import Input, Launch, Output, always
from .row_kernel import LANES, Emitter, row_loop

_SMALLEST = 1e-12  # Å; shorter vectors are divided by this
_NONZERO = 1e-12  # recursion constants below are rounding of zero
_NORMALIZATIONS = ("norm", "component", "integral")


def lower_harmonics(irreps: str, normalize: bool, normalization: str, target: str) -> Launch:
    """The compiled harmonics, vec (N, 3) -> (N, sum(2l+1)), float32, contiguous.

    Args:
        irreps: the degrees, each of multiplicity 1.
        normalize: whether to divide vectors by their length first.
        normalization: ``"norm"``, ``"component"`` or ``"integral"``.
        target: a TVM target in JSON.

    Raises:
        IrrepsError: for a multiplicity other than 1 or an unknown normalization.
        LoweringError: if TVM rejects the kernel.
    """
    kernel = compile_kernel(harmonics_source(irreps, normalize, normalization), target)
    return Launch((Input(0, (3,)), Output(0, (harmonics_width(irreps, normalization),))), always(kernel))


def lower_harmonics_backward(irreps: str, normalize: bool, normalization: str, target: str) -> Launch:
    """The compiled gradient (grad (N, sum(2l+1)), vec (N, 3)) -> (N, 3); else :func:`lower_harmonics`."""
    kernel = compile_kernel(harmonics_backward_source(irreps, normalize, normalization), target)
    grad = Input(0, (harmonics_width(irreps, normalization),))
    return Launch((grad, Input(1, (3,)), Output(1, (3,))), always(kernel))


@lru_cache(maxsize=64)
def harmonics_source(irreps: str, normalize: bool, normalization: str) -> str:
    """TVMScript of ``main(vec, sh)``; arguments and errors as :func:`lower_harmonics`."""
    width = harmonics_width(irreps, normalization)
    e = Emitter(LANES)
    values = harmonics_values(e, _load(e, "tile_v", 3), irreps, normalize, normalization)
    e.lines += [f"{_lane('tile_out', column)} = {value}" for column, value in enumerate(values)]
    body = [local("tile_v", 3 * LANES), local("tile_out", max(1, width) * LANES)]
    body += [*_transpose_in("tile_v", "vec", 3), *e.lines, *_transpose_out("tile_out", "sh", width)]
    return kernel_text(
        [("vec", "n, 3", "float32"), ("sh", f"n, {width}", "float32")],
        row_loop(body, 3 + 3 * width, step=LANES),
    )


@lru_cache(maxsize=64)
def harmonics_backward_source(irreps: str, normalize: bool, normalization: str) -> str:
    """TVMScript of ``main(grad, vec, gvec)``; arguments and errors as :func:`lower_harmonics`."""
    width = harmonics_width(irreps, normalization)
    e = Emitter(LANES)

    def grad(column: int) -> str:
        return e.let(_lane("tile_g", column))

    out = harmonics_gradient(e, _load(e, "tile_v", 3), grad, irreps, normalize, normalization)
    e.lines += [f"{_lane('tile_out', i)} = {value}" for i, value in enumerate(out)]
    body = [local("tile_v", 3 * LANES), local("tile_g", max(1, width) * LANES), local("tile_out", 3 * LANES)]
    body += [*_transpose_in("tile_v", "vec", 3), *_transpose_in("tile_g", "grad", width)]
    body += [*e.lines, *_transpose_out("tile_out", "gvec", 3)]
    return kernel_text(
        [("grad", f"n, {width}", "float32"), ("vec", "n, 3", "float32"), ("gvec", "n, 3", "float32")],
        row_loop(body, 6 + 3 * width, step=LANES),
    )


def harmonics_width(irreps: str, normalization: str) -> int:
    """How many harmonics of a vector there are.

    Raises:
        IrrepsError: for a multiplicity other than 1 or an unknown normalization.
    """
    return sum(2 * l + 1 for l in _degrees(irreps, normalization))


def harmonics_values(
    e: Emitter, vec: list[str], irreps: str, normalize: bool, normalization: str
) -> list[str]:
    """Every harmonic of a vector, as expressions."""
    degrees = _degrees(irreps, normalization)
    v, _ = _unit(e, vec) if normalize else (vec, "")
    levels = _levels(e, v, max(degrees, default=0))
    scaled = ((value, e.number(scale_factor(l, normalization))) for l in degrees for value in levels[l])
    return [f"{value} * {factor}" for value, factor in scaled]


def harmonics_gradient(
    e: Emitter, vec: list[str], grad: Callable[[int], str], irreps: str, normalize: bool, normalization: str
) -> list[str]:
    """The gradient with respect to a vector's three components; ``grad`` gives that of a column."""
    degrees = _degrees(irreps, normalization)
    v, length = _unit(e, vec) if normalize else (vec, "")
    levels = _levels(e, v, max(degrees, default=0) - 1)
    grads = _grads_by_degree(e, degrees, grad)
    out = [e.number(0.0)] * 3
    for l, g in sorted(grads.items()):
        constants = recursion(l) * (l * scale_factor(l, normalization))
        for i in range(3):
            for m in range(2 * l - 1):
                terms = [
                    (1, f"{g[k]} * {e.number(float(constants[m, i, k]))}")
                    for k in range(2 * l + 1)
                    if abs(constants[m, i, k]) > _NONZERO
                ]
                if terms:
                    out[i] = e.let(f"{out[i]} + {levels[l - 1][m]} * ({signed_sum(terms)})")
    if normalize:
        along = e.let(" + ".join(f"{o} * {x}" for o, x in zip(out, v, strict=True)))
        out = [e.let(f"({o} - {x} * {along}) / {length}") for o, x in zip(out, v, strict=True)]
    return out


def _degrees(irreps: str, normalization: str) -> list[int]:
    if normalization not in _NORMALIZATIONS:
        raise IrrepsError(
            f"unknown normalization {normalization!r}", fix=f"use one of {', '.join(_NORMALIZATIONS)}"
        )
    found = blocks(irreps)
    if any(b.mul != 1 for b in found):
        raise IrrepsError("spherical harmonics have multiplicity 1", where=irreps)
    return [b.l for b in found]


def _grads_by_degree(e: Emitter, degrees: list[int], grad: Callable[[int], str]) -> dict[int, list[str]]:
    """The incoming gradients of each degree l >= 1, summed where a degree occurs twice."""
    found: dict[int, list[str]] = {}
    column = 0
    for l in degrees:
        here = [grad(column + k) for k in range(2 * l + 1)] if l else []
        column += 2 * l + 1
        if l:
            before = found.get(l)
            found[l] = [e.let(f"{a} + {b}") for a, b in zip(before, here, strict=True)] if before else here
    return found


def _levels(e: Emitter, v: list[str], lmax: int) -> list[list[str]]:
    """The solid harmonics of degree 0 to lmax, |Y_l| = |v|^l."""
    levels = [[e.number(1.0)]]
    for l in range(1, lmax + 1):
        constants = recursion(l)
        products = [[e.let(f"{below} * {x}") for x in v] for below in levels[-1]]
        levels.append(
            [
                e.let(
                    signed_sum(
                        [
                            (1, f"{products[m][i]} * {e.number(float(constants[m, i, k]))}")
                            for m in range(2 * l - 1)
                            for i in range(3)
                            if abs(constants[m, i, k]) > _NONZERO
                        ]
                    )
                )
                for k in range(2 * l + 1)
            ]
        )
    return levels


def _unit(e: Emitter, v: list[str]) -> tuple[list[str], str]:
    """The unit vectors and the lengths they were divided by."""
    square = e.let(" + ".join(f"{x} * {x}" for x in v))
    length = e.let(e.at_least(e.number(_SMALLEST), f"T.sqrt({square})"))
    return [e.let(f"{x} / {length}") for x in v], length


def _lane(tile: str, column: int) -> str:
    return vector(tile, str(column * LANES), LANES)


def _load(e: Emitter, tile: str, columns: int) -> list[str]:
    return [e.let(_lane(tile, c)) for c in range(columns)]


def _transpose_in(tile: str, buffer: str, columns: int) -> list[str]:
    """Rows i to i + 15 into ``tile``; lanes beyond the last row repeat it."""
    copies = [f"{tile}[{c * LANES} + j] = {buffer}[row, {c}]" for c in range(columns)]
    return loop(f"j in T.serial({LANES})", ["row: T.let = T.min(i + j, n - 1)", *copies])


def _transpose_out(tile: str, buffer: str, columns: int) -> list[str]:
    copies = [f"{buffer}[i + j, {c}] = {tile}[{c * LANES} + j]" for c in range(columns)]
    return loop(f"j in T.serial(T.min({LANES}, n - i))", copies) if copies else []
