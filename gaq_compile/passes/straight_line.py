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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..operators.reference import bonds, sort_edges
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
    gaq.bonds.default: bonds,
    gaq.sort_edges.default: sort_edges,
}


@dataclass(frozen=True)
class Step:
    """A kernel call of a graph.

    Attributes:
        run: what the node calls.
        name: of the node.
        arguments: names of values, and numbers; those of lists one by one.
        results: names of the parts of what is called, by their place (0 where it is not a tuple).
    """

    run: Any
    name: str
    arguments: tuple[str | int, ...]
    results: dict[int, str]


Together = Callable[[Sequence[Step], Sequence[str], Sequence[str]], Callable[..., Any]]
"""Makes one function of steps, the names of its arguments and the names of its results."""


def straight_line(
    graph_module: GraphModule,
    device: torch.device | None = None,
    together: Together | None = None,
    lasting: Sequence[Sequence[str]] = (),
) -> Callable[..., Any]:
    """The function that a lowered graph computes, of its inputs in order.

    Args:
        graph_module: from :func:`.lower.lower`. Later changes of it do not show.
        device: where its constants and new tensors go; None leaves them where they are.
        together: makes one function of kernels that can follow each other and say how they are called
            (they have a ``launch``).
        lasting: inputs that often stay the same from call to call, those that last longest first: what
            depends on them alone is remembered, and computed anew when they change.
    """
    writer = _Writer(graph_module, device, together, lasting)
    text = writer.text()
    namespace = writer.bound
    exec(compile(text, "<lowered graph>", "exec"), namespace)
    function: Callable[..., Any] = namespace["run"]
    return function


class Remembered:
    """A function of tensors that keeps its last value for as long as it is called with equal ones.

    Args:
        function: of all arguments, those that are compared first.
        compared: how many are.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]], compared: int) -> None:
        self.function, self.compared = function, compared
        self._last: tuple[tuple[Tensor, ...], tuple[Any, ...]] | None = None

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        last, given = self._last, arguments[: self.compared]
        if last is not None and all(map(_is_same, last[0], given)):
            return last[1]
        value = self.function(*arguments)
        self._last = tuple(t.clone() for t in given), value  # the caller may change its own
        return value


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a, b)


Item = tuple[Node, ...]
"""A line of a function: one node, or kernel calls that run together and the parts of what they return."""


class _Writer:
    def __init__(
        self,
        graph_module: GraphModule,
        device: torch.device | None = None,
        together: Together | None = None,
        lasting: Sequence[Sequence[str]] = (),
    ) -> None:
        self.gm, self.device, self.together = graph_module, device, together
        self.bound: dict[str, Any] = {"compact": compact, "Remembered": Remembered}
        self.from_kernels: set[Node] = set()
        self.lasting = [tuple(names) for names in lasting]
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                value = attribute(graph_module, node)
                self.bound[node.name] = value if device is None else value.to(device)

    def text(self) -> str:
        """The source: a function for each stretch of time that values last, and ``run``, which calls them."""
        nodes = [n for n in self.gm.graph.nodes if n.op != "get_attr"]
        inputs = {str(n.target): n for n in nodes if n.op == "placeholder"}
        self.levels = levels = _levels(nodes, self.lasting)
        lines: list[str] = []
        calls: list[str] = []
        compared: list[Node] = []
        for level, names in enumerate(self.lasting):
            compared += [inputs[name] for name in names if name in inputs]
            inside = [n for n in nodes if levels[n] == level and n.op != "placeholder"]
            if not inside:
                continue
            kept = [n for n in inside if any(levels[user] > level for user in n.users)]
            needed = (a for n in inside for a in n.all_input_nodes if levels.get(a, level) < level)
            given = ", ".join(n.name for n in dict.fromkeys((*compared, *needed)))
            made = "".join(f"{n.name}, " for n in kept)
            name = f"lasting_{level}"
            lines += [f"def {name}({given}):", *self._body(inside, kept), f"    return ({made})"]
            lines.append(f"{name} = Remembered({name}, {len(compared)})")
            calls.append(f"    {made and made + '= '}{name}({given})")
        rest = [n for n in nodes if levels[n] == len(self.lasting)]
        lines += [f"def run({', '.join(n.name for n in inputs.values())}):", *calls, *self._body(rest, ())]
        return "\n".join(lines) + "\n"

    def _body(self, nodes: Sequence[Node], kept: Sequence[Node]) -> list[str]:
        """The lines that compute nodes, letting go of all that is read no more, and not kept."""
        items = _items(self.gm, nodes) if self.together else [(n,) for n in nodes]
        last = _last_uses(items, kept)
        lines: list[str] = []
        for item in items:
            together = self.together if _is_launch(self.gm, item[0]) else None
            line = self._segment(item, together) if together else self._line(*item)
            lines += [f"    {line}"] if line else []
            dropped = [n.name for n in last.get(item, ()) if n.op != "get_attr"]
            if dropped:
                lines.append(f"    {' = '.join(dropped)} = None")
        return lines

    def _line(self, node: Node) -> str:
        if node.op == "output":
            return f"return {self._returned(node.args[0])}"
        return "" if node.op == "placeholder" else f"{node.name} = {self._call(node)}"

    def _returned(self, values: Any) -> str:
        """The results; what is remembered stays with us, the caller gets a copy."""
        if isinstance(values, tuple | list):
            return f"({''.join(self._returned(v) + ', ' for v in values)})"
        return f"{self._value(values)}.clone()" if self._is_kept(values) else self._value(values)

    def _is_kept(self, value: Any) -> bool:
        """Whether a value is remembered, or a view of one that is."""
        if not isinstance(value, Node):
            return False
        seen = getattr(value.target, "is_view", False) or value.target is operator.getitem
        return self.levels.get(value, 0) < len(self.lasting) or (seen and self._is_kept(value.args[0]))

    def _segment(self, nodes: Item, together: Together) -> str:
        """Several kernels as one call."""
        inside = set(nodes)
        steps = [_step(self.gm, node) for node in nodes if node.op == "call_module"]
        inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))
        outputs = [n for n in nodes if not inside.issuperset(n.users)]
        if not outputs:
            return ""
        run = together(steps, [n.name for n in inputs], [n.name for n in outputs])
        given = ", ".join(map(self._compacted, inputs))
        self.from_kernels.update(outputs)
        return f"{''.join(f'{n.name}, ' for n in outputs)}= {self._bind(run)}({given})"

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
        """Sizes and arithmetic with them are no tensors; everything else that kernels take is."""
        size = str(node.target).startswith(("aten.sym_size", "<built-in"))
        return not size or node.target is operator.getitem  # a part of a split: a view with gaps

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


def _step(gm: GraphModule, node: Node) -> Step:
    run = gm.get_submodule(str(node.target)).run
    arguments = [a.name if isinstance(a, Node) else a for a in flat(node.args)]
    parts = {int(user.args[1]): user.name for user in node.users if user.target is operator.getitem}  # type: ignore[call-overload]
    return Step(run, node.name, tuple(arguments), parts or {0: node.name})


def flat(arguments: Sequence[Any]) -> list[Any]:
    """A call's arguments, those of lists one by one."""
    found: list[Any] = []
    for argument in arguments:
        found += argument if isinstance(argument, list | tuple) else (argument,)
    return found


