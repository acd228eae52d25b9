"""plain_sizes: numbers of rows are asked of inputs, and ones and zeros are made of nothing else."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.passes.graph_tools import copied, finished
from gaq_compile.passes.plain_sizes import plain_sizes
from gaq_compile.passes.row_shapes import PRIMES, RowShape, row_shapes

aten = torch.ops.aten
FORM = GraphFormat(("edge_vec", "numbers", "receivers", "batch", "ptr"), 5.0)
CHARGED = GraphFormat((*FORM.inputs, "charge"), 5.0)


def _inputs(atoms: int, edges: int, charge: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(atoms)
    receivers, half = torch.randint(0, atoms, (edges,), generator=g), atoms // 2
    batch, ptr = (torch.arange(atoms) >= half).long(), torch.tensor([0, half, atoms])
    found = [torch.randn(edges, 3, generator=g), torch.ones(atoms, dtype=torch.int64), receivers, batch, ptr]
    return [*found, torch.zeros(2)] if charge else found


@pytest.fixture
def after(trace, listing) -> Callable[..., tuple[GraphModule, list[str]]]:
    """Traces a function of the inputs, and gives the graph after the pass, and its calls.

    Results are what they were, for the numbers of atoms and edges that it was traced with and for others.
    """

    def run(function, form: GraphFormat = FORM) -> tuple[GraphModule, list[str]]:
        charge = "charge" in form.inputs
        gm = trace(function, *_inputs(5, 7, charge))
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for node, name in zip(placeholders, form.inputs, strict=True):
            node.target = node.name = name
        changed = copied(finished(gm))
        plain_sizes(changed, form, row_shapes(changed, form))
        finished(changed)
        for sizes in ((5, 7), (4, 11), (9, 1)):
            inputs = _inputs(*sizes, charge)
            for a, b in zip(_flat(gm(*inputs)), _flat(changed(*inputs)), strict=True):
                assert not isinstance(a, Tensor) or (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        return changed, listing(changed)

    return run


def _flat(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def _sources(gm: GraphModule) -> list[str]:
    """What sizes are asked of."""
    return [n.args[0].name for n in gm.graph.nodes if n.target is aten.sym_size.int]


def test_sizes_are_asked_of_inputs(after) -> None:
    def function(vec, numbers, receivers, batch, ptr):
        total = torch.zeros(numbers.shape[0], 3).index_add(0, receivers, torch.exp(vec))
        return total / total.shape[0], vec[:, :2] * total[receivers].sin().shape[0]

    gm, _ = after(function)
    assert set(_sources(gm)) == {"numbers", "receivers"} and len(_sources(gm)) == 2
    order = [n.op for n in gm.graph.nodes]
    assert order[:7] == ["placeholder"] * 5 + ["call_function"] * 2  # known before anything is computed


def test_vectors_are_asked_last(after) -> None:
    """How many edges there are is known while only their vectors change."""
    gm, _ = after(lambda vec, numbers, receivers, batch, ptr: torch.exp(vec) * vec.shape[0])
    assert _sources(gm) == ["receivers"]


def test_other_sizes_stay(after) -> None:
    def function(vec, numbers, receivers, batch, ptr):
        turned = torch.exp(vec).t()
        return turned * turned.shape[1]

    gm, _ = after(function)
    assert aten.sym_size.int in _targets(gm)


@pytest.mark.parametrize("charged", [False, True])
def test_graphs_are_counted_by_pointers_where_there_is_no_charge(after, charged: bool) -> None:
    def function(vec, numbers, receivers, batch, ptr, *charge):
        energy = torch.zeros(ptr.shape[0] - 1).index_add(0, batch, numbers * 0.5)
        energy = energy + charge[0] if charge else energy
        return energy, torch.ones_like(energy) * torch.exp(energy).shape[0]

    gm, _ = after(function, CHARGED if charged else FORM)
    ones = next(n for n in gm.graph.nodes if n.target is aten.ones.default)
    (rows,) = ones.args[0]
    if charged:
        assert rows.target is aten.sym_size.int and rows.args[0].name == "charge"
    else:
        assert rows.target is operator.sub and rows.args[0].args[0].name == "ptr" and rows.args[1] == 1


FILLS = {
    "ones_like": lambda x: torch.ones_like(x),
    "zeros_like": lambda x: torch.zeros_like(x),
    "new_ones": lambda x: x.new_ones(x.shape[0], 4),
    "new_zeros": lambda x: x.new_zeros(x.shape[0]),
    "of another type": lambda x: torch.zeros_like(x, dtype=torch.float64),
    "of whole numbers": lambda x: torch.ones_like(x, dtype=torch.int64),
    "of flags": lambda x: torch.ones_like(x, dtype=torch.bool),
    "converted": lambda x: torch.ones_like(x).double(),
    "narrowed": lambda x: torch.ones_like(x).to(torch.int32),
    "with an axis more": lambda x: torch.ones_like(x).unsqueeze(1),
    "with an axis less": lambda x: x.new_zeros(x.shape[0], 1).squeeze(1),
    "expanded": lambda x: x.new_ones(x.shape[0], 1).expand(-1, 5),
    "in another shape": lambda x: x.new_zeros(x.shape[0], 6).view(-1, 2, 3),
    "without axes, expanded": lambda x: x.new_ones(()).expand(x.shape[0]),
    "without axes, expanded to rows": lambda x: x.new_ones(()).expand(x.shape[0], 3).unsqueeze(2),
    "without rows": lambda x: x.new_zeros(2, 3),
}


@pytest.mark.parametrize("name", FILLS)
def test_fills_are_made_of_sizes(after, name: str) -> None:
    """Of one operator each, and nothing that is computed."""
    fill = FILLS[name]
    gm, _ = after(lambda vec, numbers, receivers, batch, ptr: fill(torch.exp(vec)))
    *sizes, made = _targets(gm)
    assert made in (aten.ones.default, aten.zeros.default) and set(sizes) <= {aten.sym_size.int}


def test_shapes_of_new_nodes_are_known(trace) -> None:
    gm = trace(lambda vec, *rest: torch.ones_like(vec).double(), *_inputs(5, 7))
    for node, name in zip([n for n in gm.graph.nodes if n.op == "placeholder"], FORM.inputs, strict=True):
        node.target = node.name = name
    shapes = row_shapes(gm, FORM)
    plain_sizes(gm, FORM, shapes)
    (fill,) = [n for n in gm.graph.nodes if n.target is aten.ones.default]
    assert shapes[fill] == RowShape("edge", (3,), torch.float64)
    assert fill.kwargs == {"dtype": torch.float64, "device": torch.device("cpu")}


def test_what_is_filled_with_other_numbers_stays(after) -> None:
    gm, _ = after(lambda vec, numbers, receivers, batch, ptr: torch.full_like(torch.exp(vec), 2.0))
    assert aten.full_like.default in _targets(gm)


MIXED = {
    "rows in one axis": lambda x: torch.zeros_like(x.reshape(-1)),
    "pairs of columns": lambda x: torch.ones_like(torch.cat([x, x], 1).view(-1, 3)),
    "turned": lambda x: torch.ones_like(x.t()),
    "joined": lambda x: torch.zeros_like(torch.cat([x, x])),
    "one fewer": lambda x: torch.zeros_like(x[1:]),
    "one more": lambda x: x.new_ones(x.shape[0] + 1, 2),
    "of two kinds": lambda x: x.new_zeros(2, x.shape[0]),
    "half": lambda x: x.new_zeros((x.shape[0] + 1) // 2),
}


@pytest.mark.parametrize("name", MIXED)
def test_fills_whose_sizes_are_no_numbers_of_rows_stay_right(after, name: str) -> None:
    """They are of as many elements as the structure has it, not as the one that was looked at."""
    gm, _ = after(lambda vec, numbers, receivers, batch, ptr: MIXED[name](torch.exp(vec)))
    assert not [n for n in gm.graph.nodes if n.target in (aten.ones.default, aten.zeros.default)]


@pytest.mark.parametrize("size", [1, 3, 4096, 100_000])
def test_sizes_of_a_model_are_fixed(size: int) -> None:
    assert RowShape(None, (size,), torch.float32).static and RowShape("edge", (2, size), torch.float32).static


@pytest.mark.parametrize("change", [lambda n: n, lambda n: n + 1, lambda n: 3 * n, lambda n: n // 2 + 1])
def test_sizes_that_rows_make_are_not(change: Callable[[int], int]) -> None:
    for prime in PRIMES.values():
        assert not RowShape(None, (4, change(prime)), torch.float32).static
