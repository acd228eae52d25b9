"""fuse_rows, pack_rows and what they stand on: groups compute what their operators did, and no other."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from gaq_compile.backends.reference import ReferenceBackend
from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.passes.decompose import decompose
from gaq_compile.passes.fold_constants import fold_constants
from gaq_compile.passes.fuse_rows import fuse_rows
from gaq_compile.passes.lower import lower
from gaq_compile.passes.pack_rows import pack_rows
from gaq_compile.passes.row_groups import FusedRows, fused_rows
from gaq_compile.passes.row_shapes import row_shapes
from gaq_compile.passes.sum_rows import sum_rows

aten, gaq = torch.ops.aten, torch.ops.gaq
FORM = GraphFormat(("edge_vec", "receivers", "senders", "batch"), 5.0)
ATOMS, EDGES = 5, 7


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    ends = torch.randint(0, ATOMS, (2, EDGES))
    return torch.randn(EDGES, 3), ends[0], ends[1], torch.tensor([0, 0, 1, 1, 1])


@pytest.fixture
def graph(trace, inputs):
    """``graph(function)``: of edge_vec, receivers, senders, batch, by the names that potentials use."""

    def named(function) -> GraphModule:
        gm = trace(function, *inputs)
        for node, name in zip([n for n in gm.graph.nodes if n.op == "placeholder"], FORM.inputs, strict=True):
            node.target = name
        gm.recompile()
        return gm

    return named


def _groups(gm: GraphModule) -> list[FusedRows]:
    return [f for n in gm.graph.nodes if (f := fused_rows(gm, n)) is not None]


def _targets(group: FusedRows) -> list[object]:
    return [n.target for n in group.graph.nodes]


def _flat(value):
    return value if isinstance(value, tuple) else (value,)


def _same(before: GraphModule, after: GraphModule, inputs) -> None:
    for a, b in zip(_flat(before(*inputs)), _flat(after(*inputs)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def _weights(vec):
    length = vec.square().sum(-1, keepdim=True).sqrt()
    return torch.exp(-length) * torch.where(length < 2.0, length, torch.zeros_like(length))


def test_a_chain_on_edges_is_one_group(graph, inputs):
    gm = graph(lambda vec, receivers, senders, batch: _weights(vec) * vec + 1.0)
    after = fuse_rows(gm, FORM)
    (group,) = _groups(after)
    assert group.rows == "edge" and group.operators == 10
    assert not [n for n in after.graph.nodes if getattr(n.target, "namespace", "") == "aten"]
    _same(gm, after, inputs)


def test_atoms_between_edges_divide_the_groups(graph, inputs):
    def function(vec, receivers, senders, batch):
        per_atom = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, torch.exp(vec))
        return torch.sin(per_atom * 2.0)[senders] * vec

    gm = graph(function)
    after = fuse_rows(gm, FORM)
    assert [g.rows for g in _groups(after)] == ["edge", "edge", "atom", "edge"]  # the second adds up
    assert [gaq.sum_sorted.default in _targets(g) for g in _groups(after)] == [False, True, False, False]
    _same(gm, after, inputs)
    alone = fuse_rows(gm, FORM, sums=False)
    assert [g.rows for g in _groups(alone)] == ["edge", "atom", "edge"]
    assert [n.target for n in alone.graph.nodes].count(gaq.sum_rows.default) == 1
    _same(gm, alone, inputs)


def test_a_row_gathered_from_the_same_kind_is_not_in_the_group(graph, inputs):
    def function(vec, receivers, senders, batch):  # edges by an index of edges
        return torch.exp(vec)[receivers] * 2.0

    gm = graph(function)
    after = fuse_rows(gm, FORM)
    _same(gm, after, inputs)
    for group in _groups(after):
        targets = [n.target for n in group.graph.nodes]
        assert not (aten.exp.default in targets and aten.index.Tensor in targets)


def test_an_index_that_nobody_has_checked_stays_with_torch(graph, inputs):
    def function(vec, receivers, senders, batch):
        unknown = (receivers + senders).clamp(0, 4)
        table = torch.exp(vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, vec))
        return table[unknown] * vec, vec.new_zeros(batch.shape[0], 3).index_add(0, unknown, vec)

    gm = graph(function)
    after = fuse_rows(gm, FORM)
    targets = [n.target for n in after.graph.nodes]
    assert aten.index.Tensor in targets and aten.index_add.default in targets
    _same(gm, after, inputs)


def test_what_mixes_rows_is_left_alone(graph, inputs):
    gm = graph(lambda vec, receivers, senders, batch: (vec.sum(0), torch.cat([vec, vec], 0), vec @ vec.t()))
    after = fuse_rows(gm, FORM)
    assert not _groups(after)
    _same(gm, after, inputs)


def test_double_precision_is_left_alone(graph, inputs):
    gm = graph(lambda vec, receivers, senders, batch: torch.exp(vec.double()))
    after = fuse_rows(gm, FORM)
    assert not _groups(after)
    _same(gm, after, inputs)


def test_a_graph_of_its_own_tensors_is_returned_as_it_is(graph):
    gm = graph(lambda vec, receivers, senders, batch: torch.exp(vec) * 2.0)
    assert fuse_rows(gm, GraphFormat(FORM.inputs, 5.0, positions="edge_vec")) is gm


def test_fusing_is_pure(graph, assert_pure):
    gm = graph(lambda vec, receivers, senders, batch: _weights(vec) * vec)
    assert_pure(lambda g: pack_rows(fuse_rows(g, FORM)), gm)


def test_narrow_results_for_other_groups_travel_as_one_tensor(graph, inputs):
    def function(vec, receivers, senders, batch):
        length = vec.square().sum(-1)
        near, decay, unit = length < 2.0, torch.exp(-length), vec / length[:, None]
        total = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, decay[:, None] * unit)
        back = total[senders]
        return torch.where(near, decay, length)[:, None] * back + unit * length[:, None]

    gm = graph(function)
    fused = fuse_rows(gm, FORM)
    packed = pack_rows(fused)
    first, last = _groups(fused)[0], _groups(fused)[-1]
    few, fewer = _groups(packed)[0], _groups(packed)[-1]

    def width(group: FusedRows) -> tuple[int, int]:
        nodes = list(group.graph.nodes)
        return len(nodes[-1].args[0]), sum(n.op == "placeholder" for n in nodes)

    # What is summed travels with the rest, as groups add up: three become one.
    assert width(first)[0] == 3 and width(few)[0] == 1
    assert width(fewer)[1] < width(last)[1]
    _same(gm, packed, inputs)


def test_a_result_that_others_read_too_is_not_packed(graph, inputs):
    def function(vec, receivers, senders, batch):
        a, b = torch.exp(vec), torch.sin(vec)
        total = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, a)
        return total[senders] * a * b, a, b

    gm = graph(function)
    _same(gm, pack_rows(fuse_rows(gm, FORM)), inputs)


def test_sums_by_index_become_one_operator(graph, inputs):
    def function(vec, receivers, senders, batch):
        zeros = vec.new_zeros(batch.shape[0], 3)
        put = aten.index_put.default(zeros, [senders], vec, True)
        flat = aten.scatter_add.default(vec.new_zeros(batch.shape[0]), 0, receivers, vec[:, 0])
        return put, flat, put.index_add(0, receivers, vec)

    gm = graph(function)
    shapes = row_shapes(gm, FORM)
    before = [out.clone() for out in gm(*inputs)]
    sum_rows(gm, FORM, shapes)
    gm.recompile()
    assert [n.target for n in gm.graph.nodes].count(torch.ops.gaq.sum_rows.default) == 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, gm(*inputs), strict=True))


def test_writing_by_index_is_no_sum(graph, inputs):
    def function(vec, receivers, senders, batch):
        return aten.index_put.default(vec.new_zeros(batch.shape[0], 3), [senders], vec, False)

    gm = graph(function)
    sum_rows(gm, FORM, row_shapes(gm, FORM))
    assert torch.ops.gaq.sum_rows.default not in [n.target for n in gm.graph.nodes]


def test_sums_into_views_of_zeros_are_sums_alone(graph, inputs):
    """Nothing is added to them afterwards; how many rows there are is asked of an input."""

    def function(vec, receivers, senders, batch):
        first = torch.exp(vec.new_zeros(batch.shape[0], 3).view(-1, 3).index_add(0, receivers, vec))
        return first.new_zeros(first.shape[0], 3).expand(-1, 3).index_add(0, senders, vec) * first

    gm = graph(function)
    after = fuse_rows(gm, FORM, sums=False)
    sums = [n for n in after.graph.nodes if n.target is gaq.sum_rows.default]
    sizes = {n.args[2] for n in sums}
    assert len(sums) == 2 and [(n.target, n.args[0].name) for n in sizes] == [(aten.sym_size.int, "batch_1")]
    functions = {n.target for n in after.graph.nodes if n.op == "call_function"}
    assert functions <= {gaq.sum_rows.default, aten.sym_size.int, operator.getitem}
    _same(gm, after, inputs)


def test_ones_and_zeros_that_rows_meet_are_numbers(graph, inputs):
    """Also those that are spread from one number, as gradients begin."""

    def function(vec, receivers, senders, batch):
        spread = vec.new_ones(()).expand(vec.shape[0]).unsqueeze(1).expand(-1, 3)
        return (torch.exp(vec) * spread + torch.zeros_like(vec)) * torch.ones_like(vec)

    gm = graph(function)
    after = fuse_rows(gm, FORM)
    (group,) = _groups(after)
    made = {aten.ones.default, aten.zeros.default, aten.sym_size.int}
    assert not made & {n.target for g in (after.graph, group.graph) for n in g.nodes}
    _same(gm, after, inputs)


def test_whole_numbers_that_floats_meet_are_floats_beforehand(graph, inputs):
    """Numbers of neighbours: what computes with floats can be in groups, what counts stays whole."""

    def function(vec, receivers, senders, batch):
        ones = torch.ones_like(receivers) + 2**24  # one more than that is no float32
        count = batch.new_zeros(batch.shape[0]).index_add(0, receivers, ones)
        total = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, torch.exp(vec))
        mean = total / (count + 1).unsqueeze(1)
        return mean * 2.0, total * count.unsqueeze(1), count * 3, total > count.unsqueeze(1)

    gm = graph(function)
    after = fuse_rows(gm, FORM)
    copies = [n for n in after.graph.nodes if n.target is aten._to_copy.default]
    assert [n.kwargs for n in copies] == [{"dtype": torch.float32}] * 2
    adding = [gaq.sum_sorted.default in _targets(g) for g in _groups(after)]
    assert [g.rows for g in _groups(after)] == ["edge", "edge", "atom", "atom"]
    assert adding == [False, True, False, False]
    grouped = {n.target for g in _groups(after) for n in g.graph.nodes}
    assert {aten.div.Tensor, aten.mul.Tensor} <= grouped and aten.add.Tensor not in grouped
    for a, b in zip(gm(*inputs), after(*inputs), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_whole_numbers_of_constants_are_floats_beforehand():
    graph, root = Graph(), nn.Module()
    root.register_buffer("degrees", torch.tensor([1, 2, 3]))
    vec, *_ = [graph.placeholder(name) for name in FORM.inputs]
    x = graph.call_function(aten.exp.default, (vec,))
    degrees = graph.get_attr("degrees")
    whole = graph.call_function(aten.add.Tensor, (degrees, 1))
    graph.output((graph.call_function(aten.mul.Tensor, (x, degrees)), whole, degrees))
    gm = GraphModule(root, graph)
    after = fuse_rows(gm, FORM)
    (group,) = _groups(after)
    assert [b.dtype for b in group.buffers()] == [torch.float32] and group.operators == 2
    given = torch.randn(7, 3), *(torch.zeros(7, dtype=torch.int64),) * 2, torch.zeros(5, dtype=torch.int64)
    for a, b in zip(gm(*given), after(*given), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_row_shapes_name_what_there_is_a_row_of(graph):
    gm = graph(lambda vec, receivers, senders, batch: vec.new_zeros(batch.shape[0], 4) + vec.shape[1])
    shapes = row_shapes(gm, FORM)
    found = {(n.target if n.op == "placeholder" else "result"): shapes[n].rows for n in shapes}
    assert found == {
        "edge_vec": "edge",
        "receivers": "edge",
        "senders": "edge",
        "batch": "atom",
        "result": "atom",
    }


def test_constants_are_computed_once():
    graph, root = Graph(), nn.Module()
    root.register_buffer("raw", torch.randn(4))
    x, raw = graph.placeholder("x"), graph.get_attr("raw")
    scale = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.softplus.default, (raw,)), 2.0))
    graph.output(graph.call_function(aten.mul.Tensor, (x, scale)))
    gm = GraphModule(root, graph)
    after = fold_constants(gm)
    assert [n.target for n in after.graph.nodes if n.op == "call_function"] == [aten.mul.Tensor]
    rows = torch.randn(3, 4)
    expected = rows * (2 * torch.nn.functional.softplus(root.raw))
    assert torch.equal(after(rows), expected) and torch.equal(gm(rows), expected)


@pytest.mark.parametrize("width", [4, 128])
def test_layer_norms_and_their_gradients_are_written_out(trace, width):
    torch.manual_seed(0)
    x, grad, weight, bias = (
        torch.randn(*s, dtype=torch.float64) for s in ((6, width), (6, width), (width,), (width,))
    )

    def function(x, grad, weight, bias):
        y, mean, inverse = aten.native_layer_norm.default(x, [width], weight, bias, 1e-6)
        mask = [True, False, False]
        args = (grad, x, [width], mean, inverse, weight, bias, mask)
        return y, aten.native_layer_norm_backward.default(*args)[0]

    gm = trace(function, x, grad, weight, bias)
    after = decompose(gm)
    assert not [n for n in after.graph.nodes if "layer_norm" in str(n.target)]
    for a, b in zip(after(x, grad, weight, bias), function(x, grad, weight, bias), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [True, False])
def test_norms_are_written_out(trace, keep):
    x = torch.randn(6, 3, dtype=torch.float64)
    gm = trace(lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=keep), x)
    after = decompose(gm)
    assert aten.linalg_vector_norm.default not in [n.target for n in after.graph.nodes]
    assert torch.allclose(after(x), gm(x), rtol=1e-14)


def test_other_norms_stay(trace):
    x = torch.randn(6, 3)
    gm = trace(lambda x: torch.linalg.vector_norm(x, ord=1, dim=-1), x)
    assert aten.linalg_vector_norm.default in [n.target for n in decompose(gm).graph.nodes]


def _with_linears(widths: tuple[int, ...]) -> GraphModule:
    """silu(vec @ w0), silu(... @ w1), ..., with weights as constants of the graph."""
    graph, module = Graph(), nn.Module()
    x, *_ = [graph.placeholder(name) for name in FORM.inputs]
    for k, (a, b) in enumerate(zip((3, *widths), widths, strict=False)):
        module.register_buffer(f"w{k}", torch.randn(a * b, generator=torch.Generator().manual_seed(k)))
        rest = (None, f"{a}x0e -> {b}x0e", False, f"net.{k}")
        x = graph.call_function(gaq.irreps_linear.default, (x, graph.get_attr(f"w{k}"), *rest))
        x = graph.call_function(aten.silu.default, (x,))
    graph.output(x)
    return GraphModule(module, graph)


def _linears(gm: GraphModule) -> list[str]:
    return [str(n.args[-1]) for n in gm.graph.nodes if n.target is gaq.irreps_linear.default]


def test_linears_join_what_is_around_them(inputs):
    gm = _with_linears((32, 64, 8))
    after = fuse_rows(gm, FORM)
    (group,) = _groups(after)
    assert group.operators == 6 and not _linears(after)
    assert [str(n.args[-1]) for n in group.graph.nodes if n.target is gaq.irreps_linear.default] == [
        "net.0",
        "net.1",
        "net.2",
    ]
    _same(gm, after, inputs)
    _, placements = lower(after, [ReferenceBackend()])
    assert [(p.op, p.label) for p in placements] == [
        ("rows", "6 operators on edges"),
        *(("gaq::irreps_linear", f"net.{k}") for k in range(3)),
    ]


def test_linears_of_wide_rows_stay_outside():
    after = fuse_rows(_with_linears((32, 640, 8)), FORM)
    assert _linears(after) == ["net.1", "net.2"]


def test_linears_stay_outside_where_a_backend_says_so(inputs):
    gm = _with_linears((32, 8))
    after = fuse_rows(gm, FORM, linears=False)
    assert _linears(after) == ["net.0", "net.1"] and len(_groups(after)) == 2
    _same(gm, after, inputs)


def test_groups_can_be_copied(inputs):
    after = fuse_rows(_with_linears((32, 8)), FORM)
    (group,) = _groups(after)
    copied = copy.deepcopy(group)
    assert torch.equal(copied(inputs[0])[0], group(inputs[0])[0])
    assert all(a is not b for a, b in zip(copied.buffers(), group.buffers(), strict=True))
