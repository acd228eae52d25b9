"""sort_sums: sums over the ends of edges and pairs go through them atom by atom, in groups of edges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.passes.fuse_rows import fuse_rows
from gaq_compile.passes.graph_tools import calls
from gaq_compile.passes.row_groups import FusedRows, fused_rows
from gaq_compile.passes.row_shapes import RowShape, row_shapes
from gaq_compile.passes.sort_sums import sort_sums
from gaq_compile.passes.sum_rows import sum_rows

aten, gaq = torch.ops.aten, torch.ops.gaq
NAMES = (
    "edge_vec", "receivers", "senders", "edge_vec_lr", "receivers_lr", "senders_lr", "batch",
)  # fmt: skip
FORM = GraphFormat(NAMES, 5.0)
ATOMS, EDGES, PAIRS = 6, 14, 20


def _inputs(atoms: int = ATOMS, edges: int = EDGES, pairs: int = PAIRS) -> list[Tensor]:
    """The last atom has neither edges nor pairs."""
    generator = torch.Generator().manual_seed(atoms + edges)
    found = []
    for n in (edges, pairs):
        ends = torch.randint(0, max(atoms - 1, 1), (2, n), generator=generator)
        found += [torch.randn(n, 3, generator=generator), ends[0], ends[1]]
    return [*found, torch.zeros(atoms, dtype=torch.int64)]


@pytest.fixture
def graph(trace):
    """``graph(function)``: of the inputs by the names that potentials use."""

    def named(function: Callable[..., object]) -> GraphModule:
        gm = trace(function, *_inputs())
        for node, name in zip([n for n in gm.graph.nodes if n.op == "placeholder"], NAMES, strict=True):
            node.target = node.name = name
        gm.recompile()
        return gm

    return named


def _add(values: Tensor, index: Tensor, batch: Tensor) -> Tensor:
    return values.new_zeros(batch.shape[0], *values.shape[1:]).index_add(0, index, values)


def _sorted(gm: GraphModule) -> dict[Node, RowShape]:
    """The graph's sums become sorted ones, in place; returns the shapes of its nodes."""
    shapes = row_shapes(gm, FORM)
    sum_rows(gm, FORM, shapes)
    sort_sums(gm, shapes)
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return shapes


def _groups(gm: GraphModule) -> list[FusedRows]:
    return [f for n in gm.graph.nodes if (f := fused_rows(gm, n)) is not None]


def _targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def _all_targets(gm: GraphModule) -> list[object]:
    return _targets(gm) + [n.target for g in _groups(gm) for n in g.graph.nodes]


def _both_ends(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
    return _add(vec, receivers, batch), _add(vec[:, :2], senders, batch)


def test_before_and_after(graph, listing) -> None:
    gm = graph(_both_ends)
    shapes = row_shapes(gm, FORM)
    sum_rows(gm, FORM, shapes)
    gm.graph.eliminate_dead_code()
    assert [line for line in listing(gm) if "gaq" in line] == [
        "sum_rows_default = gaq.sum_rows(edge_vec, receivers, batch.size(0), 3)",
        "sum_rows_default_1 = gaq.sum_rows(slice_2, senders, batch.size(0), 2)",
    ]
    sums = {n.args[1].name: shapes[n] for n in calls(gm, gaq.sum_rows.default)}
    sort_sums(gm, shapes)
    gm.graph.lint()
    assert [line for line in listing(gm) if "gaq" in line] == [
        "sort_edges_default = gaq.sort_edges(senders, receivers, batch.size(0))",
        "sum_sorted_default = gaq.sum_sorted(edge_vec, receivers, sort_edges_default[3], "
        "sort_edges_default[2], batch.size(0))",
        "sum_sorted_default_1 = gaq.sum_sorted(slice_2, senders, sort_edges_default[5], "
        "sort_edges_default[4], batch.size(0))",
    ]
    for node in calls(gm, gaq.sum_sorted.default):
        _, index, order, starts, _, _ = node.args
        assert shapes[node] == sums[index.name]
        assert shapes[order] == RowShape("edge", (), torch.int32)
        assert shapes[starts] == RowShape(None, (), torch.int32)


@pytest.mark.parametrize(("atoms", "edges", "pairs"), [(6, 14, 20), (3, 0, 0), (1, 9, 4), (40, 3, 2)])
def test_sums_are_what_they_were(graph, atoms: int, edges: int, pairs: int) -> None:
    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        near, far = _both_ends(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch), vec_lr * 2.0
        return *near, _add(far, receivers_lr, batch), _add(far[:, 0], senders_lr, batch)

    gm, inputs = graph(function), _inputs(atoms, edges, pairs)
    expected = gm(*inputs)
    _sorted(gm)
    assert _targets(gm).count(gaq.sum_sorted.default) == 4
    for a, b in zip(gm(*inputs), expected, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)


def test_what_a_sum_is_given_says_which_edges_each_atom_has(graph) -> None:
    """The kernel reads nothing else; torch's operator does not look at it."""
    gm = graph(_both_ends)
    _sorted(gm)
    inputs = _inputs()
    seen: list[tuple[Tensor, ...]] = []

    class Sums(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is gaq.sum_sorted.default:
                seen.append(args)
            return super().call_function(target, args, kwargs)

    results = Sums(gm).run(*inputs)
    assert len(seen) == 2
    for (values, index, order, starts, atoms, _), total in zip(seen, results, strict=True):
        assert atoms == ATOMS and starts.dtype == order.dtype == torch.int32 and len(starts) == ATOMS + 1
        for atom in range(ATOMS):
            mine = order[starts[atom] : starts[atom + 1]].long()
            assert torch.equal(mine, torch.nonzero(index == atom).flatten())
            assert torch.allclose(values[mine].sum(0), total[atom], atol=1e-6)
    assert torch.equal(seen[0][1], inputs[1]) and torch.equal(seen[1][1], inputs[2])


def test_edges_and_pairs_have_orders_of_their_own(graph) -> None:
    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        return _add(vec, receivers, batch), _add(vec_lr, senders_lr, batch)

    gm = graph(function)
    shapes = _sorted(gm)
    orders = {n.args[0].target: n for n in calls(gm, gaq.sort_edges.default)}
    assert orders.keys() == {"senders", "senders_lr"}
    rows = [shapes[n.args[2]].rows for n in calls(gm, gaq.sum_sorted.default)]
    assert rows == ["edge", "pair"]


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_order_that_convolutions_use_is_shared(graph, place: str) -> None:
    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        def order() -> Tensor:
            return gaq.sort_edges(senders, receivers, batch.shape[0])[5]

        early = order() if place == "before" else None
        total = _add(vec, receivers, batch) + _add(vec, senders, batch)
        late = order()
        return total, late if early is None else early + late

    gm, inputs = graph(function), _inputs()
    expected = gm(*inputs)
    _sorted(gm)
    assert _targets(gm).count(gaq.sort_edges.default) == 1
    for a, b in zip(gm(*inputs), expected, strict=True):
        assert torch.equal(a, b)


def test_an_order_of_reversed_edges_is_another(graph) -> None:
    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        return _add(vec, receivers, batch), gaq.sort_edges(receivers, senders, batch.shape[0])[3]

    gm, inputs = graph(function), _inputs()
    expected = gm(*inputs)
    _sorted(gm)
    assert _targets(gm).count(gaq.sort_edges.default) == 2
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), expected, strict=True))


