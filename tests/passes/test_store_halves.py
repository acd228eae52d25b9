"""store_halves: radial weights rounded to half precision are stored so, where nobody else reads them."""

from __future__ import annotations

from operator import getitem

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from gaq_compile.ir.specs import GRADIENT_EXPONENT
from gaq_compile.passes.graph_tools import calls
from gaq_compile.passes.row_shapes import RowShape
from gaq_compile.passes.store_halves import store_halves

aten, gaq = torch.ops.aten, torch.ops.gaq
PRODUCT = "4x0e * 1x1o -> 4x1o | 0.0.0"
ATOMS, EDGES = 3, 6


class _Radial:
    """Radial features -> weights -> a convolution, and its gradient with respect to the features."""

    def __init__(
        self, linear: str = "2x0e -> 4x0e", more: str = "", exponent: int = GRADIENT_EXPONENT
    ) -> None:
        g = torch.Generator().manual_seed(0)
        self.graph, self.root, self.shapes = Graph(), nn.Module(), dict[Node, RowShape]()
        size = 8 * (2 if "|" in linear else 1)
        codes = torch.randint(-99, 99, (size,), dtype=torch.int8, generator=g)
        self.root.register_buffer("codes", codes)
        self.root.register_buffer("scale", torch.rand(size // 2, generator=g) * 0.01)
        inputs = ["r", "x", "sh", "grad", *(f"e{k}" for k in range(6))]
        self.r, self.x, self.sh, self.grad, *self.edges = (self.graph.placeholder(name) for name in inputs)
        self.rounded = self.half(self.linear(self.r, linear, False), 0)
        out = self.call(gaq.conv.default, self.x, self.sh, self.rounded, self.edges, PRODUCT, "conv")
        arguments = (self.grad, self.x, self.sh, self.rounded, self.edges, PRODUCT, "conv")
        backward = self.call(gaq.conv_backward.default, *arguments)
        found = [out, *(self.graph.call_function(getitem, (backward, k)) for k in range(2))]
        self.to_weight = self.graph.call_function(getitem, (backward, 2))
        self.shapes[self.to_weight] = self.shapes[self.rounded]
        found.append(self.linear(self.half(self.to_weight, exponent), linear, True))
        if more:
            found.append(
                self.call(aten.neg.default, {"weight": self.rounded, "gradient": self.to_weight}[more])
            )
        self.graph.output(tuple(found))

    def call(self, target: object, *args: object) -> Node:
        node = self.graph.call_function(target, args)
        self.shapes[node] = RowShape("edge", (4,), torch.float32)
        return node

    def linear(self, x: Node, spec: str, transpose: bool) -> Node:
        with_codes = (x, None, self.graph.get_attr("codes"), self.graph.get_attr("scale"), None)
        scheme = "g16" if transpose else "f32"
        return self.call(gaq.int_irreps_linear.default, *with_codes, spec, scheme, 8, transpose, "layer")

    def half(self, x: Node, exponent: int) -> Node:
        return self.call(gaq.round_half.default, x, exponent, "conv")

    def module(self) -> GraphModule:
        return GraphModule(self.root, self.graph)


def _inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    ends = torch.randint(0, ATOMS, (2, EDGES), generator=g)
    rows = [torch.randn(n, w, generator=g) for n, w in ((EDGES, 2), (ATOMS, 4), (EDGES, 3), (ATOMS, 12))]
    return [*rows, *gaq.sort_edges(ends[0], ends[1], ATOMS)]


def _stored(radial: _Radial) -> GraphModule:
    gm = radial.module()
    store_halves(gm, radial.shapes)
    gm.graph.lint()
    gm.recompile()
    return gm


def test_before_and_after(listing):
    radial = _Radial()
    lines = listing(radial.module())
    assert "round_half_default = gaq.round_half(int_irreps_linear_default, 0)" in lines
    after = _stored(radial)
    text = "\n".join(listing(after))
    assert "round_half" not in text
    assert text.count("'2x0e -> 4x0e ; f16'") == 2
    assert text.count(f"'{PRODUCT} ; f16'") == 2
    halves = [
        n.name
        for n, shape in radial.shapes.items()
        if n in after.graph.nodes and shape.dtype is torch.float16
    ]
    assert halves == ["int_irreps_linear_default", radial.to_weight.name]


def test_nothing_but_the_type_changes():
    before, inputs = _Radial().module(), _inputs()
    after = _stored(_Radial())
    for a, b in zip(before(*inputs), after(*inputs), strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b) and bool(a.any())
    seen = []

    class Types(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            seen.append(getattr(value, "dtype", None))
            return value

    Types(after).run(*inputs)
    assert seen.count(torch.float16) == 2


@pytest.mark.parametrize("more", ["weight", "gradient"])
def test_what_somebody_else_reads_stays_as_it_is(more, listing):
    radial = _Radial(more=more)
    before = listing(radial.module())
    assert listing(_stored(radial)) == before


def test_another_unit_stays_as_it_is(listing):
    radial = _Radial(exponent=3)
    before = listing(radial.module())
    assert listing(_stored(radial)) == before


def test_a_block_with_two_paths_stays_as_it_is(listing):
    """Its second product would add to a sum that is rounded already."""
    radial = _Radial("2x0e+2x0e -> 4x0e | 0:0 1:0")
    before = listing(radial.module())
    assert listing(_stored(radial)) == before


def test_a_weight_that_no_linear_makes_stays_as_it_is(listing):
    radial = _Radial()
    product = next(calls(radial.module(), gaq.round_half.default)).args[0]
    with radial.graph.inserting_after(product):
        negative = radial.graph.call_function(aten.neg.default, (product,))
    radial.rounded.update_arg(0, negative)
    before = listing(radial.module())
    assert listing(_stored(radial)) == before
