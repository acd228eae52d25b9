"""Linears inside of row groups: the same bits as their own kernels, wherever input and output lie."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from gaq_compile.backends.base import Refused
from gaq_compile.backends.tvm import TVMBackend
from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.linear import LinearKernel, LinearProblem, lower_linear
from gaq_compile.backends.tvm.rows_kernel import lower_rows
from gaq_compile.ir.layout import blocks, channels, dim
from gaq_compile.numerics.packing import pack_int4
from gaq_compile.operators.registration import ops
from gaq_compile.passes.graph_tools import aten
from gaq_compile.passes.row_groups import FusedRows
from gaq_compile.passes.row_shapes import RowShape

ROWS = (0, 1, 15, 16, 17, 37)
ATOMS = 9
MIXED = "9x0e+5x1e -> 6x0e+18x1e"
PATHS = "5x0e+7x1e+3x0e+9x1e -> 17x0e+3x1e+4x1e+2x2e+2x0o"
BLOCKS = "32x0e+32x0e -> 32x0e+32x0e | 0:0 1:1"
KINDS = [
    ("f32", "f32"), ("f32", "s8"), ("f32", "s4"), ("f32", "s16"), ("s8 m8d8", "s8"), ("s8 m8d8 common", "s4"),
    ("s8 c8", "s8"), ("s16 m16d16", "s8"), ("s8 m8exact", "s8"),
]  # fmt: skip
# narrow rows lie across the tile's
NARROW = [("4x0e -> 32x0e", *KINDS[1]), ("128x0e -> 1x0e", *KINDS[4]), ("40x0e -> 3x0e", *KINDS[5])]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class _Group:
    """A group around linears; its arguments are x (n, width), or what :meth:`argument` adds."""

    def __init__(self) -> None:
        self.graph, self.module = Graph(), nn.Module()
        self.shapes: dict[Node, RowShape] = {}
        self.kernels: list[LinearKernel] = []

    def argument(self, *row: int, rows: str = "edge", dtype: torch.dtype = torch.float32) -> Node:
        return self._known(self.graph.placeholder(f"x{len(self.shapes)}"), row, rows, dtype)

    def __call__(self, target: object, row: tuple[int, ...], *args: object) -> Node:
        return self._known(self.graph.call_function(target, args), row)  # type: ignore[arg-type]

    def linear(self, x: Node, problem: LinearProblem) -> Node:
        made = _tensors(problem, seed=len(self.kernels))
        self.kernels.append(lower_linear(problem, *made, host_target()))
        weight, scale, steps, bias = made
        spec, transpose = problem.spec, problem.transpose
        if problem.weight == "f32":
            args = (x, self._held(weight), self._held(bias), spec, transpose, f"layer{len(self.kernels)}")
            return self(ops.irreps_linear.default, (dim(problem.irreps_out),), *args)
        bits = int(problem.weight[1:])
        codes = pack_int4(weight) if bits == 4 else weight
        held = [self._held(t) for t in (steps, codes, scale, bias)]
        rest = (spec, problem.activation, bits, transpose, f"layer{len(self.kernels)}")
        return self(ops.int_irreps_linear.default, (dim(problem.irreps_out),), x, *held, *rest)

    def _held(self, value: Tensor | None) -> Node | None:
        if value is None:
            return None
        name = f"c{len(self.shapes)}"
        self.module.register_buffer(name, value)
        return self._known(self.graph.get_attr(name), tuple(value.shape), None, value.dtype)

    def _known(
        self, node: Node, row: tuple[int, ...], rows: str | None = "edge", dtype: torch.dtype = torch.float32
    ) -> Node:
        self.shapes[node] = RowShape(rows, row, dtype)
        return node

    def fused(self, *results: Node) -> FusedRows:
        self.graph.output(results)
        return FusedRows(self.module, self.graph, "edge", self.shapes)

    def run(self, *results: Node) -> Callable[..., tuple[Tensor, ...]]:
        run, linears = lower_rows(self.fused(*results), host_target())
        assert [k.plan.problem for k in linears] == [k.plan.problem for k in self.kernels]
        return run


def _tensors(problem: LinearProblem, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, its scales, the input's steps and a bias, all random."""
    g, spec = torch.Generator().manual_seed(seed), problem.linear
    scale = steps = bias = None
    if problem.bias:
        bias = torch.randn(sum(b.mul for b in spec.bias_blocks), generator=g)
    if problem.weight == "f32":
        return torch.randn(spec.weight_numel, generator=g), None, None, bias
    top = {"s8": 127, "s4": 7, "s16": 32767}[problem.weight]
    dtype = torch.int16 if problem.weight == "s16" else torch.int8
    weight = torch.randint(-top, top + 1, (spec.weight_numel,), generator=g).to(dtype)
    scale = (torch.rand(spec.scale_numel, generator=g) * 0.01 + 0.001) * 127 / top
    if problem.scheme is not None:
        tops = torch.tensor([problem.scheme.qmax(b.l) for b in blocks(spec.irreps_in) for _ in range(b.mul)])
        steps = (0.4 + 2.6 * torch.rand(len(tops), generator=g)) / tops
    elif problem.transpose and problem.weight == "s8":
        steps = 0.004 + 0.026 * torch.rand(channels(spec.irreps_in), generator=g)
    return weight, scale, steps, bias


def _random(n: int, *row: int) -> Tensor:
    return torch.randn(n, *row, generator=torch.Generator().manual_seed(n))


