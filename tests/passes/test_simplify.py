"""simplify: what export leaves behind goes, everything that means something stays."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from gaq_compile.operators import registration as _registration  # noqa: F401 - registers the operators
from gaq_compile.passes.simplify import simplify

aten = torch.ops.aten


@pytest.fixture
def noisy(trace) -> GraphModule:
    def function(x, senders, receivers):
        edges = torch.stack([receivers, senders])
        a = x[edges[1]] * 2.0
        b = x[edges[-1]] * 2.0
        return a.view(a.shape[0], 4) + torch.ops.aten.alias(b.detach())

    return trace(function, torch.randn(5, 4), torch.tensor([0, 1, 2]), torch.tensor([2, 4, 4]))


def test_before_and_after(noisy, listing):
    before = [line.split("aten.")[-1].split("(")[0] for line in listing(noisy)]
    assert before.count("stack") == 1 and before.count("select") == 2 and before.count("index") == 2
    assert listing(simplify(noisy, differentiated=True)) == [
        "index = aten.index(x_1, [senders_1])",
        "mul = aten.mul(index, 2)",
        "add = aten.add(mul, mul)",
        "return add",
    ]


def test_same_values_pure_and_repeatable(noisy, listing, assert_pure):
    x, senders, receivers = torch.randn(9, 4), torch.tensor([8, 1]), torch.tensor([0, 3])
    after = assert_pure(simplify, noisy)
    assert torch.equal(after(x, senders, receivers), noisy(x, senders, receivers))
    assert listing(simplify(after)) == listing(after)


def test_selects_of_other_axes_stay(trace, listing):
    def function(x, y):
        return torch.stack([x, y], 1).select(0, 1) + torch.stack([x, y]).select(1, 0)

    graph = trace(function, torch.randn(2, 2), torch.randn(2, 2))
    after = simplify(graph)
    assert sum("aten.select" in line for line in listing(after)) == 2
    inputs = torch.randn(2, 2), torch.randn(2, 2)
    assert torch.equal(after(*inputs), graph(*inputs))


def test_slices_that_take_all_go(trace, listing):
    lines = listing(simplify(trace(lambda x: x[:, :, None] * x[:, None, 1:], torch.randn(5, 4))))
    assert sum("aten.slice(" in line for line in lines) == 1


def test_views_that_change_the_shape_stay(trace, listing):
    graph = trace(lambda x: x.view(x.shape[0] * 3).view(3, x.shape[0]), torch.randn(4, 3))
    assert len(listing(simplify(graph))) == 3


def test_equal_looking_numbers_are_not_equal(trace, listing):
    """1, 1.0 and True compare equal in Python; they are different arguments."""

    def function(x):
        return torch.cat([torch.full((2,), 1), torch.full((2,), True), x]), torch.full((2,), 1.0)

    graph = trace(function, torch.zeros(3, dtype=torch.int64))
    assert sum("aten.full" in line for line in listing(simplify(graph))) == 3


def test_signs_of_zero_are_kept(trace):
    graph = trace(lambda x: (x / 0.0, x / -0.0), torch.ones(2))
    up, down = simplify(graph)(torch.ones(2))
    assert (up > 0).all() and (down < 0).all()


def _twice(target, *arguments) -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(tuple(graph.call_function(target, (x, *arguments)) for _ in range(2)))
    return GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.rand_like.default, ()),
        (aten.bernoulli.p, (0.5,)),
    ],
    ids=str,
)
def test_two_random_draws_stay_two(target, arguments):
    after = simplify(_twice(target, *arguments))
    assert len([n for n in after.graph.nodes if n.op == "call_function"]) == 2


def test_assertions_go_and_layers_with_other_labels_stay():
    gaq = torch.ops.gaq
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.call_function(aten._assert_tensor_metadata.default, (x,))
    labels = ("a", "b", "b")
    spec = "2x0e -> 2x0e"
    calls = [graph.call_function(gaq.irreps_linear.default, (x, w, None, spec, False, n)) for n in labels]
    graph.output(tuple(calls))
    after = simplify(GraphModule(torch.nn.Module(), graph))
    assert [n.args[-1] for n in after.graph.nodes if n.op == "call_function"] == ["a", "b"]
