"""tag_irreps: every tensor whose irreps operators determine, and no other."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.errors import IrrepsError
from gaq_compile.ir.tags import irreps_of, tag
from gaq_compile.operators.registration import ops
from gaq_compile.passes.tag_irreps import tag_irreps

LINEAR = "2x0e+1x1o -> 4x0e+2x0e+2x1o"
GATE = "4x0e ; 2x0e ; 2x1o ; silu ; sigmoid"
PRODUCT = "4x0e+2x1o * 1x0e+1x1o -> 4x0e+4x1o+2x0e | 0.0.0 0.1.1 1.1.2"


def _network(x, vec, w, weight, senders, receivers):
    y = ops.gate(ops.irreps_linear(x, w, None, LINEAR, False, "l"), GATE, "g")
    sh = ops.spherical_harmonics(vec, "1x0e+1x1o", True, "component", "sh")
    message = ops.tensor_product(y[senders], sh, weight, PRODUCT, "tp")
    out = message.new_zeros(y.shape[0], 18).index_add(0, receivers, message)
    half = out * 0.5
    return half + out.neg(), half.sum(1), out + 1.0, out * half


@pytest.fixture
def graph(trace):
    index = torch.tensor([0, 1, 1])
    inputs = torch.randn(4, 5), torch.randn(3, 3), torch.randn(14), torch.randn(3, 10), index, index
    return trace(_network, *inputs)


def _tags(graph):
    return {n.name: irreps_of(n) for n in graph.graph.nodes if n.op != "output" and "size" not in n.name}


def test_tags_of_a_network(graph):
    assert all(value is None for value in _tags(graph).values())
    tags = _tags(tag_irreps(graph))
    out = "4x0e+4x1o+2x0e"
    expected = {
        "x_1": "2x0e+1x1o",
        "vec_1": "1x1o",
        "irreps_linear": "6x0e+2x1o",
        "gate": "4x0e+2x1o",
        "spherical_harmonics": "1x0e+1x1o",
        "index": "4x0e+2x1o",
        "tensor_product": out,
        "index_add": out,
        "mul": out,
        "neg": out,
        "add": out,
    }
    assert {k: v for k, v in tags.items() if v is not None} == expected


def test_a_second_run_changes_nothing(graph):
    first = _tags(tag_irreps(graph))
    assert _tags(tag_irreps(graph)) == first


def test_pure(graph, assert_pure):
    assert_pure(tag_irreps, graph)


def test_conflict_names_the_pass(graph):
    node = next(n for n in graph.graph.nodes if n.name == "gate")
    tag(node, "10x0e", "earlier_pass")
    with pytest.raises(IrrepsError, match=r"tag_irreps.*gate.*10x0e"):
        tag_irreps(graph)


def test_two_readings_of_one_tensor_conflict(trace):
    def function(x, a, b):
        y = ops.irreps_linear(x, a, None, "3x0e -> 1x0e", False, "scalars")
        return y + ops.irreps_linear(x, b, None, "1x1o -> 1x1o", False, "vector")

    with pytest.raises(IrrepsError, match="3x0e"):
        tag_irreps(trace(function, torch.randn(2, 3), torch.randn(3), torch.randn(1)))


def test_backward_operators(trace):
    def function(x, w, grad):
        y = ops.irreps_linear(x, w, None, LINEAR, False, "l")
        return ops.irreps_linear(ops.gate_backward(grad, y, GATE, "g"), w, None, LINEAR, True, "l")

    tags = _tags(tag_irreps(trace(function, torch.randn(4, 5), torch.randn(14), torch.randn(4, 10))))
    assert tags["grad_1"] == "4x0e+2x1o" and tags["gate_backward"] == "6x0e+2x1o"
    assert tags["irreps_linear_1"] == tags["x_1"] == "2x0e+1x1o"


def test_gradients_of_a_product(trace):
    def function(grad, x, sh, w):
        return ops.tensor_product_backward(grad, x, sh, w, PRODUCT, "tp")

    graph = tag_irreps(trace(function, *(torch.randn(3, n) for n in (18, 10, 4, 10))))
    parts = [irreps_of(n) for n in graph.graph.nodes if n.name.startswith("getitem")]
    assert parts == ["4x0e+2x1o", "1x0e+1x1o", None]


def _columns(x, w, index):
    return torch.ops.aten.index(ops.irreps_linear(x, w, None, LINEAR, False, "l"), [None, index])


def test_columns_have_no_irreps(trace):
    graph = tag_irreps(trace(_columns, torch.randn(4, 5), torch.randn(14), torch.tensor([0, 7])))
    assert _tags(graph)["index"] is None
