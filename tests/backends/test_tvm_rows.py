"""Groups of row operators as kernels, against torch in float64.

Every check runs on several numbers of rows (tiles are 16 rows, many tiles run in parallel), on outputs
that begin as NaN, a second time after a run on NaN, and on a part of the rows: all must give the same bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("tvm")

from written_groups import WrittenGroup

from gaq_compile.backends.tvm import launch
from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.rows_kernel import lower_rows
from gaq_compile.backends.tvm.rows_operators import OPERATORS
from gaq_compile.backends.tvm.rows_plan import UnsupportedRowsError, kept_values, make_plan
from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.passes.fuse_rows import fuse_rows
from gaq_compile.passes.pack_rows import pack_rows
from gaq_compile.passes.row_groups import FusedRows, fused_rows
from gaq_compile.passes.row_shapes import PRIMES

aten, gaq = torch.ops.aten, torch.ops.gaq
ROWS = (0, 1, 15, 16, 17, 100, 2000)
ATOMS = 11
NARROW = ((), (1,), (3,), (2, 3))
WIDE = ((16,), (17,), (18,), (24,), (128,), (4, 32))
EXACT, CLOSE = (2e-7, 0.0), (5e-7, 1e-37)  # bounds: relative, and absolute
CASES: list[tuple[Any, tuple[Any, ...], tuple[float, float]]] = [
    (aten.abs.default, ("x",), EXACT),
    (aten.add.Tensor, ("x", "y"), EXACT),
    (aten.add.Tensor, ("x", 0.125), EXACT),
    (aten.clamp.default, ("x", -0.5, 0.25), EXACT),
    (aten.clamp.default, ("x", None, 0.25), EXACT),
    (aten.clamp.default, ("x", 0.25), EXACT),
    (aten.clamp.default, ("x", 1.0, -1.0), EXACT),
    (aten.clamp_min.default, ("x", 0), EXACT),
    (aten.div.Tensor, ("x", "y"), EXACT),
    (aten.div.Tensor, ("x", 3), EXACT),
    (aten.eq.Scalar, ("k", 1), EXACT),
    (aten.eq.Scalar, ("mask", 1), EXACT),
    (aten.ge.Scalar, ("k", 1), EXACT),
    (aten.gt.Scalar, ("k", 1), EXACT),
    (aten.le.Scalar, ("k", 1), EXACT),
    (aten.lt.Scalar, ("k", 1), EXACT),
    (aten.lt.Tensor, ("k", "y"), EXACT),
    (aten.logical_and.default, ("mask", "other"), EXACT),
    (aten.masked_fill.Scalar, ("x", "mask", -2.5), EXACT),
    (aten.mul.Scalar, ("x", 0.3), EXACT),
    (aten.mul.Tensor, ("x", "y"), EXACT),
    (aten.mul.Tensor, ("x", "mask"), EXACT),
    (aten.mul.Tensor, ("x", "x"), EXACT),
    (aten.neg.default, ("x",), EXACT),
    (aten.pow.Tensor_Scalar, ("p", 0.5), EXACT),
    (aten.pow.Tensor_Scalar, ("x", 0), EXACT),
    (aten.pow.Tensor_Scalar, ("x", 1), EXACT),
    (aten.pow.Tensor_Scalar, ("x", 2), EXACT),
    (aten.pow.Tensor_Scalar, ("x", 7), (1e-6, 0.0)),
    (aten.pow.Tensor_Scalar, ("x", -3), (1e-6, 0.0)),
    (aten.reciprocal.default, ("x",), EXACT),
    (aten.rsub.Scalar, ("x", 0.75), EXACT),
    (aten.sgn.default, ("k",), EXACT),
    (aten.sqrt.default, ("p",), EXACT),
    (aten.sub.Tensor, ("x", "y"), EXACT),
    (aten.sub.Tensor, ("x", 1), EXACT),
    (aten.where.self, ("mask", "x", "y"), EXACT),
    (aten.exp.default, ("x",), CLOSE),
]
# They take long to compile; narrow values are computed element by element.
FUNCTIONS: list[tuple[Any, tuple[Any, ...], tuple[float, float]]] = [
    (aten.cos.default, ("angle",), (1e-7, 2e-7)),
    (aten.erf.default, ("x",), (8e-7, 0.0)),
    (aten.log.default, ("p",), CLOSE),
    (aten.silu.default, ("x",), CLOSE),
    (aten.silu_backward.default, ("y", "x"), (5e-7, 2e-6)),
    (aten.sin.default, ("angle",), (1e-7, 2e-7)),
    (aten.softplus.default, ("x",), (1e-6, 0.0)),
]
POWERS: list[tuple[Any, tuple[Any, ...], tuple[float, float]]] = [
    (aten.pow.Tensor_Scalar, ("p", 1.7), (3e-6, 0.0)),
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class _Group(WrittenGroup):
    """A group with arguments of many kinds."""

    def argument(self, *row: int, holds: str = "normal") -> Node:
        """Rows of the group: "normal", "positive", "angle", "small" (whole numbers), "bool" or "index"."""
        types = {"bool": torch.bool, "index": torch.int64}
        return self.input(holds, row, (PRIMES["edge"], *row), types.get(holds, torch.float32))

    def fixed(self, *shape: int, holds: str = "fixed") -> Node:
        """The same for all rows, but known only at a call."""
        return self.input(holds, shape, shape, torch.bool if holds == "fixed bool" else torch.float32)

    def size(self) -> Node:
        """The number of rows."""
        return self.number("size", "edge")

    def parts(self, target: Any, *args: Any) -> list[Node]:
        node = self(target, *args)
        return [self(operator.getitem, node, k) for k in range(len(self.values[node]))]

    def inputs(self, n: int) -> list[Any]:
        generator = torch.Generator().manual_seed(n)
        return [_filled(holds, n, row, generator) for holds, row in self.made]

    def part(self, inputs: Sequence[Any], start: int) -> list[Any]:
        """The rows from ``start`` on."""
        own = ("table", "fixed", "fixed bool")
        return [
            x - start if holds == "size" else x if holds in own else x[start:].clone()
            for x, (holds, _) in zip(inputs, self.made, strict=True)
        ]


def _filled(holds: str, n: int, row: tuple[int, ...], generator: torch.Generator) -> Any:
    if holds == "size":
        return n
    shape = {"table": (ATOMS, *row), "fixed": row, "fixed bool": row}.get(holds, (n, *row))
    if holds == "index":
        return torch.randint(0, ATOMS, shape, generator=generator)
    if holds in ("bool", "fixed bool"):
        return torch.rand(shape, generator=generator) < 0.5
    value = torch.randn(shape, generator=generator)
    if holds == "positive":
        return (2 * value).exp()
    if holds == "small":
        return (value * 1.5).round()
    return value * 100 if holds == "angle" else value * 2


def _double(values: Sequence[Any]) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def _bits(values: Sequence[Tensor]) -> list[Tensor]:
    return [v.view(torch.int8 if v.dtype is torch.bool else torch.int32) for v in values]


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_bits(a), _bits(b), strict=True))


def _assert_close(got: Tensor, expected: Tensor, bound: tuple[float, float], what: object) -> None:
    """NaN and infinities in the same places, and finite numbers within relative + absolute error."""
    assert got.shape == expected.shape, what
    if expected.dtype is torch.bool:
        assert got.dtype is torch.bool and torch.equal(got, expected), what
        assert not got.numel() or int(got.view(torch.int8).max()) <= 1, what
        return
    assert got.dtype is torch.float32, what
    finite = expected.isfinite()
    assert torch.equal(got[~finite].nan_to_num(nan=7.0), expected[~finite].float().nan_to_num(nan=7.0)), what
    error = (got[finite].double() - expected[finite]).abs() - bound[0] * expected[finite].abs() - bound[1]
    assert not error.numel() or float(error.max()) <= 0, (what, float(error.max()))


def _check(
    group: _Group, *results: Node, bounds: Sequence[tuple[float, float]] = (), rows: Sequence[int] = ROWS
) -> None:
    """The kernel agrees with torch in float64, however many rows; its bits depend on nothing else.

    Without ``bounds``, errors are at most 3e-6 of the largest element.
    """
    fused = group.fused(*results)
    run = lower_rows(fused, host_target())[0]
    fused.double()
    for n in rows:
        inputs = group.inputs(n)
        got, expected = run(*inputs), fused(*_double(inputs))
        for k, (a, b) in enumerate(zip(got, expected, strict=True)):
            bound = bounds[k] if bounds else (0.0, 3e-6 * _largest(b))
            _assert_close(a, b, bound, (results[k].format_node(), n))
        bad = [
            x * math.nan if isinstance(x, Tensor) and x.is_floating_point() else ~x if _flags(x) else x
            for x in inputs
        ]
        run(*bad)
        assert _same(run(*inputs), got), "memory from before matters"
        if n > 20:
            assert _same(run(*group.part(inputs, 5)), [x[5:] for x in got]), "rows matter to one another"


def _largest(values: Tensor) -> float:
    """Of finite numbers."""
    finite = values[values.isfinite()].double()
    return float(finite.abs().max()) if finite.numel() else 0.0


def _flags(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool


def _elementwise(row: tuple[int, ...], cases: Sequence[Any]) -> None:
    g = _Group()
    kinds = {"x": "normal", "y": "normal", "p": "positive", "k": "small", "angle": "angle"}
    names = dict.fromkeys(a for _, args, _ in cases for a in args if isinstance(a, str))
    known = {name: g.argument(*row, holds=kinds.get(name, "bool")) for name in names}
    results = [g(t, *(known[a] if isinstance(a, str) else a for a in args)) for t, args, _ in cases]
    _check(g, *results, bounds=[bound for *_, bound in cases])


# --- elementwise operators -----------------------------------------------------------------------


def test_every_operator_has_a_case() -> None:
    known = {target for target, *_ in (*CASES, *FUNCTIONS, *POWERS)}
    assert known | {gaq.round_half.default} == set(OPERATORS)


@pytest.mark.parametrize("exponent", [0, 10])
@pytest.mark.parametrize("width", [1, 17, 24])
def test_halves_are_rounded_as_torch_rounds_them(width: int, exponent: int) -> None:
    """Every bit of any number: random ones, ties, what is too small and what is too large."""
    g = torch.Generator().manual_seed(width)
    any_bits = (
        torch.randint(-(2**31), 2**31, (4000 * width,), generator=g).to(torch.int32).view(torch.float32)
    )
    around = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = (around + torch.nextafter(around.half(), torch.tensor(math.inf).half()).float()) / 2
    some = torch.randn(16 * width, generator=g) * 2.0 ** torch.randint(-30, 20, (16 * width,), generator=g)
    x = torch.cat([any_bits, around, ties, torch.nextafter(ties, -ties), some])
    x = x[: len(x) // width * width].view(-1, width)
    group = _Group()
    fused = group.fused(group(gaq.round_half.default, group.argument(width), exponent, "conv"))
    (got,) = lower_rows(fused, host_target())[0](x)
    wanted = (2.0**exponent * x).half().float() / 2.0**exponent
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0.125), wanted.nan_to_num(0.125))


@pytest.mark.parametrize("row", NARROW + WIDE)
def test_plain_operators_are_exact_to_rounding(row: tuple[int, ...]) -> None:
    _elementwise(row, CASES)


@pytest.mark.parametrize("row", [(), (24,), (17,)])
def test_functions_are_as_exact_as_they_say(row: tuple[int, ...]) -> None:
    _elementwise(row, FUNCTIONS)


@pytest.mark.parametrize("row", [(), (24,)])
def test_powers_are_as_exact_as_their_logarithm(row: tuple[int, ...]) -> None:
    _elementwise(row, POWERS)


@pytest.mark.parametrize("exponent", [64, -64, 63])
def test_high_whole_powers_take_negative_numbers(exponent: int) -> None:
    g = _Group()
    x = g(aten.clamp.default, g.argument(20), -1.25, -0.75)
    _check(g, g(aten.pow.Tensor_Scalar, x, exponent), bounds=[(1e-5, 0.0)])


def _special(target: Any, values: Sequence[float], *args: Any, widths: Sequence[int] = (1, 17, 24)) -> None:
    """One operator on given numbers, narrow, in vectors and one by one; as torch in float32 has it."""
    for width in widths:
        g = _Group()
        fused = g.fused(g(target, g.argument(width), *args))
        x = torch.tensor(values).unsqueeze(1).expand(-1, width).contiguous()
        (got,), (expected,) = lower_rows(fused, host_target())[0](x), fused(x)
        _assert_close(got, expected.double() if expected.is_floating_point() else expected, (3e-6, 2e-38), x)


def test_log_of_zero_and_negative_numbers() -> None:
    _special(aten.log.default, (0.0, -0.0, -1.0, -1e-30, -math.inf, 1.0))


def test_log_keeps_nan_and_infinity() -> None:
    _special(aten.log.default, (math.nan, math.inf))


NAMES = ("exp", "sin", "erf", "softplus", "silu", "sqrt", "neg", "abs", "reciprocal")


@pytest.mark.parametrize("name", NAMES)
def test_functions_keep_nan(name: str) -> None:
    _special(getattr(aten, name).default, (math.nan, 0.5))


def test_exp_overflows_where_it_says() -> None:
    _special(aten.exp.default, (88.0, 88.3, 89.5, math.inf, -80.0, -math.inf))


def test_powers_of_zero_and_of_negative_numbers() -> None:
    _special(aten.pow.Tensor_Scalar, (0.0, -1.5, 2.0, math.inf), 1.5, widths=(24,))
    _special(aten.pow.Tensor_Scalar, (0.0, -1.5, 2.0), 66, widths=(24,))


def test_clamp_and_comparisons_of_nan() -> None:
    _special(aten.clamp.default, (math.nan, math.inf, -math.inf), -1.0, 1.0)
    _special(aten.clamp_min.default, (math.nan, -3.0), 0.0)
    _special(aten.ge.Scalar, (math.nan, 0.0, 1.0), 0.0)


@pytest.mark.parametrize("width", [2, 17, 24])
def test_where_ignores_nan_in_the_branch_not_taken(width: int) -> None:
    g = _Group()
    x = g.argument(width)
    root = g(aten.sqrt.default, x)
    positive, zero = g(aten.ge.Scalar, x, 0.0), g.constant(torch.tensor(0.0))
    chosen = g(aten.where.self, positive, root, zero)
    filled = g(aten.masked_fill.Scalar, root, g(aten.lt.Scalar, x, 0.0), 0.0)
    _check(g, root, chosen, filled, positive)


@pytest.mark.parametrize("width", [3, 24])
def test_infinity_can_be_filled_in(width: int) -> None:
    g = _Group()
    x, mask = g.argument(width), g.argument(width, holds="bool")
    infinite = g.constant(torch.tensor(math.inf))
    _check(g, g(aten.masked_fill.Scalar, x, mask, -math.inf), g(aten.where.self, mask, x, infinite))


@pytest.mark.parametrize("function", [lambda a, b: (a > 0) + (b > 0), lambda a, b: torch.logical_and(a, b)])
def test_sums_and_truth_that_zeros_and_ones_do_not_hold_stay_with_torch(function) -> None:
    gm = make_fx(lambda v: function(v, v * 2.0), tracing_mode="symbolic")(torch.randn(4, 3))
    next(iter(gm.graph.nodes)).target = "edge_vec"
    grouped = fuse_rows(gm, GraphFormat(("edge_vec",), 5.0))
    left = [n.target for n in grouped.graph.nodes]
    assert aten.add.Tensor in left or aten.logical_and.default in left


@pytest.mark.parametrize(
    ("target", "numbers"), [(aten.softplus.default, (2.0, 20.0)), (aten.rsub.Scalar, (2.0, 3))]
)
def test_further_arguments_are_refused(target, numbers) -> None:
    g = _Group()
    with pytest.raises(UnsupportedRowsError, match="arguments"):
        lower_rows(g.fused(g(target, g.argument(3), *numbers)), host_target())[0]


# --- broadcasting --------------------------------------------------------------------------------


def test_columns_meet_rows() -> None:
    g = _Group()
    column, wide, heads, parts, one = (g.argument(*r) for r in ((1,), (128,), (4, 1), (4, 32), (1, 32)))
    doubled = g(aten.add.Tensor, column, column)
    _check(
        g,
        g(aten.mul.Tensor, column, wide),
        g(aten.sub.Tensor, doubled, wide),
        g(aten.div.Tensor, parts, heads),
        g(aten.add.Tensor, g(aten.neg.default, heads), parts),
        g(aten.mul.Tensor, heads, one),
        g(aten.mul.Tensor, one, parts),
    )


@pytest.mark.parametrize("row", [(3,), (128,), (4, 32), (2, 3)])
def test_constants_meet_rows(row: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    g = _Group()
    x = g.argument(*row)
    results = []
    for shape in ((), (1,), (1,) * (len(row) + 1), row[-1:], (1, *row), row, (*row[:-1], 1)):
        c = g.constant(torch.randn(shape))
        results += [g(aten.mul.Tensor, x, c), g(aten.sub.Tensor, c, x)]
        if math.prod(shape) > 1:
            results.append(g(aten.add.Tensor, x, g.fixed(*shape)))
    _check(g, *results, rows=(0, 1, 17, 100))


def test_constants_meet_rows_without_axes() -> None:
    g = _Group()
    x, c, d = g.argument(), g.constant(torch.tensor(1.5)), g.constant(torch.tensor([2.5]))
    _check(g, g(aten.mul.Tensor, x, c), g(aten.sub.Tensor, d, x), g(aten.add.Tensor, x, g.fixed(1)))


def test_whole_numbers_are_constants_too() -> None:
    g = _Group()
    x, c = g.argument(4), g.constant(torch.tensor([1, 2, 3, 5]))
    _check(g, g(aten.mul.Tensor, x, c))


def test_a_single_number_can_be_an_argument() -> None:
    g = _Group()
    x, y, c = g.argument(3), g.argument(24), g.fixed()
    _check(g, g(aten.mul.Tensor, x, c), g(aten.mul.Tensor, y, c))


def test_flags_can_be_the_same_for_all_rows() -> None:
    g = _Group()
    x, y = g.argument(3), g.argument(24)
    m, w = g.fixed(3, holds="fixed bool"), g.fixed(24, holds="fixed bool")
    _check(g, g(aten.masked_fill.Scalar, y, w, 0.5), g(aten.masked_fill.Scalar, x, m, 0.5))


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [(6,), (2, 6), (48,), (4, 32), (20, 2)])
def test_slices(row: tuple[int, ...]) -> None:
    g = _Group()
    x = g.argument(*row)
    y = g(aten.neg.default, x)
    end, last = 2**63 - 1, len(row)
    results = []
    for v in (x, y):
        for args in ((-1, 1), (-1, 1, 2), (-1, 1, end), (-1, -1, end), (last, 0, -1), (1, 1, 2)):
            results.append(g(aten.slice.Tensor, v, *args))
    results += [g(aten.mul.Tensor, results[1], results[-5]), g(aten.mul.Tensor, results[2], results[8])]
    twice = g(aten.slice.Tensor, g(aten.slice.Tensor, y, -1, 1), -1, 0, 1)
    _check(g, *results, twice, g(aten.exp.default, twice), rows=(0, 1, 17, 100))


@pytest.mark.parametrize("row", [(3,), (32,)])
def test_axes_come_and_go(row: tuple[int, ...]) -> None:
    g = _Group()
    x = g.argument(*row)
    y = g(aten.mul.Tensor, x, 2.0)
    results = []
    for v in (x, y):
        for axis in (1, 2, -1, -2):
            longer = g(aten.unsqueeze.default, v, axis)
            results += [longer, g(aten.squeeze.dim, longer, axis), g(aten.exp.default, longer)]
        results.append(g(aten.squeeze.dim, v, 1))
        outer = g(aten.mul.Tensor, g(aten.unsqueeze.default, v, 1), g(aten.unsqueeze.default, v, 2))
        results.append(outer)
    _check(g, *results, rows=(0, 1, 17, 100))


@pytest.mark.parametrize("sizes", [(2, 3), (4, 32), (32, 4), (1, 24)])
def test_copies_of_expanded_rows(sizes: tuple[int, int]) -> None:
    a, b = sizes
    g = _Group()
    results = []
    for v in (g.argument(a, 1), g(aten.abs.default, g.argument(a, 1))):
        spread = g(aten.expand.default, v, [-1, a, b])
        copy = g(aten.clone.default, spread)
        flat = g(aten._unsafe_view.default, copy, [-1, a * b])
        results += [spread, flat, g(aten.view.default, g(aten.neg.default, spread), [-1, a * b])]
        results += [g(aten.mul.Tensor, flat, g.argument(a * b)), g(aten.reshape.default, spread, [-1, b, a])]
    _check(g, *results)


def test_rows_in_other_shapes() -> None:
    g = _Group()
    x, small = g.argument(4, 32), g.argument(2, 3)
    flat = g(aten.view.default, g(aten.abs.default, x), [-1, 128])
    _check(
        g,
        flat,
        g(aten.neg.default, flat),
        g(aten.reshape.default, x, [-1, 2, 64]),
        g(aten.exp.default, g(aten.reshape.default, g(aten.slice.Tensor, x, 2, 4, 20), [-1, 64])),
        g(aten.view.default, small, [-1, 6]),
        g(aten.neg.default, g(aten.view.default, small, [-1, 3, 2])),
        g(aten.reshape.default, g(aten.slice.Tensor, small, 2, 1), [-1, 4]),
    )


@pytest.mark.parametrize("sizes", [(2, 1, 3), (16, 32, 80), (1, 17, 2)])
def test_splits(sizes: tuple[int, ...]) -> None:
    g = _Group()
    x = g.argument(sum(sizes))
    parts = g.parts(aten.split_with_sizes.default, x, list(sizes), -1)
    more = g.parts(aten.split_with_sizes.default, g(aten.neg.default, x), list(sizes), 1)
    again = g(aten.cat.default, [more[2], more[0], parts[1]], 1)
    _check(g, *parts, *(g(aten.mul.Tensor, a, b) for a, b in zip(parts, more, strict=True)), again)


def test_a_constant_spread_over_rows_keeps_its_place_in_other_shapes() -> None:
    torch.manual_seed(2)
    g = _Group()
    n, x = g.size(), g.argument(32)
    column, row = g.constant(torch.randn(32, 1)), g.constant(torch.randn(1, 8))
    squeezed = g(aten.squeeze.dim, g(aten.expand.default, column, [n, 32, 1]), -1)
    flat = g(aten.reshape.default, g(aten.expand.default, row, [n, 4, 8]), [-1, 32])
    _check(g, g(aten.add.Tensor, x, squeezed), g(aten.mul.Tensor, x, flat))


@pytest.mark.parametrize("sizes", [(2, 3), (4, 8)])
def test_a_number_spread_over_rows_keeps_its_value_in_other_shapes(sizes: tuple[int, int]) -> None:
    a, b = sizes
    g = _Group()
    n, x, one = g.size(), g.argument(a * b), g.constant(torch.tensor(1.5))
    flat = g(aten.reshape.default, g(aten.expand.default, one, [n, a, b]), [-1, a * b])
    _check(g, g(aten.add.Tensor, x, flat))


@pytest.mark.parametrize("width", [3, 32])
def test_constants_spread_over_rows(width: int) -> None:
    g = _Group()
    n, x = g.size(), g.argument(width)
    one, row = g.constant(torch.tensor(1.5)), g.constant(torch.arange(float(width)).unsqueeze(0))
    spread = [g(aten.expand.default, c, [n, width]) for c in (one, row)]
    results = [g(aten.mul.Tensor, x, s) for s in spread]
    _check(g, *spread, *results, *(g(aten.sum.dim_IntList, s, [-1]) for s in spread))


def test_a_group_of_constants_only_is_refused() -> None:
    g = _Group()
    spread = g(aten.expand.default, g.constant(torch.tensor([[1.0, 2.0, 3.0]])), [g.size(), 3])
    with pytest.raises(UnsupportedRowsError, match="how many rows"):
        lower_rows(g.fused(g(aten.mul.Tensor, spread, 2.0)), host_target())[0]


def test_more_rows_than_indices_can_count_go_in_stretches(monkeypatch) -> None:
    g = _Group()
    x, y = g.argument(24), g.argument()
    wide = g(aten.mul.Tensor, x, g(aten.unsqueeze.default, y, 1))
    fused = g.fused(wide, g(aten.exp.default, y))
    x, y = torch.randn(100, 24), torch.randn(100)
    whole = lower_rows(fused, host_target())[0](x, y)
    monkeypatch.setattr(launch, "MAX_ELEMENTS", 24 * 33)
    parts = lower_rows(fused, host_target())[0](x, y)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


# --- joined rows ---------------------------------------------------------------------------------


def test_joined_rows() -> None:
    g = _Group()
    a, b, wide, flags = g.argument(1), g.argument(3), g.argument(24), g.argument(2, holds="bool")
    c, more = g(aten.neg.default, b), g(aten.abs.default, wide)
    middle = g(aten.slice.Tensor, wide, 1, 3, 9)
    lists = [[a, b], [b, c, a], [c, c], [wide, more], [more, a, wide, c], [b, middle, b], [more, more]]
    lists += [[flags, a], [flags, wide], [a, a, b, c, b, c, b, c]]
    joined = [g(aten.cat.default, parts, 1 - 2 * (k % 2)) for k, parts in enumerate(lists)]
    _check(g, *joined, *(g(aten.mul.Tensor, j, 3.0) for j in joined))


def test_rows_joined_along_inner_axes() -> None:
    g = _Group()
    a, b, small = g.argument(4, 8), g.argument(4, 24), g.argument(1, 3)
    c, column = g(aten.neg.default, a), g(aten.exp.default, g.argument(4, 1))
    _check(
        g,
        g(aten.cat.default, [a, b, c], 2),
        g(aten.cat.default, [a, c], 1),
        g(aten.cat.default, [b, column, a], -1),
        g(aten.cat.default, [small, g(aten.neg.default, small)], 1),
    )


@pytest.mark.parametrize("width", [3, 20])
def test_joined_flags(width: int) -> None:
    g = _Group()
    flags, x = g.argument(width, holds="bool"), g.argument(width)
    _check(g, g(aten.cat.default, [flags, g(aten.lt.Scalar, x, 0.0)], 1))


# --- sums and products ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", [(1,), (3,), (2, 3), (16,), (17,), (24,), (128,), (4, 32), (32, 4), (20, 1)])
def test_sums(row: tuple[int, ...]) -> None:
    g = _Group()
    x = g.argument(*row)
    y = g(aten.mul.Tensor, x, x)
    results = []
    for v in (x, y):
        for axes in ([-1], list(range(1, len(row) + 1))) if row[-1] > 1 else ([1],):
            results += [g(aten.sum.dim_IntList, v, axes, keep) for keep in (True, False)]
    if math.prod(row) < 16 and len(row) > 1:
        results.append(g(aten.sum.dim_IntList, y, [1]))
    scaled = [g(aten.mul.Tensor, y, r) for r in results if len(g.shapes[r].row) == len(row)]
    _check(g, *results, *scaled)


def test_sums_of_slices_and_expanded_rows() -> None:
    g = _Group()
    wide, heads = g.argument(40), g.argument(4, 1)
    y = g(aten.abs.default, wide)
    spread = g(aten.mul.Tensor, g(aten.expand.default, heads, [-1, 4, 32]), g.argument(4, 32))
    _check(
        g,
        g(aten.sum.dim_IntList, g(aten.slice.Tensor, y, 1, 3, 27), [1]),
        g(aten.sum.dim_IntList, g(aten.slice.Tensor, wide, 1, 3, 8), [1], True),
        g(aten.sum.dim_IntList, g(aten.expand.default, heads, [-1, 4, 32]), [2]),
        g(aten.sum.dim_IntList, spread, [-1], True),
    )


def test_products_with_constant_matrices() -> None:
    torch.manual_seed(3)
    g = _Group()
    results = []
    for a, b in ((24, 4), (4, 24), (3, 5), (24, 1), (1, 24), (15, 15), (17, 3), (3, 17), (1, 3)):
        matrix, x = g.constant(torch.randn(a, b)), g.argument(a)
        y = g(aten.abs.default, x)
        results += [g(aten.mm.default, x, matrix), g(aten.mm.default, y, matrix)]
        results.append(g(aten.neg.default, results[-1]))
        cut = g(aten.slice.Tensor, g.argument(a + 20), 1, 7, 7 + a)
        results.append(g(aten.mm.default, cut, matrix))
    results.append(g(aten.mm.default, g.argument(24), g.fixed(24, 2)))
    _check(g, *results)


# --- gathers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [(3,), (24,), (2, 3), (4, 32)])
def test_gathered_rows(row: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    g = _Group()
    table, constant = g.table(*row), g.constant(torch.randn(ATOMS, *row))
    senders, receivers = g.argument(holds="index"), g.argument(holds="index")
    a, b = g(aten.index.Tensor, table, [senders]), g(aten.index.Tensor, table, [receivers])
    c, d = g(aten.index_select.default, table, 0, senders), g(aten.index.Tensor, constant, [receivers])
    results = [a, d, g(aten.sub.Tensor, a, b), g(aten.mul.Tensor, c, d), g(aten.sum.dim_IntList, b, [-1])]
    results.append(g(aten.slice.Tensor, b, -1, 1))
    if len(row) == 1:
        e = g(aten.embedding.default, constant, senders)
        results += [g(aten.mul.Tensor, e, g.argument(*row)), g(aten.cat.default, [a, b, e], 1)]
    _check(g, *results)


def test_gathered_numbers() -> None:
    torch.manual_seed(5)
    g = _Group()
    table, constant, index = g.table(), g.constant(torch.randn(ATOMS)), g.argument(holds="index")
    a, b = g(aten.gather.default, table, 0, index), g(aten.gather.default, constant, 0, index)
    c, wide = g(aten.index.Tensor, table, [index]), g.argument(24)
    column = g(aten.unsqueeze.default, g(aten.add.Tensor, a, c), 1)
    _check(g, g(aten.mul.Tensor, a, b), c, g(aten.mul.Tensor, column, wide))


def test_a_table_can_be_a_matrix_too() -> None:
    g = _Group()
    x, index, matrix = g.argument(4), g.argument(holds="index"), g.constant(torch.randn(ATOMS, 4))
    left = g(aten.mm.default, x, g.constant(torch.randn(4, 4)))
    taken = g(aten.embedding.default, matrix, index)
    with suppress(UnsupportedRowsError):  # torch may run it
        _check(g, left, taken, g(aten.mm.default, g.argument(ATOMS), matrix))


# --- groups --------------------------------------------------------------------------------------


def test_several_results_of_one_value_and_views_of_arguments() -> None:
    g = _Group()
    x, wide, flags = g.argument(3), g.argument(32), g.argument(3, holds="bool")
    y, z = g(aten.exp.default, x), g(aten.neg.default, wide)
    less = g(aten.lt.Scalar, wide, 0.0)
    total = g(aten.sum.dim_IntList, z, [1], True)
    reshaped = g(aten.view.default, z, [-1, 4, 8])
    views = [g(aten.slice.Tensor, x, 1, 1), g(aten.view.default, wide, [-1, 2, 16])]
    views.append(g(aten.unsqueeze.default, flags, 1))
    _check(g, y, y, z, reshaped, z, less, less, total, total, *views, views[0])


@pytest.mark.parametrize("row", [(24,), (4, 32), (5,)])
def test_sums_feed_wide_values_again(row: tuple[int, ...]) -> None:
    g = _Group()
    x = g.argument(*row)
    raised = g(aten.exp.default, g(aten.clamp.default, x, -3.0, 3.0))
    total = g(aten.sum.dim_IntList, raised, [-1], True)
    share = g(aten.div.Tensor, raised, total)
    grad = g(aten.mul.Tensor, share, g.argument(*row))
    mean = g(aten.sum.dim_IntList, grad, [-1], True)
    back = g(aten.sub.Tensor, grad, g(aten.mul.Tensor, share, mean))
    bounds = [(0.0, 3e-6), (0.0, 3e-6), (0.0, 1e-5)]  # the last is zero but for rounding
    _check(g, back, share, g(aten.sum.dim_IntList, back, [-1]), bounds=bounds)


@pytest.mark.parametrize("width", [2, 24])
def test_long_chains(width: int) -> None:
    g = _Group()
    x = first = g.argument(width)
    for k in range(10):
        x = g(aten.add.Tensor, x, first) if k % 2 else g(aten.clamp.default, x, -1.5, 2.0)
        x = g(aten.mul.Tensor, x, 0.75)
    _check(g, x)


@pytest.mark.timeout(15)
def test_chains_of_functions_on_wide_rows_compile_soon() -> None:
    g = _Group()
    x = first = g.argument(20)
    for _ in range(3):
        x = g(aten.mul.Tensor, first, g(aten.silu.default, x))
    _check(g, x)


def test_rows_of_many_elements() -> None:
    g = _Group()
    x, column = g.argument(2048), g.argument(1)
    y = g(aten.mul.Tensor, x, column)
    for _ in range(4):
        y = g(aten.div.Tensor, y, g(aten.sum.dim_IntList, g(aten.abs.default, y), [1], True))
    _check(g, y, rows=(1, 40))


def test_more_rows_than_one_block() -> None:
    g = _Group()
    x = g.argument(3)
    y = g(aten.mul.Tensor, x, 2.0)
    _check(g, y, g(aten.sum.dim_IntList, y, [1]), rows=(20011,))


# --- passes --------------------------------------------------------------------------------------


FORM = GraphFormat(("numbers", "edge_vec", "receivers", "senders", "batch", "ptr"), 5.0, elements=(1, 6, 8))


def _model(dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(6)
    table, mix, narrow = (torch.randn(s, generator=generator).to(dtype) for s in ((9, 24), (24, 4), (4, 24)))
    centers = torch.linspace(0.5, 4.0, 24, dtype=dtype)

    def energies(numbers: Any, vec: Any, receivers: Any, senders: Any, batch: Any, ptr: Any) -> Any:
        length = vec.pow(2).sum(-1, keepdim=True).sqrt()
        unit, radial = vec / length, torch.exp(-((length - centers) ** 2))
        scalars = table[numbers]
        message = scalars[senders] * radial * (scalars[receivers] @ mix @ narrow)
        cut = torch.where(length < 4.0, 1 - length / 4.0, torch.zeros_like(length))
        summed = torch.zeros(numbers.shape[0], 24, dtype=dtype).index_add(0, receivers, message * cut)
        vector = torch.zeros(numbers.shape[0], 3, dtype=dtype).index_add(0, senders, unit * cut)
        atoms = (torch.sin(summed / 10) @ mix).sum(-1) + vector.pow(2).sum(-1)
        return torch.zeros(ptr.shape[0] - 1, dtype=dtype).index_add(0, batch, atoms)

    def model(numbers: Any, vec: Any, *rest: Any) -> Any:
        with torch.enable_grad():
            moved = vec.detach().requires_grad_(True)
            energy = energies(numbers, moved, *rest)
            (force,) = torch.autograd.grad(energy.sum(), moved)
        return energy.detach(), force

    return model


def _structure(edges: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(edges)
    ends = torch.randint(0, ATOMS, (2, edges), generator=generator)
    numbers = torch.tensor([1, 6, 8])[torch.randint(0, 3, (ATOMS,), generator=generator)]
    vec = torch.randn(edges, 3, generator=generator) * 2
    batch, ptr = torch.tensor([0] * 5 + [1] * (ATOMS - 5)), torch.tensor([0, 5, ATOMS])
    return [numbers, vec, ends[0], ends[1], batch, ptr]


@pytest.mark.parametrize("packed", [False, True])
def test_energies_and_forces_of_a_model_in_groups(packed: bool) -> None:
    traced = make_fx(_model(torch.float32), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        *_structure(40)
    )
    for node, name in zip([n for n in traced.graph.nodes if n.op == "placeholder"], FORM.inputs, strict=True):
        node.target = name
        node.name = name
    traced.recompile()
    gm = fuse_rows(traced, FORM)
    gm = pack_rows(gm) if packed else gm
    groups = {str(node.target): fused for node in gm.graph.nodes if (fused := fused_rows(gm, node))}
    assert {fused.rows for fused in groups.values()} >= {"edge", "atom"}
    structures = [_structure(edges) for edges in (40, 1, 3000)]
    in_torch = [gm(*s) for s in structures]
    for name, fused in groups.items():
        setattr(gm, name, _Kernel(fused))
    for structure, grouped in zip(structures, in_torch, strict=True):
        expected, got = _model(torch.float64)(*_double(structure)), gm(*structure)
        for a, b, c in zip(got, grouped, expected, strict=True):
            bound = (0.0, 1e-5 * _largest(c))
            _assert_close(b, c, bound, "groups run by torch")
            _assert_close(a, c, bound, "groups run by kernels")


class _Kernel(nn.Module):
    def __init__(self, fused: FusedRows) -> None:
        super().__init__()
        self.run = lower_rows(fused, host_target())[0]

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return self.run(*(a.contiguous() if isinstance(a, Tensor) else a for a in args))


# --- random graphs -------------------------------------------------------------------------------


class _Random:
    """A group from a list of numbers; every value stays small, so that one error bound fits all."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.g = g = _Group()
        self.index = g.argument(holds="index")
        self.flags = [g.argument(1, holds="bool")]
        rows = ((1,), (3,), (24,), (4, 32), (2, 3), (4, 1))
        self.pool = [g.argument(*row) for row in rows]
        self.pool += [g(aten.index.Tensor, g.table(*row), [self.index]) for row in ((3,), (24,))]

    def step(self, kind: int, a: int, b: int) -> None:
        g, x, y = self.g, self.pool[a % len(self.pool)], self.pool[b % len(self.pool)]
        row, other = g.shapes[x].row, g.shapes[y].row
        fits = len(row) == len(other) and all(m == n or 1 in (m, n) for m, n in zip(row, other, strict=True))
        if math.prod(row) > 512:
            return
        if kind < 3:
            target = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)[kind]
            self.pool.append(g(aten.clamp.default, g(target, x, y if fits else 0.5), -2.0, 2.0))
        elif kind == 3:
            mask = g(aten.expand.default, self.flags[0], [-1, *row]) if len(row) == 1 else None
            self.pool.append(g(aten.masked_fill.Scalar, x, mask, 0.25) if mask else g(aten.abs.default, x))
        elif kind == 4:
            self.pool.append(g(aten.unsqueeze.default, x, 1 + b % 2) if len(row) == 1 else self._flat(x, row))
        elif kind == 5:
            total = g(aten.sum.dim_IntList, x, [-1], b % 2 == 0 or len(row) == 1)
            self.pool.append(g(aten.mul.Tensor, total, 1 / row[-1]))
        elif kind == 6 and row[-1] > 1:
            self.pool.append(g(aten.slice.Tensor, x, -1, b % (row[-1] - 1), row[-1] - b % 2))
        elif kind == 7 and row[:-1] == other[:-1] and len(row) == 1:
            self.pool.append(g(aten.cat.default, [x, y, x][: 2 + b % 2], -1))
        elif kind == 8 and len(row) == 1:
            columns = (1, 3, 24)[b % 3] if row[0] < 16 else 1 + b % 4
            matrix = g.constant(torch.randn(row[0], columns) / row[0])
            self.pool.append(g(aten.mm.default, x, matrix))
        elif kind == 9 and row[-1] == 1:
            self.pool.append(g(aten.clone.default, g(aten.expand.default, x, [-1, *row[:-1], 1 + b % 20])))

    def _flat(self, x: Node, row: tuple[int, ...]) -> Node:
        return self.g(aten.reshape.default, x, [-1, math.prod(row)])


