"""scalar_products: products with ones on one side become operators that work row by row."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from gaq_compile.ir.layout import dim
from gaq_compile.ir.specs import tensor_product_spec
from gaq_compile.passes.graph_tools import calls
from gaq_compile.passes.row_shapes import RowShape
from gaq_compile.passes.scalar_products import scalar_products

aten, gaq = torch.ops.aten, torch.ops.gaq
VECTORS = "1x1o+1x2e+1x3o"
CONV = f"1x0e * {VECTORS} -> {VECTORS} | 0.0.0*1.7 0.1.1*2.2 0.2.2*0.3"
PRODUCT = f"{VECTORS} * 1x0e -> {VECTORS} | 0.0.0*1.7 1.0.1*2.2 2.0.2*0.3"
ATOMS, EDGES = 5, 12


class _Built:
    """A graph of one product and, for a gradient, those of its parts that are asked for."""

    def __init__(self, spec: str, *, conv: bool, parts: tuple[int, ...] = (), ones: bool = True) -> None:
        s, rows = tensor_product_spec(spec), "edge" if conv else "atom"
        self.graph, self.shapes = Graph(), dict[Node, RowShape]()
        self.sizes = {"atom": ATOMS, "edge": EDGES}
        x, sh, weight = (
            self.given(name, kind, size)
            for name, kind, size in (
                ("x", "atom", dim(s.irreps_x)), ("sh", rows, dim(s.irreps_sh)), ("w", rows, s.weight_numel),
            )
        )  # fmt: skip
        receivers, senders = (self.given(name, "edge", 0, torch.int64) for name in ("receivers", "senders"))
        count = self.graph.call_function(aten.sym_size.int, (x, 0))
        if ones:
            made = self.graph.call_function(aten.ones.default, ([count, 1],))
            self.shapes[made] = RowShape("atom", (1,), torch.float32)
            x, sh = (made, sh) if conv else (x, made)
        operands: tuple[object, ...] = (x, sh, weight)
        if conv:
            edges = self.graph.call_function(gaq.sort_edges.default, (senders, receivers, count))
            operands += ([self.graph.call_function(operator.getitem, (edges, k)) for k in range(6)],)
        target = gaq.conv if conv else gaq.tensor_product
        if parts:
            grad = self.given("grad", "atom", dim(s.irreps_out))
            operands, target = (grad, *operands), getattr(gaq, f"{target.__name__}_backward")
        node = self.graph.call_function(target.default, (*operands, spec, "label"))
        result = [self.graph.call_function(operator.getitem, (node, k)) for k in parts] if parts else [node]
        self.shapes[node] = RowShape("atom", (dim(s.irreps_out),), torch.float32)
        self.graph.output(tuple(result))
        self.gm, self.target = GraphModule({}, self.graph), target.default

    def given(self, name: str, rows: str, size: int, dtype: torch.dtype = torch.float32) -> Node:
        node = self.graph.placeholder(name)
        self.shapes[node] = RowShape(rows, (size,) if size else (), dtype)
        return node

    def inputs(self) -> list[Tensor]:
        generator, found = torch.Generator().manual_seed(3), []
        for node in (n for n in self.gm.graph.nodes if n.op == "placeholder"):
            shape = self.shapes[node]
            size = (self.sizes[str(shape.rows)], *shape.row)
            if shape.dtype is torch.int64:
                found.append(torch.randint(0, ATOMS, size, generator=generator))
            else:
                found.append(torch.randn(size, generator=generator))
        return found

    def rewritten(self) -> bool:
        scalar_products(self.gm, self.shapes)
        self.gm.graph.lint()
        self.gm.recompile()
        return not list(calls(self.gm, self.target))


@pytest.mark.parametrize(("spec", "conv"), [(CONV, True), (PRODUCT, False)])
@pytest.mark.parametrize("gradient", [False, True])
def test_results_are_what_they_were(spec: str, conv: bool, gradient: bool) -> None:
    built = _Built(spec, conv=conv, parts=((1 if conv else 0, 2) if gradient else ()))
    inputs = built.inputs()
    expected = built.gm(*inputs)
    assert built.rewritten()
    for a, b in zip(built.gm(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_components_without_a_weight_are_zero() -> None:
    built = _Built(f"1x0e * {VECTORS} -> {VECTORS} | 0.0.0 0.2.2*0.3", conv=True)
    inputs = built.inputs()
    (expected,) = built.gm(*inputs)
    assert built.rewritten()
    (found,) = built.gm(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not found[:, 3:8].any()


@pytest.mark.parametrize(
    "built",
    [
        lambda: _Built(CONV, conv=True, ones=False),
        lambda: _Built(PRODUCT, conv=False, ones=False),
        lambda: _Built(CONV, conv=True, parts=(0, 1)),  # the gradient of the ones is asked for
        lambda: _Built("1x0e * 1x0e+1x1o -> 1x1o+1x0e | 0.0.1 0.1.0", conv=True),  # another order
        lambda: _Built("1x0e * 1x1o -> 1x1o+1x1o | 0.0.0 0.0.1", conv=True),  # two results of one vector
    ],
)
def test_what_is_left_alone(built: Callable[[], _Built]) -> None:
    assert not built().rewritten()


def test_weights_of_bonds_are_left_alone() -> None:
    built = _Built(CONV, conv=True)
    weight = next(n for n in built.shapes if n.name == "w")
    built.shapes[weight] = RowShape("bond", built.shapes[weight].row, torch.float32)
    assert not built.rewritten()
