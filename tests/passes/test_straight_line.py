"""straight_line: one Python function that does what the lowered graph does, and holds on to nothing."""

from __future__ import annotations

import math
import operator
import weakref

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from gaq_compile.passes.lower import KernelCall
from gaq_compile.passes.straight_line import _DIRECT, straight_line

aten = torch.ops.aten


def _graph(build, **modules) -> GraphModule:
    graph, root = Graph(), nn.Module()
    root.register_buffer("weight", torch.arange(3.0))
    for name, module in modules.items():
        root.add_module(name, module)
    graph.output(build(graph, graph.placeholder("x")))
    return GraphModule(root, graph)


def test_operators_weights_lists_and_numbers_without_a_literal():
    def build(g, x):
        limited = g.call_function(aten.clamp.default, (x, -math.inf, math.inf))
        both = g.call_function(aten.cat.default, ([limited, g.call_function(aten.neg.default, (x,))], 1))
        zeros = g.call_function(aten.zeros.default, ([2, 3],), {"dtype": torch.float64})
        scaled = g.call_function(aten.mul.Tensor, (x, g.get_attr("weight")))
        return both, zeros, scaled

    gm = _graph(build)
    x = torch.randn(2, 3)
    for got, expected in zip(straight_line(gm)(x), gm(x), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_kernels_get_rows_without_gaps():
    seen = []

    def kernel(*tensors):
        seen.extend(t.is_contiguous() for t in tensors)
        return [t * 2 for t in tensors]

    def build(g, x):
        turned = g.call_function(aten.t.default, (x,))
        results = g.call_module("kernel", (turned, x))
        first = g.call_function(operator.getitem, (results, 0))
        again = g.call_module("kernel", (first,))
        return first, g.call_function(operator.getitem, (again, 0))

    gm = _graph(build, kernel=KernelCall(kernel, "double"))
    x = torch.randn(3, 4)
    first, second = straight_line(gm)(x)
    assert torch.equal(first, 2 * x.t()) and torch.equal(second, 4 * x.t())
    assert seen == [True] * 3


def test_an_empty_tensor_with_strides_reaches_a_kernel_without():
    gm = _graph(
        lambda g, x: g.call_module("kernel", (x,)), kernel=KernelCall(lambda t: t.stride(), "strides")
    )
    assert straight_line(gm)(torch.empty(0, 3).as_strided((0, 3), (1, 7))) == (3, 1)


def test_what_is_read_no_more_is_let_go():
    alive = []

    def watch(tensor):
        alive.append(weakref.ref(tensor))
        return tensor + 1

    def build(g, x):
        value = x
        for _ in range(3):
            value = g.call_module("watch", (g.call_function(aten.mul.Tensor, (value, 2.0)),))
        return value

    gm = _graph(build, watch=KernelCall(watch, ""))
    straight_line(gm)(torch.ones(2))
    assert [ref() for ref in alive] == [None] * 3


def test_errors_of_kernels_come_through():
    def fail(tensor):
        raise ValueError("no")

    gm = _graph(lambda g, x: g.call_module("kernel", (x,)), kernel=KernelCall(fail, ""))
    with pytest.raises(ValueError, match="no"):
        straight_line(gm)(torch.ones(1))


_SAMPLES = {
    aten.add.Tensor: (torch.randn(3), torch.randn(3)),
    aten.all.default: (torch.tensor([True, False]),),
    aten.div.Tensor: (torch.arange(3), torch.tensor([2.0, 4.0, 8.0])),
    aten.eq.Tensor: (torch.arange(3), torch.tensor(1)),
    aten.floor_divide.default: (torch.randn(3), math.inf),
    aten.ge.Scalar: (torch.arange(3), 1),
    aten.index.Tensor: (torch.randn(4, 2), [torch.tensor([3, 0, 3])]),
    aten.index_add.default: (torch.zeros(4), 0, torch.tensor([1, 1]), torch.ones(2)),
    aten.lt.Scalar: (torch.arange(3), 1),
    aten.mul.Tensor: (torch.arange(3), torch.arange(3)),
    aten.pow.Tensor_Tensor: (torch.arange(1, 4), torch.tensor(0.5)),
    aten.reciprocal.default: (torch.arange(1, 3),),
    aten.scatter_add.default: (torch.zeros(4), 0, torch.tensor([1, 1]), torch.ones(2)),
    aten.sub.Tensor: (torch.arange(3), 1),
    aten.sum.default: (torch.randn(3, dtype=torch.float64),),
    aten.unsqueeze.default: (torch.randn(3), -1),
    torch.ops.gaq.bonds.default: (torch.tensor([2, 0]), torch.tensor([0, 2])),
    torch.ops.gaq.sort_edges.default: (torch.tensor([0, 2, 1]), torch.tensor([2, 0, 0]), 3),
}


def test_every_direct_call_has_a_sample():
    assert set(_SAMPLES) - {aten.index.Tensor} == set(_DIRECT)


@pytest.mark.parametrize("target", _SAMPLES, ids=str)
def test_direct_calls_are_the_operators(target):
    graph = Graph()
    given = _SAMPLES[target]
    tensors = [t for a in given for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    inputs = {id(t): graph.placeholder(f"x{k}") for k, t in enumerate(tensors)}
    args = [[inputs[id(t)] for t in a] if isinstance(a, list) else inputs.get(id(a), a) for a in given]
    graph.output(graph.call_function(target, tuple(args)))
    got, expected = straight_line(GraphModule(nn.Module(), graph))(*tensors), target(*given)
    for a, b in zip(*((v if isinstance(v, list) else [v]) for v in (got, expected)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_sizes_are_asked_of_the_tensor():
    def build(g, x):
        rows = g.call_function(aten.sym_size.int, (x, 1))
        return g.call_function(aten.zeros.default, ([rows],))

    assert straight_line(_graph(build))(torch.ones(2, 5)).shape == (5,)
