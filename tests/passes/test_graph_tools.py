"""The copy that keeps passes pure, and names for new weights."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from gaq_compile.passes.graph_tools import add_buffer, attribute, calls, copied, is_call

aten = torch.ops.aten


@pytest.fixture
def graph(with_weights) -> GraphModule:
    return with_weights(lambda self, x: aten.mul.Tensor(aten.add.Tensor(x, self.w), 2.0), w=torch.ones(3))


def test_a_copy_shares_weights_and_nothing_else(graph):
    first = next(iter(graph.graph.nodes))
    first.meta["irreps"] = "3x0e"
    copy = copied(graph)
    assert copy.w.data_ptr() == graph.w.data_ptr()
    copied_first = next(iter(copy.graph.nodes))
    assert copied_first is not first and copied_first.meta == first.meta
    copied_first.meta["bits"] = "s8"
    add_buffer(copy, "w", torch.zeros(3))
    copy.graph.erase_node(copy.graph.output_node())
    assert "bits" not in first.meta and not hasattr(graph, "w_1") and graph.graph.output_node() is not None
    assert torch.equal(graph(torch.zeros(3)), 2 * torch.ones(3))


def test_buffers_get_free_valid_names(graph):
    names = [add_buffer(graph, name, torch.zeros(1)) for name in ("a.b_codes", "a_b.codes", "0.w", "w")]
    assert names == ["a_b_codes", "a_b_codes_1", "_0_w", "w_1"]
    assert all(name.isidentifier() and hasattr(graph, name) for name in names)


def test_attribute(graph):
    node = next(n for n in graph.graph.nodes if n.op == "get_attr")
    assert attribute(graph, node) is graph.w
    graph.setting = 3
    with pytest.raises(TypeError, match="setting"):
        attribute(graph, graph.graph.get_attr("setting"))


def test_calls_survive_changes_while_iterating():
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(3):
        x = graph.call_function(aten.neg.default, (x,))
    graph.output(x)
    module = GraphModule(torch.nn.Module(), graph)
    for node in calls(module, aten.neg.default):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    assert not list(calls(module, aten.neg.default))
    assert not is_call(3.0, aten.neg.default) and not is_call(None)