def test_sums_over_anything_else_stay(graph) -> None:
    """Of atoms over graphs, and of edges over the graphs that they are in."""

    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        return _add(torch.ones_like(batch, dtype=torch.float32), batch, batch), _add(
            vec, batch[receivers], batch
        )

    gm = graph(function)
    _sorted(gm)
    assert _targets(gm).count(gaq.sum_rows.default) == 2
    assert not {gaq.sort_edges.default, gaq.sum_sorted.default} & set(_targets(gm))


def test_sums_into_another_number_of_rows_than_atoms_stay(graph) -> None:
    """Each has as many results as it says; an order of atoms ends with the last atom."""

    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        per_edge = torch.zeros_like(vec).index_add(0, receivers, torch.sin(vec))
        return _add(torch.exp(vec), receivers, batch), per_edge

    gm = graph(function)
    shapes = _sorted(gm)
    assert [shapes[n].rows for n in calls(gm, gaq.sum_sorted.default)] == ["atom"]
    assert [shapes[n].rows for n in calls(gm, gaq.sum_rows.default)] == ["edge"]


# --- in groups -----------------------------------------------------------------------------------------


def test_sums_of_one_order_are_one_group_of_edges(graph) -> None:
    """Over receivers, over senders and over pairs: three orders; what is not added up has another group."""

    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        one, other, far = torch.exp(vec), torch.sin(vec), torch.cos(vec_lr)
        sums = [_add(x, end, batch) for x in (one, other) for end in (receivers, senders)]
        return *sums, _add(far, receivers_lr, batch), one

    gm, inputs = graph(function), _inputs()
    after = fuse_rows(gm, FORM)
    summing = [g for g in _groups(after) if gaq.sum_sorted.default in [n.target for n in g.graph.nodes]]
    held = [(g.rows, [n.target for n in g.graph.nodes].count(gaq.sum_sorted.default)) for g in summing]
    assert sorted(held) == [("edge", 2), ("edge", 2), ("pair", 1)]
    assert all(g.operators == count for g, (_, count) in zip(summing, held, strict=True))
    for group in summing:
        assert len({n.args[2] for n in group.graph.nodes if n.target is gaq.sum_sorted.default}) == 1
    assert not {gaq.sum_sorted.default, gaq.sum_rows.default} & set(_targets(after))
    for a, b in zip(after(*inputs), gm(*inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_what_follows_from_a_sum_comes_after_all_edges(graph) -> None:
    """The group that adds up hands its totals on: nothing reads them before the last edge."""

    def function(vec, receivers, senders, vec_lr, receivers_lr, senders_lr, batch):
        first = _add(torch.exp(vec), receivers, batch)
        again = _add(torch.sin(first[senders]) * vec, receivers, batch)
        return torch.tanh(again) * first

    gm, inputs = graph(function), _inputs()
    after = fuse_rows(gm, FORM)
    sums = [n.target for g in _groups(after) for n in g.graph.nodes]
    assert sums.count(gaq.sum_sorted.default) == 2
    for group in _groups(after):
        targets = [n.target for n in group.graph.nodes if n.op == "call_function"]
        assert gaq.sum_sorted.default not in targets or set(targets) == {gaq.sum_sorted.default}
    assert torch.allclose(after(*inputs), gm(*inputs), rtol=1e-6, atol=1e-6)


def test_without_sums_in_groups_they_stay_as_they_are(graph) -> None:
    """For backends whose groups take none."""
    gm, inputs = graph(_both_ends), _inputs()
    after = fuse_rows(gm, FORM, sums=False)
    assert _targets(after).count(gaq.sum_rows.default) == 2
    assert not {gaq.sort_edges.default, gaq.sum_sorted.default} & set(_all_targets(after))
    assert all(torch.equal(a, b) for a, b in zip(after(*inputs), gm(*inputs), strict=True))


def test_the_graph_that_was_given_stays(graph, assert_pure) -> None:
    assert_pure(lambda g: fuse_rows(g, FORM), graph(_both_ends))
