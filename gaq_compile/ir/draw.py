"""A graph as a picture: ``draw(graph_module, "stage.svg")`` or ``"stage.html"``.

Both files are self-contained. Boxes are coloured by what they compute, dashed where that is a
gradient; a badge says who runs a lowered node. What only moves or names data (weights, views, items
of tuples, sizes) is folded into the wires, and runs of plain elementwise operators into one box, so
that a potential of 500 nodes still fits the eye; ``fold=False`` draws every node.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
from torch.fx import GraphModule, Node

from ..errors import ConfigError
from .draw_layout import ROUTED_SPAN, Placed, place
from .draw_page import page
from .layout import lmax
from .printing import (
    format_call,
    format_value,
    is_inline,
    is_tensor,
    label_of,
    named_arguments,
    note,
    short_name,
)

# family -> (legend, fill, edge)
_FAMILIES = {
    "io": ("input, output", "#e2e8f0", "#334155"),
    "linear": ("irreps linear", "#dbeafe", "#2563eb"),
    "product": ("tensor product, convolution", "#ffedd5", "#ea580c"),
    "quantize": ("quantize", "#f3e8ff", "#9333ea"),
    "harmonics": ("spherical harmonics", "#dcfce7", "#16a34a"),
    "gate": ("gate", "#fce7f3", "#db2777"),
    "layout": ("layout, edges", "#fef9c3", "#a16207"),
    "lowered": ("lowered call", "#cffafe", "#0891b2"),
    "plain": ("plain torch", "#f4f4f5", "#a1a1aa"),
}
_KEYWORDS = (  # the first that occurs in the operator's name decides
    ("linear", "linear"),
    ("decode_weight", "linear"),
    ("conv", "product"),
    ("tensor_product", "product"),
    ("mddq", "quantize"),
    ("quantize", "quantize"),
    ("spherical", "harmonics"),
    ("gate", "gate"),
    ("relayout", "layout"),
    ("bonds", "layout"),
    ("sort_edges", "layout"),
)
_MOVES = frozenset(
    {"view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "expand", "permute"}
    | {
        "t",
        "transpose",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "getitem",
        "alias",
        "detach",
        "clone",
    }
    | {"contiguous", "to", "_to_copy", "type_as", "lift_fresh_copy"}
)
# shown elsewhere, or (stack_trace) full of paths of the machine that captured the graph
_SHOWN = frozenset({"irreps", "bits", "runs_on", "val", "stack_trace"})
_SIMPLE = (str, int, float, bool)
_CHAR, _LINE, _PAD = 7.05, 15.0, 9.0
_MAX_CHARS = 44
_HEADER = 64.0
_STYLE = (
    "text{font-family:'DejaVu Sans Mono',ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;"
    "font-size:11px;fill:#1f2937}"
    ".op{font-weight:bold;font-size:12px}.quiet{fill:#64748b}.title{font-size:17px;font-weight:bold}"
    ".wire{fill:none;stroke:#94a3b8;stroke-width:1.3}.far{stroke-width:1;opacity:.45}"
)


@dataclass(frozen=True)
class _Box:
    """One or several nodes drawn as one; the last of ``nodes`` gives its name and its value."""

    nodes: tuple[Node, ...]
    folded: tuple[Node, ...] = ()

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    @property
    def name(self) -> str:
        return self.last.name


def draw(graph_module: GraphModule, path: str | Path, *, fold: bool = True, title: str = "") -> Path:
    """Draw a graph into a file, by its suffix: ``.svg``, or ``.html`` with search and details.

    Shown for every node, as far as ``node.meta`` has it: ``irreps``, ``bits``, ``runs_on``; and the
    label of gaq operators. Shapes are in the tool-tips.

    Args:
        graph_module: any ``torch.fx`` graph.
        path: where to; its folder is made if need be.
        fold: leave out what only moves data and join runs of plain operators.
        title: a heading; by default the file's stem.

    Raises:
        ConfigError: for another suffix.
    """
    target = Path(path)
    if target.suffix not in (".svg", ".html"):
        raise ConfigError(f"cannot draw into {target.name!r}", fix="use a path ending in .svg or .html")
    boxes, graph = _boxes(graph_module, fold)
    total = sum(1 for _ in graph_module.graph.nodes)
    heading = title or target.stem
    svg = _svg(boxes, graph, heading, f"{total} nodes in {len(boxes)} boxes")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".html":
        target.write_text(page(svg, _details(boxes, graph), heading), encoding="utf-8")
    else:
        target.write_text(svg, encoding="utf-8")
    return target


def family(node: Node) -> str:
    """What a node is coloured as; a key of the legend."""
    if node.op in ("placeholder", "output"):
        return "io"
    name = short_name(node)
    if name.startswith("gaq"):
        short = name.rpartition(".")[2]
        return next((kind for word, kind in _KEYWORDS if word in short), "lowered")
    return "lowered" if str(node.meta.get("runs_on", "")).startswith("tvm") else "plain"


def _is_plain(node: Node) -> bool:
    return family(node) == "plain" and not any(node.meta.get(k) for k in ("bits", "runs_on"))


def _moves_data(node: Node) -> bool:
    """Views, items of tuples, copies; also a relayout of scalars, which is the identity."""
    if short_name(node) == "gaq.relayout":
        return lmax(str(named_arguments(node)["irreps"])) == 0
    short = short_name(node).rpartition(".")[2]
    return _is_plain(node) and short in _MOVES and len(_tensor_inputs(node)) == 1


def _tensor_inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.op != "get_attr" and is_tensor(n)]


def _boxes(graph_module: GraphModule, fold: bool) -> tuple[dict[str, _Box], nx.DiGraph]:
    """Boxes by name, and the wires between them."""
    nodes = list(graph_module.graph.nodes)
    graph = nx.DiGraph()
    if not fold:
        graph.add_nodes_from(n.name for n in nodes)
        graph.add_edges_from((i.name, n.name) for n in nodes for i in n.all_input_nodes)
        return {n.name: _Box((n,)) for n in nodes}, graph
    source: dict[Node, Node | None] = {}  # the visible node whose data a node carries; None: a constant
    folded: dict[Node, list[Node]] = {}
    boxes: dict[str, _Box] = {}
    for node in nodes:
        inputs = [(i, source[i]) for i in node.all_input_nodes]
        visible = [s for i, s in inputs if s is not None and is_tensor(i)]
        constant = _is_plain(node) and not visible
        if constant or (is_inline(node) and not (is_tensor(node) and node.users)):
            source[node], folded[node] = None, [x for i, _ in inputs for x in folded[i]] + [node]
        elif _moves_data(node) and len(set(visible)) == 1:
            source[node] = visible[0]
            folded[node] = [x for i, _ in inputs for x in folded[i]] + [node]
        else:
            source[node], folded[node] = node, []
            through = tuple(dict.fromkeys(x for i, _ in inputs for x in folded[i]))
            boxes[node.name] = _Box((node,), through)
            graph.add_node(node.name)
            graph.add_edges_from((s.name, node.name) for s in visible)
    return _joined(boxes, graph), graph


def _joined(boxes: dict[str, _Box], graph: nx.DiGraph) -> dict[str, _Box]:
    """Join every plain box whose only consumer is a plain box with no other input (changes ``graph``)."""
    for name in list(boxes):
        after = list(graph.successors(name))
        if len(after) != 1 or graph.in_degree(after[0]) != 1:
            continue
        a, b = boxes[name], boxes[after[0]]
        if not (_is_plain(a.last) and _is_plain(b.last)):
            continue
        boxes[b.name] = replace(b, nodes=a.nodes + b.nodes, folded=a.folded + b.folded)
        graph.add_edges_from((p, b.name) for p in graph.predecessors(name))
        graph.remove_node(name)
        del boxes[name]
    return boxes


def _op_line(box: _Box) -> str:
    names = [short_name(n).removeprefix("aten.").removeprefix("gaq.") for n in box.nodes]
    if len(names) == 1:
        node = box.last
        return f"{node.name}" if node.op == "placeholder" else names[0]
    shown = " · ".join(names[:4])
    return shown + (f" +{len(names) - 4}" if len(names) > 4 else "")


def _lines(box: _Box) -> list[tuple[str, str]]:
    """(css class, text) of each line of a box."""
    node = box.last
    found = [("op", _op_line(box))]
    if label_of(node):
        found.append(("quiet", label_of(node)))
    if node.meta.get("irreps"):
        found.append(("", str(node.meta["irreps"])))
    elif node.op == "placeholder" and format_value(node.meta.get("val")):
        found.append(("quiet", format_value(node.meta["val"])))
    return [(style, _cut(text)) for style, text in found]


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…"


def _badges(box: _Box) -> list[list[tuple[str, str, str]]]:
    """Rows of (text, fill, text colour): bits, and who runs the node; side by side if both are short."""
    found = []
    if box.last.meta.get("bits"):
        found.append((_cut(str(box.last.meta["bits"])), "#ffffff", "#6b21a8"))
    runs_on = str(box.last.meta.get("runs_on") or "")
    if runs_on:
        colors = ("#15803d", "#ffffff") if runs_on.startswith("tvm") else ("#fde68a", "#78350f")
        found.append((_cut(runs_on), *colors))
    if sum(len(text) for text, _, _ in found) <= _MAX_CHARS - 10:
        return [found] if found else []
    return [[badge] for badge in found]


def _size(box: _Box) -> tuple[float, float]:
    # the bold first line is one point larger
    widest = max(len(text) * (_CHAR + 0.6 * (style == "op")) for style, text in _lines(box))
    badges = _badges(box)
    widest = max([widest] + [sum(len(text) * _CHAR + 15 for text, _, _ in row) - 5 for row in badges])
    return widest + 2 * _PAD + 4, _LINE * len(_lines(box)) + 18.0 * len(badges) + 2 * _PAD - 4


def _svg(boxes: dict[str, _Box], graph: nx.DiGraph, title: str, subtitle: str) -> str:
    sizes = {name: _size(box) for name, box in boxes.items()}
    placed = place(graph, sizes)
    present = {family(box.last) for box in boxes.values()}
    legend, legend_width = _legend(present, boxes)
    width = max(placed.width, legend_width, 8.5 * len(title) + 7 * len(subtitle) + 60) + 48
    height = placed.height + _HEADER + 48
    shift = (width - placed.width) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text class="title" x="24" y="28">{escape(title)}'
        f'<tspan class="quiet" dx="14" font-size="12" font-weight="normal">{escape(subtitle)}</tspan></text>',
        legend,
        f'<g transform="translate({shift:.1f} {_HEADER + 16:.1f})">',
        *_wires(placed, graph),
        *(_box_svg(box, placed.centers[name], sizes[name], graph) for name, box in boxes.items()),
        "</g></svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend(present: set[str], boxes: dict[str, _Box]) -> tuple[str, float]:
    entries = [(text, fill, edge) for kind, (text, fill, edge) in _FAMILIES.items() if kind in present]
    runners = {str(box.last.meta.get("runs_on", ""))[:3] for box in boxes.values()} - {""}
    if "tvm" in runners:
        entries.append(("runs in TVM", "#15803d", "#15803d"))
    if runners - {"tvm"}:
        entries.append(("falls back to torch", "#fde68a", "#b45309"))
    parts, x = [], 24.0
    for text, fill, edge in entries:
        parts.append(
            f'<rect x="{x:.0f}" y="42" width="13" height="13" rx="3" fill="{fill}" stroke="{edge}"/>'
        )
        parts.append(f'<text class="quiet" x="{x + 19:.0f}" y="53">{escape(text)}</text>')
        x += 19 + len(text) * _CHAR + 20
    return "\n".join(parts), x


def _wires(placed: Placed, graph: nx.DiGraph) -> list[str]:
    """Far wires first, so that they lie behind; wires into one box end side by side."""
    lines = []
    for (a, b), points in placed.wires.items():
        before = sorted(graph.predecessors(b), key=lambda n: placed.wires[n, b][-2][0])
        spread = min(12.0, 90.0 / max(len(before), 1))
        x, y = points[-1]
        points = [*points[:-1], (x + spread * (before.index(a) - (len(before) - 1) / 2), y)]
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (x0, y0), (x1, y1) in pairwise(points):
            # long wires leave and arrive within a short distance, whatever their length
            reach = min((y1 - y0) / 2, 120.0)
            path += f"C{x0:.1f} {y0 + reach:.1f} {x1:.1f} {y1 - reach:.1f} {x1:.1f} {y1:.1f}"
        far = len(points) == 2 and points[1][1] - points[0][1] > 60.0 * ROUTED_SPAN
        attributes = f'data-a="{escape(a)}" data-b="{escape(b)}"'
        lines.append((not far, f'<path class="wire{" far" if far else ""}" {attributes} d="{path}"/>'))
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def _box_svg(box: _Box, center: tuple[float, float], size: tuple[float, float], graph: nx.DiGraph) -> str:
    (cx, cy), (w, h) = center, size
    left, top = cx - w / 2, cy - h / 2
    _, fill, edge = _FAMILIES[family(box.last)]
    gradient = "backward" in short_name(box.last) or named_arguments(box.last).get("transpose") is True
    dashed = ' stroke-dasharray="5 3"' if gradient else ""
    parts = [
        f'<g class="node" id="node-{escape(box.name)}" data-name="{escape(box.name)}">',
        f"<title>{escape(_tooltip(box))}</title>",
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{h:.1f}" rx="6" '
        f'fill="{fill}" stroke="{edge}" stroke-width="1.2"{dashed}/>',
        f'<rect x="{left:.1f}" y="{top + 5:.1f}" width="4" height="{h - 10:.1f}" rx="2" fill="{edge}"/>',
    ]
    y = top + _PAD + 8
    for style, text in _lines(box):
        css = f' class="{style}"' if style else ""
        parts.append(f'<text{css} x="{left + _PAD + 4:.1f}" y="{y:.1f}">{escape(text)}</text>')
        y += _LINE
    for row in _badges(box):
        x = left + _PAD + 2
        for text, background, color in row:
            width = len(text) * _CHAR + 10
            stroke = color if background == "#ffffff" else background
            parts.append(
                f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="{width:.1f}" height="15" rx="7" '
                f'fill="{background}" stroke="{stroke}" stroke-width="0.7"/>'
                f'<text x="{x + 5:.1f}" y="{y + 1.5:.1f}" style="fill:{color}">{escape(text)}</text>'
            )
            x += width + 5
        y += 18.0
    return "".join(parts) + "</g>"


def _tooltip(box: _Box) -> str:
    lines = [f"{n.name} = {format_call(n)}" if n.op.startswith("call") else n.name for n in box.nodes[-12:]]
    value = format_value(box.last.meta.get("val"))
    return "\n".join([*lines, *([value] if value else [])])


def _details(boxes: dict[str, _Box], graph: nx.DiGraph) -> str:
    """What the page's side panel shows, as JSON: per box its rows, nodes and neighbours."""
    found: dict[str, Any] = {}
    for name, box in boxes.items():
        node = box.last
        rows = {
            "operator": str(node.target),
            "label": label_of(node),
            "irreps": str(node.meta.get("irreps") or ""),
            "bits": str(node.meta.get("bits") or ""),
            "runs on": str(node.meta.get("runs_on") or ""),
            "value": format_value(node.meta.get("val")),
        }
        rows |= {k: str(v) for k, v in node.meta.items() if k not in _SHOWN and isinstance(v, _SIMPLE)}
        found[name] = {
            "rows": {key: value for key, value in rows.items() if value},
            "code": [_code(n) for n in box.nodes],
            "folded": [_code(n) for n in box.folded if n.op != "get_attr"],
            "weights": [str(n.target) for n in box.folded if n.op == "get_attr"],
            "inputs": sorted(graph.predecessors(name)),
            "outputs": sorted(graph.successors(name)),
            "text": " ".join(
                [name, *(f"{n.name} {short_name(n)}" for n in box.nodes), *rows.values()]
            ).lower(),
        }
    return json.dumps(found)


def _code(node: Node) -> str:
    if not node.op.startswith("call"):
        return node.name
    comment = note(node)
    return f"{node.name} = {format_call(node)}" + (f"  # {comment}" if comment else "")
