"""A graph as text: one line per node, with what a reader wants to know of it in the margin.

.. code-block:: python

    def forward(x, edge_vec):                                              # f32[n, 128] ...
        irreps_linear = gaq.irreps_linear(x, w.0, '128x0e -> 64x0e')       # 64x0e | s8 m8d8 | tvm ...
        add = aten.add(irreps_linear, x)                                   # 64x0e
        return add

Weights, items of tuples and sizes are written where they are used; they get no lines of their own.
A label (the module a node came from) stands in the margin, not among the arguments.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from e3nn.o3 import Irreps
from torch.fx import GraphModule, Node

from .traced import TracedTensor

_WIDTH = 96  # column after which a comment follows its line unaligned
_LONGEST_TEXT = 72
_LONG_NUMBER = re.compile(r"\d+\.\d{6,}")
_LONG_IRREPS = re.compile(r"(?:\d+x\d+[eo]\+){4,}\d+x\d+[eo]")
_NAMED = 3  # modules of a group that its line names
_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_QUIET_KEYWORDS = frozenset({"device", "layout", "pin_memory", "memory_format", "label"})
_OPERATORS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.eq: "==",
    operator.ge: ">=",
    operator.gt: ">",
    operator.le: "<=",
    operator.lt: "<",
}


def format_graph(graph_module: GraphModule) -> str:
    """The graph of ``graph_module`` as readable, Python-like text (see the module's docstring).

    Each line's comment is ``irreps | bits | runs on | label``, as far as the node's ``meta`` has
    them; nodes without irreps show dtype and shape instead.
    """
    nodes = list(graph_module.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    lines = [(f"def forward({', '.join(n.name for n in inputs)}):", "")]
    lines += [(f"    # {n.name}: {note(n)}", "") for n in inputs if note(n)]
    for node in nodes:
        if node.op == "output":
            lines.append((f"    return {format_argument(node.args[0])}", ""))
        elif node.op != "placeholder" and not is_inline(node):
            lines.append((f"    {node.name} = {format_call(node)}", note(node)))
    width = max((len(code) for code, comment in lines if comment and len(code) <= _WIDTH), default=0)
    return "\n".join(f"{code:<{width}}  # {comment}" if comment else code for code, comment in lines) + "\n"


def short_name(node: Node) -> str:
    """What a node does, in a word: ``gaq.irreps_linear``, ``aten.add``, ``getitem``, ``.view``."""
    target = node.target
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    if node.op == "get_attr":
        return "constant"
    if node.op == "call_method":
        return f".{target}"
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name).replace("::", ".")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).replace("::", ".")
    return str(getattr(target, "__name__", target)).strip("_")


def named_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a node by name where its operator has a schema, else by position."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    names = [argument.name for argument in target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def label_of(node: Node) -> str:
    """The module a gaq operator came from: its ``label`` argument; "" for other nodes."""
    label = named_arguments(node).get("label", "")
    return label if isinstance(label, str) else ""


def is_inline(node: Node) -> bool:
    """Whether a node gets no line: weights, items of tuples, sizes (written where used), assertions."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    name = short_name(node)
    if node.op != "call_function" or name.startswith("aten._assert"):
        return node.op == "call_function"
    return name in ("aten.sym_size", "aten.sym_numel") or (
        node.target in _OPERATORS and len(node.args) == 2 and not is_tensor(node)
    )


def is_tensor(node: Node) -> bool:
    """Whether a node makes tensors, as far as its ``meta["val"]`` tells (True where it does not)."""
    value = node.meta.get("val")
    return value is None or isinstance(value, (torch.Tensor, TracedTensor, list, tuple))


def format_call(node: Node) -> str:
    """``gaq.irreps_linear(x, w, '128x0e -> 64x0e')``: defaults, device and label left out."""
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "call_method":
        return f"{format_argument(node.args[0])}.{node.target}({_joined(node.args[1:], node.kwargs)})"
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return f"{short_name(node)}({_joined(node.args, node.kwargs)})"
    positional, keywords = [], {}
    given = named_arguments(node)
    own = target.namespace == "gaq"  # no defaults there: None and False are the usual case, left out
    skipped = False
    for argument in target._schema.arguments:
        value = given.get(argument.name)
        default = argument.default_value if argument.has_default_value() else None
        usual = not isinstance(value, Node) and (value is None or value == default)
        if usual or argument.name in _QUIET_KEYWORDS or (own and value is False):
            skipped = not own
        elif skipped or argument.kwarg_only or (own and value is True):
            keywords[argument.name] = value
        else:
            positional.append(value)
    return f"{short_name(node)}({_joined(positional, keywords)})"


def _joined(positional: Sequence[Any], keywords: dict[str, Any]) -> str:
    parts = [format_argument(a) for a in positional]
    parts += [f"{k}={format_argument(v)}" for k, v in keywords.items() if k not in _QUIET_KEYWORDS]
    return ", ".join(parts)


def format_argument(value: Any) -> str:
    """One argument as text; inline nodes are written out, long strings shortened."""
    if isinstance(value, Node):
        return _inline(value) if is_inline(value) else value.name
    if isinstance(value, str):
        return repr(shortened(value))
    if isinstance(value, (list, tuple)):
        inner = ", ".join(format_argument(item) for item in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, slice):
        ends = ["" if end is None else format_argument(end) for end in (value.start, value.stop)]
        return ":".join(ends) + ("" if value.step is None else f":{format_argument(value.step)}")
    if isinstance(value, float):
        return f"{value:.7g}"
    return str(value).removeprefix("torch.")


def _inline(node: Node) -> str:
    if node.op == "get_attr":
        return str(node.target)
    arguments = [format_argument(a) for a in node.args]
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    if node.target in _OPERATORS:
        return f"({arguments[0]} {_OPERATORS[node.target]} {arguments[1]})"  # type: ignore[index]
    return f"{arguments[0]}.size({', '.join(arguments[1:])})"


def shortened(text: str) -> str:
    """A spec string short enough for a line.

    Numbers lose their tails; where that is not enough, the list of instructions becomes its
    length and long irreps are simplified.

    >>> shortened("8x0e * 1x0e+1x1e -> 8x0e+8x1e" + "+8x1e+8x0e" * 5 + " | " + "0.0.0 0.1.1 " * 6)
    '8x0e * 1x0e+1x1e -> 48x0e+48x1e | 12 paths'
    """
    text = _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.5g}", text)
    if len(text) <= _LONGEST_TEXT:
        return text
    head, bar, tail = text.partition("|")
    head = _LONG_IRREPS.sub(lambda match: _sorted(match[0]), head.strip())
    text = f"{head} | {len(tail.split())} paths" if bar else head
    return text if len(text) <= 2 * _LONGEST_TEXT else text[: 2 * _LONGEST_TEXT - 3] + "..."


def _sorted(irreps: str) -> str:
    return str(Irreps(irreps).sort().irreps.simplify())


def format_value(value: Any) -> str:
    """``f32[s0, 128]`` for a tensor (symbolic sizes by name), a list for several; else ""."""
    if isinstance(value, (torch.Tensor, TracedTensor)):
        shape = ", ".join(str(size) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{shape}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(filter(None, (format_value(item) for item in value))) + ")"
    return ""


def note(node: Node) -> str:
    """``irreps | bits | runs on | label`` of a node, the parts that it has; of a group, its modules."""
    what = str(node.meta.get("irreps") or "") or format_value(node.meta.get("val"))
    label = label_of(node) or _listed(node.meta.get("modules", ()))
    parts = [what, str(node.meta.get("bits") or ""), str(node.meta.get("runs_on") or ""), label]
    return " | ".join(part for part in parts if part)


def _listed(modules: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = len(modules) - _NAMED
    return ", ".join(modules[:_NAMED]) + (f" and {more} more" if more > 0 else "")
