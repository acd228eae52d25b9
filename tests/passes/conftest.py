"""Small graphs for the passes, and how a test states them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from gaq_compile.ir.printing import format_call, is_inline


def _trace(function: Callable[..., object], *example: Tensor) -> GraphModule:
    with fx_config.patch(use_duck_shape=False):
        return make_fx(function, tracing_mode="symbolic")(*example)


@pytest.fixture(scope="session")
def trace() -> Callable[..., GraphModule]:
    """``trace(function, *example)``: an aten graph with symbolic shapes in ``meta["val"]``."""
    return _trace


class _Module(nn.Module):
    def __init__(self, function: Callable[..., object], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


@pytest.fixture(scope="session")
def with_weights() -> Callable[..., GraphModule]:
    """``with_weights(function(self, x), w=..., ...)``: a graph of x with buffers; no shapes."""
    return lambda function, **tensors: symbolic_trace(_Module(function, **tensors))


def _listing(graph_module: GraphModule) -> list[str]:
    lines = []
    for node in graph_module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op != "placeholder" and not is_inline(node):
            lines.append(f"{node.name} = {format_call(node)}")
    return lines


@pytest.fixture(scope="session")
def listing() -> Callable[[GraphModule], list[str]]:
    """The calls of a graph in order, one line each, with weights and sizes written inline."""
    return _listing


@pytest.fixture(scope="session")
def assert_pure() -> Callable[[Callable[[GraphModule], object], GraphModule], object]:
    """Run a pass and check that its input graph, metadata and tensors are what they were."""

    def check(apply: Callable[[GraphModule], object], graph: GraphModule) -> object:
        def state() -> object:
            metas = [dict(n.meta) for n in graph.graph.nodes]
            tensors = {k: v.clone() for k, v in graph.state_dict().items()}
            modules = [name for name, _ in graph.named_modules()]
            return str(graph.graph), [{k: str(v) for k, v in m.items()} for m in metas], tensors, modules

        before = state()
        result = apply(graph)
        after = state()
        assert before[0] == after[0] and before[1] == after[1] and before[3] == after[3]
        assert before[2].keys() == after[2].keys()
        assert all(torch.equal(before[2][k], after[2][k]) for k in before[2])
        return result

    return check