STEPS = st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(0, 30))


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(STEPS, min_size=6, max_size=12))
def test_random_groups(steps: list[tuple[int, int, int]]) -> None:
    random = _Random()
    given_values = len(random.pool)
    for step in steps:
        random.step(*step)
    results = random.pool[given_values:]
    with suppress(UnsupportedRowsError):  # torch runs it
        _check(random.g, *results, bounds=[(0.0, 2e-5)] * len(results), rows=(0, 1, 17, 100, 2000))


def test_a_row_and_a_sum_over_its_parts_share_a_loop() -> None:
    """128 in a row beside sums over each 32 of them, and a number for each 32: one loop, nothing kept."""
    g = _Group()
    x, y, each = g.argument(128), g.argument(128), g.argument(4, 1)
    product = g(aten.mul.Tensor, x, y)
    sums = g(aten.sum.dim_IntList, g(aten.view.default, product, [-1, 4, 32]), [-1])
    spread = g(aten.expand.default, each, [-1, 4, 32])
    scaled = g(aten.mul.Tensor, x, g(aten.reshape.default, spread, [-1, 128]))
    fused = g.fused(sums, scaled)
    plan = make_plan(fused, host_target())
    assert [stage.shape for stage in plan.stages] == [(4, 32)] and not kept_values(plan)
    run, _ = lower_rows(fused, host_target())
    for n in (1, 16, 37):
        inputs = g.inputs(n)
        found, expected = run(*inputs), fused(*_double(inputs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)
        assert _same(found, run(*inputs))


def test_a_sum_over_the_whole_row_keeps_its_loop() -> None:
    g = _Group()
    x = g.argument(128)
    double = g(aten.mul.Tensor, x, x)
    whole = g(aten.sum.dim_IntList, double, [-1], True)
    parts = g(aten.sum.dim_IntList, g(aten.view.default, double, [-1, 4, 32]), [-1])
    plan = make_plan(g.fused(whole, parts), host_target())
    assert [stage.shape for stage in plan.stages] == [(128,), (4, 32)]
