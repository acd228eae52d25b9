"""row_groups: what groups hand on, and what they compute again instead of reading."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.passes.fuse_rows import fuse_rows
from gaq_compile.passes.graph_tools import calls
from gaq_compile.passes.row_groups import _MOST_AGAIN, FusedRows, fused_rows
from gaq_compile.passes.row_shapes import NARROW
from gaq_compile.passes.simplify import simplify

aten, gaq = torch.ops.aten, torch.ops.gaq
FORM = GraphFormat(("edge_vec", "receivers", "senders", "batch"), 5.0)
ATOMS, BONDS, WIDTH = 6, 9, 24
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _inputs(bonds: int = BONDS, seed: int = 0) -> Inputs:
    """Edges and their reverses: both ends of an edge have rows of their own."""
    generator = torch.Generator().manual_seed(seed)
    vec = torch.randn(bonds, 3, generator=generator)
    ends = torch.randint(0, 3, (2, bonds), generator=generator)
    ends[1] += 3  # no edge from an atom to itself
    batch = torch.tensor([0, 0, 0, 0, 1, 1])
    return torch.cat([vec, -vec]), torch.cat([ends[0], ends[1]]), torch.cat([ends[1], ends[0]]), batch


@pytest.fixture
def graph() -> Callable[[Callable[..., object]], GraphModule]:
    """``graph(function)``: of edge_vec, receivers, senders, batch, by the names that potentials use."""

    def named(function: Callable[..., object]) -> GraphModule:
        with fx_config.patch(use_duck_shape=False):
            gm = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*_inputs())
        for node, name in zip([n for n in gm.graph.nodes if n.op == "placeholder"], FORM.inputs, strict=True):
            node.target = node.name = name
        return simplify(gm, differentiated=True)

    return named


def _drawn(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


TABLES, BENDS = _drawn(8, 2, WIDTH), _drawn(8, WIDTH)
WEIGHTS = _drawn(4, WIDTH * WIDTH)


def _atoms(batch: Tensor, receivers: Tensor, vec: Tensor, seed: int = 0) -> Tensor:
    """Rows of atoms that are all different: (N, 24)."""
    count = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, torch.exp(vec))
    return torch.sin(count.sum(1, keepdim=True) * BENDS[seed] + TABLES[seed][batch])


def _add(values: Tensor, index: Tensor, batch: Tensor) -> Tensor:
    return values.new_zeros(batch.shape[0], *values.shape[1:]).index_add(0, index, values)


def _linear(x: Tensor, seed: int) -> Tensor:
    weight = WEIGHTS[seed].to(x.dtype)
    return gaq.irreps_linear(x, weight, None, f"{WIDTH}x0e -> {WIDTH}x0e", False, f"linear{seed}")


def _groups(gm: GraphModule) -> list[FusedRows]:
    return [f for n in gm.graph.nodes if (f := fused_rows(gm, n)) is not None]


def _targets(group: FusedRows) -> list[object]:
    return [n.target for n in group.graph.nodes if n.op == "call_function"]


def _results(group: FusedRows) -> list[tuple[str, tuple[int, ...]]]:
    """What there is a row of, and the row, of all that a group hands on."""
    (results,) = next(n for n in group.graph.nodes if n.op == "output").args
    return [(group.shapes[n].rows, group.shapes[n].row) for n in results]


def _with(gm: GraphModule, target: object) -> list[FusedRows]:
    return [g for g in _groups(gm) if target in _targets(g)]


def _wide_per_edge(gm: GraphModule) -> int:
    """How many values of many numbers per edge travel between groups."""
    found = [shape for g in _groups(gm) for shape in _results(g)]
    return sum(rows == "edge" and torch.Size(row).numel() >= NARROW for rows, row in found)


def _same(before: GraphModule, after: GraphModule) -> None:
    """On graphs with few and with many edges, and none."""
    for bonds in (BONDS, 200, 0):
        inputs = _inputs(bonds, seed=bonds)
        for a, b in zip(_flat(before(*inputs)), _flat(after(*inputs)), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.allclose(a, b, rtol=2e-5, atol=1e-5)


def _flat(value: object) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)  # type: ignore[return-value]


def _fused(gm: GraphModule, **takes: bool) -> GraphModule:
    after = fuse_rows(gm, FORM, **takes)
    _same(gm, after)
    return after


# --- computed again -------------------------------------------------------------------------------------


def test_a_gather_is_part_of_every_group_that_reads_it(graph) -> None:
    """Two sums of one gathered row, in different orders: the rows of atoms are read twice."""

    def function(vec, receivers, senders, batch):
        far = _atoms(batch, receivers, vec)[senders]
        decay = torch.exp(-vec.square().sum(-1, keepdim=True))
        return _add(far * decay, receivers, batch), _add(far - decay, senders, batch)

    after = _fused(graph(function))
    summing = [g for g in _with(after, gaq.sum_sorted.default) if aten.index.Tensor in _targets(g)]
    assert [set(_targets(g)) - {gaq.sum_sorted.default} for g in summing] == [
        {aten.index.Tensor, aten.mul.Tensor},
        {aten.index.Tensor, aten.sub.Tensor},
    ]
    assert _wide_per_edge(after) == 0
    narrow = [shape for g in _with(after, aten.exp.default) for shape in _results(g) if shape[1] == (1,)]
    assert narrow == [("edge", (1,))]  # computed once: few numbers are worth being read


@pytest.mark.parametrize("width", [NARROW - 1, NARROW])
def test_narrow_values_with_many_users_are_handed_on(graph, width: int) -> None:
    def function(vec, receivers, senders, batch):
        x = _atoms(batch, receivers, vec)[:, :width].clone()
        far = x[senders] * x[receivers]
        return _add(far, receivers, batch), _add(far * 2.0, senders, batch), _add(far, senders, batch)

    after = _fused(graph(function))
    products = [g for g in _groups(after) if aten.index.Tensor in _targets(g)]
    handed = [s for g in _groups(after) for s in _results(g) if s == ("edge", (width,))]
    if width < NARROW:
        assert len(products) == 1 and len(handed) == 2  # the product, and twice of it
    else:
        assert len(products) == 2 and not handed
        assert all(gaq.sum_sorted.default in _targets(g) for g in products)


def test_what_costs_more_than_reading_is_kept(graph) -> None:
    """Functions, and what follows from them: it would have to read them."""

    def function(vec, receivers, senders, batch):
        x = _atoms(batch, receivers, vec)
        bent = torch.tanh(x[senders])  # torch's own: no group has it
        raised = torch.exp(x[senders] * bent)
        return _add(raised * x[receivers], receivers, batch), _add(raised, senders, batch)

    after = _fused(graph(function))
    assert sum(_targets(g).count(aten.exp.default) for g in _groups(after)) == 2  # with that of atoms
    wide = [(g, s) for g in _groups(after) for s in _results(g) if s == ("edge", (WIDTH,))]
    assert len(wide) == 3  # what torch takes, exp, and its product
    assert [_targets(g).count(aten.exp.default) for g, _ in wide].count(1) == 2


@pytest.mark.parametrize("steps", [_MOST_AGAIN, _MOST_AGAIN + 1])
def test_long_chains_are_kept(graph, steps: int) -> None:
    """One gather, and so many more operators."""

    def function(vec, receivers, senders, batch):
        y = _atoms(batch, receivers, vec)[senders]
        for k in range(steps - 1):
            y = y * (1.5 - 0.25 * k)
        return _add(y, receivers, batch), _add(y, senders, batch)

    after = _fused(graph(function))
    gathering = [_targets(g) for g in _groups(after) if aten.index.Tensor in _targets(g)]
    if steps <= _MOST_AGAIN:
        assert [t.count(aten.mul.Tensor) for t in gathering] == [steps - 1] * 2 and not _wide_per_edge(after)
    else:  # the whole chain, or all but its end
        assert _wide_per_edge(after) == 1 and sum(aten.index.Tensor in t for t in gathering) == 1


def test_a_chain_that_comes_together_counts_all_it_costs(graph) -> None:
    """Two of five steps, added up, are more than the most that is computed again."""

    def function(vec, receivers, senders, batch):
        x = _atoms(batch, receivers, vec)
        one, other = x[senders], x[receivers]
        for k in range(_MOST_AGAIN // 2):
            one, other = one * (1.5 + k), other - 0.5 * k
        both = one + other
        return _add(both, receivers, batch), _add(both, senders, batch)

    assert _wide_per_edge(_fused(graph(function))) == 1


def test_what_torch_reads_too_is_handed_on(graph) -> None:
    def function(vec, receivers, senders, batch):
        far = _atoms(batch, receivers, vec)[senders] * 2.0
        return _add(far, receivers, batch), far, far.cumsum(0)  # a result, and mixing rows

    after = _fused(graph(function))
    assert _wide_per_edge(after) == 1


def test_what_nobody_reads_any_more_is_not_computed(graph) -> None:
    """Where all readers compute a value again, the group that held it is gone."""

    def function(vec, receivers, senders, batch):
        return _add(_atoms(batch, receivers, vec)[senders] * 2.0, receivers, batch)

    after = _fused(graph(function))
    assert sum(aten.index.Tensor in _targets(g) for g in _groups(after)) == 1
    assert all(_results(g) for g in _groups(after))
    names = {str(n.target) for n in after.graph.nodes if n.op == "call_module"}
    held = {name for name, part in after.named_children() if isinstance(part, FusedRows)}
    assert names == held


def test_rows_picked_from_edges_are_no_gathers_from_atoms(graph) -> None:
    """Edges are many: their rows are not near."""

    def function(vec, receivers, senders, batch):
        y = torch.exp(vec[:, :1] * BENDS[0])[receivers]  # edges by an index of edges
        return _add(y, receivers, batch), _add(y, senders, batch)

    assert _wide_per_edge(_fused(graph(function))) == 2


# --- views ------------------------------------------------------------------------------------------------


def test_views_that_no_group_computes_are_part_of_their_readers(graph) -> None:
    """Alone they would be a kernel that copies, or calls of torch between kernels."""

    def function(vec, receivers, senders, batch):
        given = vec.cumsum(0).repeat(1, 8)  # torch's own, (E, 24)
        return torch.exp(given.view(-1, 4, 6)), _add(given.view(-1, 8, 3), receivers, batch)

    after = _fused(graph(function))
    assert not {aten.view.default, aten.clone.default} & {n.target for n in after.graph.nodes}
    assert [_targets(g) for g in _groups(after)] == [
        [aten.view.default, aten.exp.default],
        [aten.view.default, gaq.sum_sorted.default],
    ]


def test_a_group_of_views_alone_is_gone(graph) -> None:
    """Its views are at once the reader's and, where torch reads them, torch's."""

    def function(vec, receivers, senders, batch):
        given = vec.cumsum(0).view(-1, 1, 3)
        return _add(given, receivers, batch), _add(given.view(-1, 3, 1), senders, batch), given.cumsum(2)

    after = _fused(graph(function))
    assert [_targets(g)[-1] for g in _groups(after)] == [gaq.sum_sorted.default] * 2
    assert [set(_targets(g)[:-1]) for g in _groups(after)] == [{aten.view.default}] * 2
    assert [n.target for n in after.graph.nodes].count(aten.view.default) == 1


def test_a_view_of_a_linear_alone_is_gathered_where_there_are_its_rows(graph) -> None:
    """The rows of atoms in a view are atoms': no group of edges has a kernel for it."""

    def function(vec, receivers, senders, batch):
        heads = _linear(_add(torch.exp(vec[:, :1] * BENDS[0]), receivers, batch), 1).view(-1, 4, 6)
        return torch.sin(heads[senders]) * vec[:, :1, None]

    _reads_its_tables(_fused(graph(function)))


