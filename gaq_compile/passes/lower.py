"""Each gaq node and each group of rows to the first backend that says it can run it; the rest falls back.

Before: ``y = gaq.int_irreps_linear(x, steps, codes, scale, None, spec, 's8 m8d8', 8, False, label)``
After:  ``y = self.tvm_label(x)``   with ``node.meta["runs_on"] == "tvm s8·s8→s32 + s16·s8→s32"``
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rich.progress import Progress
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..errors import LoweringError
from .graph_tools import attribute, copied, finished, gaq, is_gaq
from .row_groups import FusedRows, fused_rows

# Ordering edges is index work, not arithmetic: it stays with torch by design, not by fallback.
HOST_OPERATORS = (gaq.bonds.default, gaq.sort_edges.default)


Attribute = Callable[[Node], Tensor]


@dataclass(frozen=True)
class Lowered:
    """A node's replacement.

    Attributes:
        run: the kernel call, ``run(*tensors)`` with the values of ``arguments``.
        arithmetic: what it computes in, e.g. ``"s8·s8→s32"``.
        arguments: those of the node's arguments that are given at run time; weights are inside.
        within: of a group, what each gaq operator in it computes in.
    """

    run: Callable[..., Any]
    arithmetic: str
    arguments: tuple[Any, ...]
    within: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Why a backend does not run a node."""

    reason: str


class Backend(Protocol):
    """Something that runs gaq operators.

    Attributes:
        name: as it was registered.
        target: what it generates code for.
        groups_linears: whether its kernels for groups of rows take linears in.
        groups_sums: whether they take sums over the ends of edges in.
        stores_halves: whether its linears and convolutions read and write float16.
    """

    name: str
    target: str
    groups_linears: bool
    groups_sums: bool
    stores_halves: bool

    def lower(self, node: Node, attribute: Attribute) -> Lowered | Refused:
        """A kernel for ``node``, or the reason there is none.

        Args:
            node: a call of a ``gaq::`` operator.
            attribute: reads the tensor behind a ``get_attr`` node.
        """

    def lower_rows(self, fused: FusedRows) -> Lowered | Refused:
        """A kernel for a group of torch's operators, whose arguments and results are the group's own."""


@dataclass(frozen=True)
class Placement:
    """Who runs one gaq node.

    Attributes:
        node: the node's name in the lowered graph.
        label: the module it came from.
        op: the operator's name.
        backend: the backend that took it.
        arithmetic: what it computes in.
        reason: why the wanted backend refused, if it did.
        integer_weights: whether the node holds integer weights.
    """

    node: str
    label: str
    op: str
    backend: str
    arithmetic: str
    reason: str | None
    integer_weights: bool


class KernelCall(nn.Module):
    """A backend's kernel as a module of the lowered graph."""

    def __init__(self, run: Callable[..., Any], description: str) -> None:
        super().__init__()
        self.run, self.description = run, description

    def forward(self, *arguments: Any) -> Any:
        return self.run(*map(compact, arguments))

    def extra_repr(self) -> str:
        return self.description


