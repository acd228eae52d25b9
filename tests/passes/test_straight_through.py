"""straight_through: the gradient of scalars' rounding as a comparison that says the same of every number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.config import activation_scheme
from gaq_compile.ir.layout import channels, dim
from gaq_compile.numerics.activations import fake_quantize_backward
from gaq_compile.passes.fuse_rows import fuse_rows
from gaq_compile.passes.row_shapes import RowShape
from gaq_compile.passes.straight_through import _bound, straight_through

aten, gaq = torch.ops.aten, torch.ops.gaq
LARGEST, LEAST = torch.finfo(torch.float32).max, 2.0**-149
STEPS = st.floats(min_value=0.0, max_value=LARGEST, width=32) | st.sampled_from(
    [0.0, LEAST, 2.0**-126, 1e-38, 0.1, 1.0, LARGEST / 127, LARGEST, math.inf]
)
BITS = st.integers(2, 16)
FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, LEAST, -LARGEST, math.inf, -math.inf, math.nan])
AROUND = 40  # floats on each side of the bound


def _graph(scale: Tensor, irreps: str, scheme: str, fixed: bool = True) -> tuple[GraphModule, dict]:
    """mddq_backward of rows of edges, and the shapes of its nodes; ``fixed``: the steps are constants."""
    graph, root = Graph(), nn.Module()
    root.register_buffer("scale", scale)
    grad, x = graph.placeholder("grad"), graph.placeholder("x")
    steps = graph.get_attr("scale") if fixed else graph.placeholder("steps")
    node = graph.call_function(gaq.mddq_backward.default, (grad, x, steps, irreps, scheme, "layer"))
    graph.output(node)
    row = RowShape("edge", (dim(irreps),), torch.float32)
    return GraphModule(root, graph), dict.fromkeys((grad, x, node), row)


def _written(scale: Tensor, irreps: str, scheme: str) -> GraphModule:
    gm, shapes = _graph(scale, irreps, scheme)
    straight_through(gm, shapes)
    gm.recompile()
    return gm


def _neighbours(x: Tensor) -> Tensor:
    """Floats on both sides of each of these, (2 AROUND + 1, n)."""
    found = [x]
    for end in (0.0, math.inf):
        near = x
        for _ in range(AROUND):
            near = torch.nextafter(near, torch.full_like(near, end))
            found.append(near)
    return torch.stack(found)


def test_before_and_after(listing):
    gm, shapes = _graph(torch.tensor([0.5, 0.25, 2.0]), "2x0e+1x0o", "s4 m8d8")
    given_nodes = set(gm.graph.nodes)
    assert listing(gm) == [
        "mddq_backward_default = gaq.mddq_backward(grad, x, scale, '2x0e+1x0o', 's4 m8d8')",
        "return mddq_backward_default",
    ]
    straight_through(gm, shapes)
    gm.graph.lint()
    assert listing(gm) == [
        "abs_default = aten.abs(x)",
        "lt_tensor = aten.lt(abs_default, scale_bound)",
        "mul_scalar = aten.mul(grad, 0)",
        "where_self = aten.where(lt_tensor, grad, mul_scalar)",
        "return where_self",
    ]
    made = {str(n): shapes[n] for n in gm.graph.nodes if n not in given_nodes and n.op == "call_function"}
    row = RowShape("edge", (3,), torch.float32)
    flags = RowShape("edge", (3,), torch.bool)
    assert made == {"abs_default": row, "lt_tensor": flags, "mul_scalar": row, "where_self": row}
    (bound,) = (n for n in gm.graph.nodes if n.target == "scale_bound")
    assert shapes[bound] == RowShape(None, (3,), torch.float32)


@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=4), BITS)
def test_the_bound_says_of_every_float_around_it_what_the_division_says(
    steps: list[float], bits: int
) -> None:
    scale, qmax = torch.tensor(steps), 2 ** (bits - 1) - 1
    bound = _bound(scale, qmax)
    for near in (bound, scale * qmax):
        x = _neighbours(near)
        assert torch.equal(x < bound, x / scale <= qmax)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(STEPS, FLOATS), min_size=1, max_size=20), BITS)
def test_the_bound_says_of_any_float_what_the_division_says(
    pairs: list[tuple[float, float]], bits: int
) -> None:
    scale, x = torch.tensor(pairs).unbind(1)
    qmax = 2 ** (bits - 1) - 1
    assert torch.equal(x.abs() < _bound(scale, qmax), (x / scale).abs() <= qmax)


@pytest.mark.parametrize("scheme", ["s8 m8d8", "s16 m16d16", "s2 c8", "s8 m8exact common", "s8 m8k6"])
def test_the_gradient_is_the_operators_own(scheme: str) -> None:
    irreps = "3x0e+2x0o+3x0e"  # blocks that do not merge, and a step for every channel of each
    torch.manual_seed(0)
    scale = torch.rand(channels(irreps)) * torch.logspace(-30, 30, channels(irreps))
    qmax = activation_scheme(scheme).qmax(0)
    x = torch.cat([_neighbours(scale * qmax), -_neighbours(scale * qmax), torch.randn(50, 8) * scale * qmax])
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]).unsqueeze(1).expand(-1, 8)])
    grad = torch.randn_like(x)
    grad[::7] = torch.tensor([math.inf, -math.inf, math.nan, 0.0]).repeat(2)  # kept, and NaN outside
    expected = fake_quantize_backward(grad, x, scale, irreps, activation_scheme(scheme))
    got = _written(scale, irreps, scheme)(grad, x)
    assert torch.equal(got.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(got.isnan(), expected.isnan())
    inside = (x / scale).abs() <= qmax
    assert 40 < int(inside.sum()) < inside.numel() - 40


@pytest.mark.parametrize("irreps", ["2x1o", "4x0e+2x1o", "4x0e+1x2e"])
def test_vectors_keep_their_operator(irreps: str) -> None:
    gm = _written(torch.rand(channels(irreps)), irreps, "s8 m8d8")
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [gaq.mddq_backward.default]


def test_steps_that_are_known_only_at_a_call_keep_the_operator() -> None:
    gm, shapes = _graph(torch.rand(3), "3x0e", "s8 m8d8", fixed=False)
    straight_through(gm, shapes)
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [gaq.mddq_backward.default]


def test_two_layers_that_share_steps_have_a_bound_each() -> None:
    """Their numbers of bits may differ."""
    graph, root = Graph(), nn.Module()
    root.register_buffer("net", torch.tensor([0.25, 1.0]))
    grad, x, scale = graph.placeholder("grad"), graph.placeholder("x"), graph.get_attr("net")
    row = RowShape("edge", (2,), torch.float32)
    shapes = {grad: row, x: row}
    for scheme in ("s8 m8d8", "s4 m8d8"):
        grad = graph.call_function(gaq.mddq_backward.default, (grad, x, scale, "2x0e", scheme, "layer"))
        shapes[grad] = row
    graph.output(grad)
    gm = GraphModule(root, graph)
    values = torch.ones(4, 2), torch.tensor([[1.75, 7.0], [2.0, 8.0], [31.75, 127.0], [32.0, 128.0]])
    expected = gm(*values)
    straight_through(gm, shapes)
    gm.recompile()
    assert torch.equal(gm(*values), expected) and expected.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert len(list(gm.buffers())) == 3


def test_the_graph_that_was_given_stays_when_rows_are_fused(assert_pure) -> None:
    form = GraphFormat(("edge_vec",), 5.0)
    graph, root = Graph(), nn.Module()
    root.register_buffer("scale", torch.tensor([0.01, 0.1, 1.0]))
    vec = graph.placeholder("edge_vec")
    x = graph.call_function(aten.sin.default, (vec,))
    args = (vec, x, graph.get_attr("scale"), "3x0e", "s4 m8d8", "layer")
    graph.output(graph.call_function(gaq.mddq_backward.default, args))
    gm = GraphModule(root, graph)
    after = assert_pure(lambda g: fuse_rows(g, form), gm)
    values = torch.randn(9, 3)
    assert torch.equal(after(values), gm(values))
    assert not [n for n in after.graph.nodes if n.target is gaq.mddq_backward.default]