# --- the two edges of a bond ------------------------------------------------------------------------------


def _on_bonds(value: Callable[..., Tensor]) -> Callable[..., object]:
    """The sum of both edges of what a function of the four inputs has for every edge, and the totals."""

    def function(vec, receivers, senders, batch):
        _, _, first, second, *_ = gaq.bonds(receivers, senders)
        y = value(vec, receivers, senders, batch)
        both = y[first] * BENDS[1] + y[second] * BENDS[2]
        return torch.exp(-both * both), _add(y, receivers, batch)

    return function


def _at_bonds(gm: GraphModule) -> FusedRows:
    (found,) = [g for g in _groups(gm) if g.rows == "bond"]
    return found


def _tables(group: FusedRows) -> list[str]:
    """What a group's gathers take rows of."""
    nodes = [n for n in group.graph.nodes if n.target is aten.index.Tensor]
    return [str(group.shapes[n.args[0]].rows) for n in nodes]


def test_second_edges_have_their_ends_the_other_way_round(graph) -> None:
    """x[receivers] and x[senders] differ, so taking one for the other is seen."""

    def apart(vec, receivers, senders, batch):
        x, y = (_atoms(batch, receivers, vec, seed) for seed in (0, 3))
        return x[receivers] * 0.5 - y[senders]

    gm = graph(_on_bonds(apart))
    inputs = _inputs()
    one, other = (apart(*inputs), apart(inputs[0], inputs[2], inputs[1], inputs[3]))
    assert float((one - other).abs().max()) > 0.1
    after = _fused(gm)
    group = _at_bonds(after)
    assert _tables(group) == ["atom"] * 4 and not _wide_per_edge(after)
    indices = {n.args[1][0].name for n in group.graph.nodes if n.target is aten.index.Tensor}
    bonds = next(calls(after, gaq.bonds.default))
    ends = {n.name: n.args[1] for n in bonds.users if n.target is operator.getitem}
    given = next(n for n in after.graph.nodes if fused_rows(after, n) is group).args
    assert len(indices) == 2 and {ends[n.name] for n in given if n.name in ends} == {4, 5}


