from __future__ import annotations

import json
import operator
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import networkx as nx
import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from gaq_compile.errors import ConfigError
from gaq_compile.ir.draw import draw, family
from gaq_compile.ir.draw_layout import place
from gaq_compile.ir.printing import format_graph, label_of, short_name, shortened

SVG = "{http://www.w3.org/2000/svg}"


@torch.library.custom_op("gaq::draw_test_linear", mutates_args=())
def draw_test_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: str, transpose: bool, label: str
) -> torch.Tensor:
    return x @ weight


def _module() -> GraphModule:
    """x -> linear (8x0e) -> view -> mul, add, sin, + x; sizes, constants and a tuple on the way."""
    root = nn.Module()
    root.register_buffer("weight", torch.ones(4, 4))
    graph, aten = Graph(), torch.ops.aten
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 4, device="meta")
    weight = graph.get_attr("weight")
    linear = graph.call_function(
        torch.ops.gaq.draw_test_linear.default, (x, weight, None, "4x0e -> 4x0e", False, "block_0.linear")
    )
    linear.meta |= {"irreps": "4x0e", "bits": "s8 m8d8 · s8", "runs_on": "tvm s8·s8→s32"}
    size = graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = 3
    view = graph.call_function(aten.view.default, (linear, [size, 4]))
    mul = graph.call_function(aten.mul.Tensor, (view, 0.123456789))
    add = graph.call_function(aten.add.Tensor, (mul, 1.0))
    sine = graph.call_function(aten.sin.default, (add,))
    zeros = graph.call_function(aten.zeros.default, ([3, 4],), {"device": torch.device("cpu")})
    total = graph.call_function(aten.add.Tensor, (sine, x))
    final = graph.call_function(aten.add.Tensor, (total, zeros))
    parts = graph.call_function(aten.split.Tensor, (final, 2, 1))
    first = graph.call_function(operator.getitem, (parts, 0))
    first.meta["runs_on"] = "torch (<no kernel> & no plan)"
    graph.output((first,))
    return GraphModule(root, graph)


def _shown(svg: str) -> dict[str, ET.Element]:
    tree = ET.fromstring(svg)
    return {g.attrib["data-name"]: g for g in tree.iter(f"{SVG}g") if g.get("class") == "node"}


def _no_outside_references(text: str) -> None:
    without_namespace = text.replace("http://www.w3.org/2000/svg", "")
    assert "://" not in without_namespace
    assert not re.search(r"\b(?:src|href)\s*=|@import|url\(", without_namespace)


def test_text_of_a_graph():
    text = format_graph(_module())
    lines = text.splitlines()
    assert lines[0] == "def forward(x):"
    assert lines[1] == "    # x: f32[3, 4]"
    (linear,) = [line for line in lines if "4x0e ->" in line]
    code, _, comment = linear.partition("  # ")
    assert code.strip() == "draw_test_linear_default = gaq.draw_test_linear(x, weight, '4x0e -> 4x0e')"
    assert comment == "4x0e | s8 m8d8 · s8 | tvm s8·s8→s32 | block_0.linear"
    assert "view_default = aten.view(draw_test_linear_default, [x.size(0), 4])" in text
    assert "aten.mul(view_default, 0.1234568)" in text
    assert "zeros_default = aten.zeros([3, 4])\n" in text  # no device
    assert lines[-1] == "    return (split_tensor[0],)"
    assert "sym_size" not in text and "getitem" not in text


def test_comments_are_aligned():
    module = _module()
    for node in module.graph.nodes:
        node.meta.setdefault("irreps", "4x0e")
    columns = {line.index("  # ") for line in format_graph(module).splitlines() if "  # " in line.strip()}
    assert len(columns) == 1


def test_specs_are_shortened_without_losing_what_they_say():
    assert shortened("4x0e -> 4x0e") == "4x0e -> 4x0e"
    assert shortened("silu*1.6791767923989418") == "silu*1.6792"
    spec = "8x0e+8x1e * 1x0e+1x1e -> " + "+".join(["8x0e", "8x1e"] * 4) + " | " + "0.0.0 1.1.0 " * 4
    assert shortened(spec) == "8x0e+8x1e * 1x0e+1x1e -> 32x0e+32x1e | 8 paths"