def compact(argument: Any) -> Any:
    """Kernels take rows without gaps; an empty tensor may keep strides that say otherwise."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.contiguous() if argument.numel() else argument.new_empty(argument.shape)


def lower(
    graph_module: GraphModule, backends: Sequence[Backend], strict: bool = False, progress: bool = False
) -> tuple[GraphModule, tuple[Placement, ...]]:
    """Replace every gaq node by a backend's kernel.

    Args:
        graph_module: the graph after ``fold_integers``.
        backends: in order of preference; the last must run everything.
        strict: raise instead of falling back.
        progress: show a progress bar (kernels may have to be compiled).

    Returns:
        The lowered graph and one :class:`Placement` per gaq node.

    Raises:
        LoweringError: with ``strict``, naming every node that would fall back and why.
    """
    gm = copied(graph_module)
    nodes = [n for n in gm.graph.nodes if is_gaq(n) and n.target not in HOST_OPERATORS]
    groups = [(n, fused) for n in gm.graph.nodes if (fused := fused_rows(gm, n)) is not None]
    placements: list[Placement] = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("lowering", total=len(nodes) + len(groups))
        for node in nodes:
            placements.append(_place(gm, node, backends))
            bar.advance(task)
        for node, fused in groups:
            placements += _place_rows(gm, node, fused, backends)
            bar.advance(task)
    refused = [p for p in placements if p.reason is not None]
    if strict and refused:
        lines = "\n".join(f"    {p.label} ({p.op}): {p.reason}" for p in refused)
        raise LoweringError(f"{len(refused)} nodes have no kernel:\n{lines}", fix="use strict=False")
    return finished(gm), tuple(placements)


def _place(gm: GraphModule, node: Node, backends: Sequence[Backend]) -> Placement:
    reasons: list[str] = []
    for backend in backends:
        answer = backend.lower(node, lambda n: attribute(gm, n))
        if isinstance(answer, Refused):
            reasons.append(f"{backend.name}: {answer.reason}")
            continue
        new = _replace(gm, node, backend, answer, reasons)
        return Placement(
            node=new.name,
            label=_label(node),
            op=_operator(node),
            backend=backend.name,
            arithmetic=answer.arithmetic,
            reason="; ".join(reasons) or None,
            integer_weights=node.target is gaq.int_irreps_linear.default,
        )
    raise LoweringError(f"no backend runs {node.target}", where=_label(node), fix="; ".join(reasons))


def _place_rows(
    gm: GraphModule, node: Node, fused: FusedRows, backends: Sequence[Backend]
) -> list[Placement]:
    """The group's module becomes a kernel's, or stays as it is and torch runs it.

    Returns:
        One placement for the group, and one for each gaq operator in it.
    """
    reasons: list[str] = []
    for backend in backends:
        answer = backend.lower_rows(fused)
        if isinstance(answer, Refused):
            reasons.append(f"{backend.name}: {answer.reason}")
            continue
        text = " + ".join(dict.fromkeys((answer.arithmetic, *answer.within)))
        setattr(gm, str(node.target), KernelCall(answer.run, f"{backend.name} {text}"))
        node.meta["runs_on"] = f"{backend.name} {text}"
        node.meta["label"], node.meta["op"] = str(node.target), "rows"
        whole = Placement(
            node=node.name,
            label=f"{fused.operators} operators on {fused.rows}s",
            op="rows",
            backend=backend.name,
            arithmetic=answer.arithmetic,
            reason="; ".join(reasons) or None,
            integer_weights=False,
        )
        inner = [n for n in fused.graph.nodes if is_gaq(n)]
        node.meta["modules"] = tuple(_label(part) for part in inner)
        parts = [
            replace(
                whole,
                label=_label(part),
                op=_operator(part),
                arithmetic=arithmetic,
                integer_weights=part.target is gaq.int_irreps_linear.default,
            )
            for part, arithmetic in zip(inner, answer.within, strict=True)
        ]
        return [whole, *parts]
    raise LoweringError(f"no backend runs {node.target}", fix="; ".join(reasons))


def _operator(node: Node) -> str:
    return str(node.target).removesuffix(".default").replace(".", "::")


def _label(node: Node) -> str:
    return str(node.args[-1])


def _replace(gm: GraphModule, node: Node, backend: Backend, answer: Lowered, reasons: list[str]) -> Node:
    text = f"{backend.name} {answer.arithmetic}" + (f" ({'; '.join(reasons)})" if reasons else "")
    with gm.graph.inserting_before(node):
        if backend.name == "reference":
            new = gm.graph.call_function(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        else:
            new = gm.graph.call_module(_add_module(gm, node, backend, answer, text), answer.arguments)
    new.meta = dict(node.meta)
    new.meta["runs_on"], new.meta["label"] = text, _label(node)
    new.meta["op"] = str(node.target).removesuffix(".default")
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def _add_module(gm: GraphModule, node: Node, backend: Backend, answer: Lowered, text: str) -> str:
    """Register the kernel under its label's name; the gradient's kernel ends in ``_grad``."""
    operator = str(node.target)
    gradient = "backward" in operator or ("irreps_linear" in operator and node.args[-2] is True)
    label = f"{_label(node)}.quantize" if "mddq" in operator else _label(node)
    clean = "".join(c if c.isalnum() else "_" for c in f"{backend.name}_{label}{'_grad' if gradient else ''}")
    free, count = clean, 1
    while hasattr(gm, free):
        free, count = f"{clean}_{count}", count + 1
    gm.add_module(free, KernelCall(answer.run, text))
    return free