def test_values_of_bonds_are_read_where_they_are(graph) -> None:
    """What both edges took from their bond, their bond has."""

    def value(vec, receivers, senders, batch):
        bond, _, first, *_ = gaq.bonds(receivers, senders)
        length = vec[first].square().sum(-1, keepdim=True)
        known = torch.exp(-length * BENDS[4])
        return known[bond] * _atoms(batch, receivers, vec)[senders]

    after = _fused(graph(_on_bonds(value)))
    groups = [g for g in _groups(after) if g.rows == "bond"]
    assert all(set(_tables(g)) <= {"atom", "edge"} for g in groups) and not _wide_per_edge(after)
    assert [g for g in groups if "atom" in _tables(g)]
    gathered = [g.shapes[n.args[0]] for g in groups for n in g.graph.nodes if n.target is aten.index.Tensor]
    assert all(shape.rows == "atom" or shape.row == (3,) for shape in gathered)


def test_few_numbers_of_an_edge_are_picked_by_the_bond(graph) -> None:
    """They are there; the wide rows around them are computed, with constants as they are."""

    def value(vec, receivers, senders, batch):
        return _atoms(batch, receivers, vec)[senders] * torch.exp(vec[:, :1]) * BENDS[7]

    after = _fused(graph(_on_bonds(value)))
    group = _at_bonds(after)
    assert sorted(_tables(group)) == ["atom", "atom", "edge", "edge"] and not _wide_per_edge(after)
    picked = [n.args[0] for n in group.graph.nodes if n.target is aten.index.Tensor]
    assert {group.shapes[n].row for n in picked if group.shapes[n].rows == "edge"} == {(1,)}