def test_names_and_families():
    nodes = {n.name: n for n in _module().graph.nodes}
    linear = nodes["draw_test_linear_default"]
    assert short_name(linear) == "gaq.draw_test_linear" and label_of(linear) == "block_0.linear"
    assert family(linear) == "linear" and family(nodes["x"]) == "io"
    assert family(nodes["mul_tensor"]) == "plain" and label_of(nodes["mul_tensor"]) == ""


def test_folded_picture_keeps_what_computes(tmp_path):
    path = draw(_module(), tmp_path / "new" / "stage.svg", title="after <lower>")
    svg = path.read_text(encoding="utf-8")
    shown = _shown(svg)
    # weights, sizes, views, constants and the split are in the wires; mul, add, sin are one box
    assert set(shown) == {
        "x",
        "draw_test_linear_default",
        "sin_default",
        "add_tensor_2",
        "getitem",
        "output",
    }
    words = " ".join(shown["draw_test_linear_default"].itertext())
    for part in ("draw_test_linear", "block_0.linear", "4x0e", "s8 m8d8 · s8", "tvm s8·s8→s32"):
        assert part in words
    assert "mul · add · sin" in " ".join(shown["sin_default"].itertext())
    assert "f32[3, 4]" in " ".join(shown["x"].itertext())
    assert "after &lt;lower&gt;" in svg
    _no_outside_references(svg)


def test_every_node_is_drawn_without_folding(tmp_path):
    module = _module()
    svg = draw(module, tmp_path / "all.svg", fold=False).read_text(encoding="utf-8")
    assert set(_shown(svg)) == {n.name for n in module.graph.nodes}
    wires = {(w.get("data-a"), w.get("data-b")) for w in ET.fromstring(svg).iter(f"{SVG}path")}
    assert wires == {(i.name, n.name) for n in module.graph.nodes for i in n.all_input_nodes}


def test_a_node_that_says_who_runs_it_is_never_folded(tmp_path):
    svg = draw(_module(), tmp_path / "s.svg").read_text(encoding="utf-8")
    assert "torch (&lt;no kernel&gt; &amp; no plan)" in svg
    assert "falls back to torch" in svg and "runs in TVM" in svg


def test_page_is_self_contained_and_holds_the_details(tmp_path):
    module = _module()
    next(iter(module.graph.nodes)).meta["note"] = "</script><b>"
    text = draw(module, tmp_path / "stage.html").read_text(encoding="utf-8")
    _no_outside_references(text)
    assert text.count("</script>") == 2
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    data = json.loads(found[1])
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    assert set(data) == set(_shown(svg))
    rows = data["draw_test_linear_default"]
    assert rows["rows"]["bits"] == "s8 m8d8 · s8" and rows["weights"] == ["weight"]
    assert rows["inputs"] == ["x"] and rows["outputs"] == ["sin_default"]
    assert data["x"]["rows"]["note"] == "</script><b>"


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot draw into"):
        draw(_module(), tmp_path / "graph.pdf")


def test_boxes_do_not_overlap_and_wires_run_down():
    graph = nx.gnp_random_graph(60, 0.06, seed=3, directed=True)
    graph = nx.DiGraph((f"n{a}", f"n{b}") for a, b in graph.edges if a < b)
    sizes = {n: (40.0 + 7 * (i % 9), 20.0 + 5 * (i % 4)) for i, n in enumerate(graph.nodes)}
    placed = place(graph, sizes)
    boxes = [(*placed.centers[n], *sizes[n]) for n in graph.nodes]
    for i, (x, y, w, h) in enumerate(boxes):
        assert w / 2 - 1e-6 <= x <= placed.width - w / 2 + 1e-6 and h / 2 <= y <= placed.height
        for u, v, s, t in boxes[:i]:
            assert abs(x - u) >= (w + s) / 2 or abs(y - v) >= (h + t) / 2
    assert set(placed.wires) == set(graph.edges)
    for points in placed.wires.values():
        assert all(low[1] > high[1] for high, low in pairwise(points))
    assert place(nx.DiGraph(), {}).height == 0.0