def _levels(nodes: Sequence[Node], lasting: Sequence[Sequence[str]]) -> dict[Node, int]:
    """How long each value lasts: the last of the groups of inputs that it depends on."""
    of_input = {name: level for level, names in enumerate(lasting) for name in names}
    found: dict[Node, int] = {}
    for node in nodes:
        if node.op in ("placeholder", "output"):
            found[node] = of_input.get(str(node.target), len(lasting))
        else:
            found[node] = max((found[a] for a in node.all_input_nodes if a in found), default=0)
    return found


def _items(gm: GraphModule, nodes: Sequence[Node]) -> list[Item]:
    """What torch runs as early as can be, so that the kernels between are few long stretches."""
    launches = {node for node in nodes if _is_launch(gm, node)}
    launches |= {n for n in nodes if n.target is operator.getitem and n.args[0] in launches}
    waiting = [node for node in nodes if node.op != "output"]
    open_ = set(waiting)
    found: list[Item] = []
    while waiting:
        for kernels in (False, True):
            taken: list[Node] = []
            for node in waiting:
                if kernels == (node in launches) and open_.isdisjoint(node.all_input_nodes):
                    taken.append(node)
                    open_.remove(node)
            waiting = [node for node in waiting if node in open_]
            found += [tuple(taken)] if kernels and taken else [(node,) for node in taken]
    return found + [(node,) for node in nodes if node.op == "output"]


def _is_launch(gm: GraphModule, node: Node) -> bool:
    """Whether a node calls a kernel that says how it is called, and its results are read one by one."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    launch = getattr(module.run, "launch", None) if isinstance(module, KernelCall) else None
    if launch is None:
        return False
    places = [user.args[1] for user in node.users if user.target is operator.getitem]
    one_by_one = len(node.users) == len(places) == len({k for k in places if k >= 0})
    return one_by_one if launch.several else not places


def _last_uses(items: Sequence[Item], kept: Sequence[Node]) -> dict[Item, list[Node]]:
    """What can be let go after each item."""
    seen = set(kept)
    found: dict[Item, list[Node]] = {}
    for item in reversed(items):
        for argument in (a for node in item for a in node.all_input_nodes):
            if argument not in seen and argument not in item:
                seen.add(argument)
                found.setdefault(item, []).append(argument)
        if len(item) == 1 and item[0] not in seen and item[0].op not in ("output", "placeholder"):
            seen.add(item[0])
            found.setdefault(item, []).append(item[0])
    return found