def test_views_at_bonds_have_as_many_rows_as_bonds(graph) -> None:
    """Their sizes were asked of edges."""

    def value(vec, receivers, senders, batch):
        x = _atoms(batch, receivers, vec)
        heads = x[senders].reshape(vec.shape[0], 4, 6) * vec[:, :1].unsqueeze(2).expand(vec.shape[0], 4, 1)
        return heads.reshape(vec.shape[0], WIDTH)

    after = _fused(graph(_on_bonds(value)))
    group = _at_bonds(after)
    assert aten.view.default in _targets(group) and not _wide_per_edge(after)
    assert {group.shapes[n].rows for n in group.graph.nodes if n.target is aten.view.default} == {"bond"}


def test_values_gathered_by_anything_else_are_picked_from_edges(graph) -> None:
    """Of the graph that an atom belongs to there is one index per edge, and none per bond."""

    def value(vec, receivers, senders, batch):
        per_graph = TABLES[5].sin()  # two graphs
        return per_graph[batch[receivers]] * _atoms(batch, receivers, vec)[senders]

    after = _fused(graph(_on_bonds(value)))
    assert "edge" in _tables(_at_bonds(after)) and "atom" not in _tables(_at_bonds(after))
    assert _wide_per_edge(after) == 1
    _reads_its_tables(after)