def _assert_same(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape and bool(torch.isfinite(got).all())
    assert torch.equal(got, want), float((got - want).abs().max())


@pytest.mark.parametrize(
    ("spec", "activation", "weight"),
    [(MIXED, *kind) for kind in KINDS]
    + [(spec, *KINDS[k]) for spec in (PATHS, BLOCKS) for k in (1, 4)]
    + NARROW,
)
def test_same_bits_as_a_kernel_of_its_own(spec: str, activation: str, weight: str) -> None:
    bias = any(b.l == 0 for b in blocks(spec.split("->")[1].split("|")[0].strip()))
    problem = LinearProblem(spec, activation, weight, bias=bias)
    group, width = _Group(), dim(problem.irreps_in)
    x, y = group.argument(width), group.argument(width)
    direct = group.linear(x, problem)
    total = group(aten.add.Tensor, (width,), x, y)
    later = group.linear(total, problem)
    run = group.run(direct, later, group(aten.mul.Tensor, (dim(problem.irreps_out),), later, 2.0))
    for n in ROWS:
        a, b = _random(n, width), _random(n + 1, width)[:n]
        got, kernels = run(a, b), group.kernels
        _assert_same(got[0], kernels[0](a))
        _assert_same(got[1], kernels[1](a + b))
        _assert_same(got[2], kernels[1](a + b) * 2)


@pytest.mark.parametrize(
    ("spec", "activation", "weight"),
    [
        (MIXED, "f32", "f32"),
        (PATHS, "f32", "s8"),
        (MIXED, "g16", "s8"),
        (PATHS, "g16", "s4"),
        ("4x0e -> 32x0e", "g16", "s8"),
        ("1x0e -> 128x0e", "f32", "s8"),
    ],
)
def test_gradients_have_the_same_bits(spec: str, activation: str, weight: str) -> None:
    problem = LinearProblem(spec, activation, weight, transpose=True)
    group, width = _Group(), dim(problem.irreps_in)
    x = group.argument(width)
    run = group.run(group.linear(group(aten.mul.Tensor, (width,), x, 0.5), problem))
    for n in ROWS:
        a = _random(n, width)
        _assert_same(run(a)[0], group.kernels[0](a * 0.5))


def test_a_chain_stays_in_the_tile() -> None:
    group = _Group()
    problems = [
        LinearProblem(f"{a}x0e -> {b}x0e", "s8 m8d8", "s8") for a, b in ((8, 64), (64, 64), (64, 100))
    ]
    problems.append(LinearProblem("100x0e -> 3x0e", "f32", "f32", bias=True))
    value = group.argument(8)
    for problem in problems:
        value = group(aten.abs.default, (dim(problem.irreps_out),), group.linear(value, problem))
    run = group.run(value)
    for n in ROWS:
        want = a = _random(n, 8)
        for kernel in group.kernels:
            want = kernel(want).abs()
        _assert_same(run(a)[0], want)


def test_views_and_gathered_rows() -> None:
    group = _Group()
    x, atoms = group.argument(80), group.argument(40, rows="atom")
    index = group.argument(dtype=torch.int64)
    part = group(aten.slice.Tensor, (40,), x, 1, 8, 48)
    far = group(aten.index.Tensor, (40,), atoms, [index])
    heads = group(aten.view.default, (2, 40), x, [-1, 2, 40])
    swapped = group(aten.sum.dim_IntList, (2,), heads, [2])
    results = [
        group.linear(part, LinearProblem("40x0e -> 24x0e", "f32", "s8")),
        group.linear(far, LinearProblem("40x0e -> 24x0e", "s8 m8d8", "s8")),
        group.linear(swapped, LinearProblem("2x0e -> 24x0e", "f32", "f32")),
    ]
    run = group.run(*results)
    for n in ROWS:
        a, table = _random(n, 80), _random(ATOMS, 40)
        i = torch.randint(0, ATOMS, (n,), generator=torch.Generator().manual_seed(n))
        got, kernels = run(a, table, i), group.kernels
        _assert_same(got[0], kernels[0](a[:, 8:48].contiguous()))
        _assert_same(got[1], kernels[1](table[i]))
        want = kernels[2](a.view(-1, 2, 40).sum(2))
        assert float((got[2] - want).abs().max() if n else 0.0) < 1e-5 * 40  # sums in another order


def test_not_numbers_show() -> None:
    """A NaN among rounded activations is in its row's result, as in a kernel of its own."""
    problem = LinearProblem("32x0e -> 32x0e", "s8 m8d8", "s8")
    group = _Group()
    x = group.argument(32)
    run = group.run(group.linear(group(aten.mul.Tensor, (32,), x, 2.0), problem))
    a = _random(20, 32)
    a[3, 5] = torch.nan
    (got,) = run(a)
    bad = got.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [3]


def test_learned_directions_are_refused() -> None:
    group = _Group()
    x = group.argument(24)
    problem = LinearProblem("3x0e+7x1e -> 3x0e+7x1e", "s8 m8k8", "s8")
    made = [group._held(t) for t in (torch.ones(10), torch.ones(58, dtype=torch.int8), torch.ones(10), None)]
    rest = (problem.spec, problem.activation, 8, False, "layer")
    y = group(ops.int_irreps_linear.default, (24,), x, *made, *rest)
    answer = TVMBackend().lower_rows(group.fused(group(aten.abs.default, (24,), y)))
    assert isinstance(answer, Refused) and "learned" in answer.reason


def test_what_each_computes_in() -> None:
    group = _Group()
    x = group.argument(32)
    first = group.linear(x, LinearProblem("32x0e -> 32x0e", "s8 m8d8", "s8"))
    second = group.linear(group(aten.abs.default, (32,), first), LinearProblem("32x0e -> 8x0e"))
    answer = TVMBackend().lower_rows(group.fused(second))
    assert answer.within == ("s8·s8→s32", "f32")
