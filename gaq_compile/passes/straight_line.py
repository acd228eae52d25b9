"""A lowered graph as one Python function, with as little as can be between its kernels.

A small molecule's step is ruled by what happens between kernels. ``GraphModule`` calls each kernel as a
module, with its hooks, and looks every operator up by name; here kernels and operators are bound once,
and only tensors that may have gaps are asked whether they do. What stays with torch is called through
Python's own functions where they are the same: an overload (``torch.ops.aten.add.Tensor``) checks its
arguments against its schema at each call, which takes longer than a small addition.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..operators.reference import sort_edges
from .graph_tools import aten, attribute, gaq, is_call
from .lower import KernelCall, compact

_PLAIN = (int, float, bool, str, type(None))
_DIRECT: dict[object, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.all.default: torch.all,
    aten.div.Tensor: torch.div,
    aten.eq.Tensor: torch.eq,
    aten.floor_divide.default: torch.floor_divide,
    aten.ge.Scalar: torch.ge,
    aten.index_add.default: torch.index_add,
    aten.lt.Scalar: torch.lt,
    aten.mul.Tensor: torch.mul,
    aten.pow.Tensor_Tensor: torch.pow,
    aten.reciprocal.default: torch.reciprocal,
    aten.scatter_add.default: torch.scatter_add,
    aten.sub.Tensor: torch.sub,
    aten.sum.default: torch.sum,
    aten.unsqueeze.default: torch.unsqueeze,
    gaq.sort_edges.default: sort_edges,
}


def straight_line(graph_module: GraphModule, device: torch.device | None = None) -> Callable[..., Any]:
    """The function that a lowered graph computes, of its inputs in order.

    Args:
        graph_module: from :func:`.lower.lower`. Later changes of it do not show.
        device: where its constants and new tensors go; None leaves them where they are.
    """
    writer = _Writer(graph_module, device)
    text = writer.text()
    namespace: dict[str, Any] = dict(writer.bound)
    exec(compile(text, "<lowered graph>", "exec"), namespace)
    function: Callable[..., Any] = namespace["run"]
    return function


class _Writer:
    def __init__(self, graph_module: GraphModule, device: torch.device | None = None) -> None:
        self.gm, self.device = graph_module, device
        self.bound: dict[str, Any] = {"compact": compact}
        self.last = _last_uses(graph_module)
        self.from_kernels: set[Node] = set()

    def text(self) -> str:
        """The function's source, one line for each node."""
        nodes = list(self.gm.graph.nodes)
        inputs = [n.name for n in nodes if n.op == "placeholder"]
        lines = [f"def run({', '.join(inputs)}):"]
        for node in nodes:
            if node.op == "get_attr":
                value = attribute(self.gm, node)
                self.bound[node.name] = value if self.device is None else value.to(self.device)
            elif node.op == "output":
                lines.append(f"    return {self._value(node.args[0])}")
            elif node.op != "placeholder":
                lines.append(f"    {node.name} = {self._call(node)}")
                dropped = [n.name for n in self.last.get(node, ()) if n.op != "get_attr"]
                if dropped:
                    lines.append(f"    {' = '.join(dropped)} = None")
        return "\n".join(lines) + "\n"

    def _call(self, node: Node) -> str:
        if node.target is operator.getitem:
            if node.args[0] in self.from_kernels:
                self.from_kernels.add(node)
            return f"{self._value(node.args[0])}[{self._value(node.args[1])}]"
        if node.op == "call_module":
            return self._module(node)
        if is_call(node, aten.sym_size.int):
            return f"{self._value(node.args[0])}.shape[{self._value(node.args[1])}]"
        plain = not node.kwargs and len(node.args) == 2
        if is_call(node, aten.index.Tensor) and plain and len(node.args[1]) == 1:  # type: ignore[arg-type]
            return f"{self._value(node.args[0])}[{self._value(node.args[1][0])}]"  # type: ignore[index]
        name = self._bind(_DIRECT.get(node.target, node.target))
        named = [f"{k}={self._value(v)}" for k, v in node.kwargs.items()]
        return f"{name}({', '.join([*(self._value(a) for a in node.args), *named])})"

    def _module(self, node: Node) -> str:
        module = self.gm.get_submodule(str(node.target))
        if not isinstance(module, KernelCall):
            module = module if self.device is None else copy.deepcopy(module).to(self.device)
            return f"{self._bind(module)}({', '.join(self._value(a) for a in node.args)})"
        self.from_kernels.add(node)
        return f"{self._bind(module.run)}({', '.join(self._compacted(a) for a in node.args)})"

    def _compacted(self, argument: Any) -> str:
        text = self._value(argument)
        sure = (
            not isinstance(argument, Node) or argument in self.from_kernels or not self._is_tensor(argument)
        )
        return text if sure else f"compact({text})"

    def _is_tensor(self, node: Node) -> bool:
        """Sizes are no tensors; everything else that kernels take is."""
        return not str(node.target).startswith(("aten.sym_size", "<built-in"))

    def _bind(self, value: Any) -> str:
        name = f"_{len(self.bound)}"
        self.bound[name] = value
        return name

    def _value(self, value: Any) -> str:
        if isinstance(value, torch.device) and self.device is not None:
            return self._bind(self.device)
        if isinstance(value, Node):
            return value.name
        if isinstance(value, float) and value - value != 0.0:  # infinity and NaN have no literal
            return self._bind(value)
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._value, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(self._value(v) + ', ' for v in value)})"
        return self._bind(value)


def _last_uses(graph_module: GraphModule) -> dict[Node, list[Node]]:
    """What can be let go after each node."""
    seen: set[Node] = set()
    found: dict[Node, list[Node]] = {}
    for node in reversed(list(graph_module.graph.nodes)):
        for argument in node.all_input_nodes:
            if argument not in seen:
                seen.add(argument)
                found.setdefault(node, []).append(argument)
        if node not in seen and node.op not in ("output", "placeholder"):
            seen.add(node)
            found.setdefault(node, []).append(node)
    return found