@pytest.mark.parametrize("cheap", [True, False])
def test_rows_are_gathered_from_what_is_there(graph, cheap: bool) -> None:
    """Kernels cannot pick rows of what they compute themselves, however cheap it is."""

    def function(vec, receivers, senders, batch):
        y = _atoms(batch, receivers, vec)[senders]
        y = y * 2.0 if cheap else torch.exp(y)
        return torch.exp(y[receivers])  # edges by an index of edges

    after = _fused(graph(function))
    assert _wide_per_edge(after) == 2
    _reads_its_tables(after)


def _reads_its_tables(gm: GraphModule) -> None:
    """Every group gathers from its arguments or constants alone."""
    gathers = [n for g in _groups(gm) for n in g.graph.nodes if n.target is aten.index.Tensor]
    assert gathers and {n.args[0].op for n in gathers} <= {"placeholder", "get_attr"}


def test_what_is_not_computed_again_is_picked_from_edges(graph) -> None:
    def value(vec, receivers, senders, batch):
        return torch.exp(_atoms(batch, receivers, vec)[senders])

    after = _fused(graph(_on_bonds(value)))
    assert _tables(_at_bonds(after)) == ["edge", "edge"] and _wide_per_edge(after) == 1


def test_a_constant_spread_over_edges_has_a_row_for_each_bond(graph) -> None:
    def value(vec, receivers, senders, batch):
        return BENDS[6].unsqueeze(0).expand(vec.shape[0], WIDTH)

    _fused(graph(_on_bonds(value)))


def test_the_gradient_of_a_sum_over_edges_has_a_row_for_each_bond(graph) -> None:
    """It is one row, spread: networks on bonds take it backwards, here not in the same group."""

    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        length = vec.square().sum(-1, keepdim=True).sqrt()
        y = _linear(torch.nn.functional.silu(_linear(torch.exp(-length * BENDS[0].abs()), 0)), 1)
        energy = (y.sum(0) * BENDS[3]).sum()
        (gradient,) = torch.autograd.grad(energy, vec)
        forces = _add(gradient, receivers, batch).index_add(0, senders, -gradient)
        return energy.detach().unsqueeze(0), forces

    gm, inputs = graph(function), _inputs()
    after = fuse_rows(gm, FORM, linears=False)
    rows: set[int] = set()

    class Rows(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is gaq.irreps_linear.default:
                rows.add(len(args[0]))
            return super().call_function(target, args, kwargs)

    Rows(after).run(*inputs)
    assert rows == {BONDS}
    for a, b in zip(gm(*inputs), after(*inputs), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# --- altogether ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("linears", [True, False])
def test_a_network_of_both_ends_gives_what_it_gave(graph, linears: bool, sums: bool) -> None:
    """With its gradient: gathers, differences and products of both ends, on edges and on bonds."""

    def energy(vec, receivers, senders, batch):
        length = vec.square().sum(-1, keepdim=True).sqrt()
        radial = _linear(torch.exp(-length * BENDS[0].abs()), 0)
        x = torch.tanh(_add(radial * TABLES[0][batch][senders], receivers, batch))
        apart = x[senders] - x[receivers]
        filters = _linear(apart * apart, 1) + radial
        return torch.tanh(_add(filters * x[senders], receivers, batch)).sum(1)

    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        total = energy(vec, receivers, senders, batch)
        (gradient,) = torch.autograd.grad(total.sum(), vec)
        return total.detach(), _add(gradient, receivers, batch).index_add(0, senders, -gradient)

    gm = graph(function)
    after = fuse_rows(gm, FORM, linears=linears, sums=sums)
    for seed in (1, 2, 3):
        inputs = _inputs(20, seed)
        exact = function(inputs[0].double(), *inputs[1:])
        for a, b in zip(after(*inputs), exact, strict=True):
            assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_graph_that_was_given_stays(graph, assert_pure) -> None:
    def apart(vec, receivers, senders, batch):
        x = _atoms(batch, receivers, vec)
        return x[receivers] - x[senders]

    assert_pure(lambda g: fuse_rows(g, FORM), graph(_on_bonds(apart)))
