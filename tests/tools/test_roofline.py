"""Work counted from problems, against counts by hand and by other means; times of every kernel."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from ase.build import bulk
from e3nn.o3 import wigner_3j
from torch.fx import Graph, GraphModule

import gaq_compile
from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.linear import LinearProblem, lower_linear
from gaq_compile.errors import VerificationError
from gaq_compile.ir.specs import linear_spec, tensor_product_spec
from gaq_compile.passes.graph_tools import aten
from gaq_compile.passes.row_groups import FusedRows
from gaq_compile.passes.row_shapes import RowShape
from gaq_compile.tools.machine import Machine
from gaq_compile.tools.roofline import (
    TORCH,
    linear_operations,
    product_gradient_operations,
    product_operations,
    step_times,
)
from gaq_compile.tools.roofline import _read as bytes_read
from gaq_compile.tools.roofline import _rows_counter as rows_counter
from gaq_compile.verify.structures import rattled

MACHINE = Machine(1, {"f32": 1e9, "s16": 2e9, "s8": 4e9}, {1 << 30: 1e9}, {1 << 30: 5e8})


@pytest.fixture(scope="module")
def springs_w8a8(springs):
    return gaq_compile.quantize(*springs, "w8a8", measure=False, progress=False)


def test_a_linear_multiplies_every_weight_with_every_component():
    spec = linear_spec("8x0e+4x1e -> 16x0e+2x1e")
    weight = torch.randn(spec.weight_numel)
    run = lower_linear(LinearProblem(str(spec)), weight, None, None, None, host_target())
    assert linear_operations(run.plan) == {"f32": 2 * (8 * 16 + 3 * 4 * 2)}


def test_integers_are_counted_by_their_width():
    spec = linear_spec("8x0e+4x1e -> 16x0e+2x1e")
    codes = torch.ones(spec.weight_numel, dtype=torch.int8)
    problem = LinearProblem(str(spec), "s8 m8d8", "s8")
    run = lower_linear(problem, codes, torch.ones(spec.scale_numel), torch.ones(12), None, host_target())
    assert linear_operations(run.plan) == {"s8": 2 * 8 * 16, "s16": 2 * 3 * 4 * 2}


def _nonzero(spec: str) -> list[tuple[int, set[tuple[int, int]], int]]:
    """Per path: channels, pairs (m1, m3) that some harmonic joins, nonzero constants."""
    found = []
    for path in tensor_product_spec(spec).paths:
        constants = wigner_3j(path.block_x.l, path.block_sh.l, path.block_out.l).abs() > 1e-6
        pairs = {(a, c) for a, _, c in constants.nonzero().tolist()}
        found.append((path.block_x.mul, pairs, int(constants.sum())))
    return found


@pytest.mark.parametrize(
    ("spec", "forward"),
    [
        # x sh w, and the harmonic's constant
        ("8x0e * 1x0e -> 8x0e | 0.0.0", 8 * (2 * 1 + 1) + 1),
        # w x, then one product and sum for each of three components, whose harmonics get their constant
        ("8x0e * 1x1e -> 8x1e | 0.0.0", 8 * (2 * 3 + 1) + 3),
        # three products of x with harmonics, then one with w
        ("8x1e * 1x1e -> 8x0e | 0.0.0", 8 * (2 * 3 + 1) + 3),
    ],
)
def test_a_product_by_hand(spec, forward):
    assert product_operations(spec) == forward


@pytest.mark.parametrize(
    "spec",
    [
        "8x1e * 1x1e -> 8x2e | 0.0.0",
        "4x0e+4x2e * 1x2e -> 4x2e+4x2e | 0.0.0 1.0.1",
        "3x2e * 1x1e -> 3x1e | 0.0.0",
    ],
)
def test_products_grow_with_channels_by_their_pairs(spec):
    """What each further channel costs: two operations a pair forward, and twice two more backward."""
    paths = _nonzero(spec)
    pairs = sum(mul * len(pair) for mul, pair, _ in paths)
    constants = sum(count for _, _, count in paths)
    forward, backward = product_operations(spec), product_gradient_operations(spec)
    shared = 2 * constants  # harmonics meet constants once, whatever the channels
    assert 2 * pairs < forward <= 3 * pairs + shared
    assert 4 * pairs < backward <= 4 * pairs + 5 * sum(m * 5 for m, _, _ in paths) + 2 * shared


def _group(nodes) -> FusedRows:
    """A group of operators of rows, made by ``nodes(graph, shapes)``."""
    graph, shapes, root = Graph(), {}, torch.nn.Module()
    graph.output((nodes(graph, shapes, root),))
    return FusedRows(root, graph, "edge", shapes)


def test_rows_count_elements_and_read_no_more_of_a_table_than_they_gather():
    def nodes(graph, shapes, root):
        root.register_buffer("matrix", torch.ones(4, 3))
        x, index, table = (graph.placeholder(name) for name in ("x", "index", "table"))
        shapes[x], shapes[index] = RowShape("edge", (4,), torch.float32), RowShape("edge", (), torch.int64)
        shapes[table] = RowShape("atom", (4,), torch.float32)
        matrix = graph.get_attr("matrix")
        shapes[matrix] = RowShape(None, (4, 3), torch.float32)
        gathered = graph.call_function(aten.index.Tensor, (table, [index]))
        total = graph.call_function(aten.mul.Tensor, (x, gathered))
        mixed = graph.call_function(aten.mm.default, (total, matrix))
        summed = graph.call_function(aten.sum.dim_IntList, (mixed, [1]))
        for node, row in ((gathered, (4,)), (total, (4,)), (mixed, (3,)), (summed, ())):
            shapes[node] = RowShape("edge", row, torch.float32)
        return summed

    count = rows_counter(_group(nodes))
    x, index = torch.ones(10, 4), torch.zeros(10, dtype=torch.int64)
    for atoms, table_bytes in ((1000, 10 * 4 * 4), (5, 5 * 4 * 4)):
        work = count((x, index, torch.ones(atoms, 4)), [torch.ones(10)])
        assert work.operations == {"f32": 10.0 * (4 + 2 * 4 * 3 + 3)}
        assert work.read == 10 * 4 * 4 + 10 * 8 + 4 * 3 * 4 + table_bytes
        assert work.written == 10 * 4


def test_what_is_read_whole_and_what_is_gathered():
    graph = Graph()
    table, index = graph.placeholder("table"), graph.placeholder("index")
    graph.output(graph.call_function(aten.index.Tensor, (table, [index])))
    assert bytes_read(table, torch.ones(100, 2), rows=3) == 3 * 2 * 4
    assert bytes_read(index, torch.ones(3, dtype=torch.int64), rows=3) == 3 * 8


def test_every_kernel_of_a_step_is_timed_and_counted(springs_w8a8, springs):
    tensors = dict(zip(springs_w8a8.form.inputs, springs[1], strict=True))
    before = springs_w8a8.evaluate(tensors)
    found = step_times(springs_w8a8, tensors, MACHINE, runs=3, warmup=1)
    kernels = [k for k in found.kernels if k.family != TORCH]
    placed = [p.node for p in springs_w8a8.report.placements if p.backend == "tvm"]
    assert [k.node for k in kernels] == placed
    assert all(k.ms > 0 and k.work.read > 0 and k.work.written > 0 for k in found.kernels if k in kernels)
    assert sum(k.ms for k in found.kernels) < found.watched_ms
    after = springs_w8a8.evaluate(tensors)
    assert all(torch.equal(before[name], after[name]) for name in before)
    (second,) = (k for k in kernels if k.family == "linear" and k.label == "second")
    assert second.work.operations == {"s8": 42 * 2 * 16 * 16}  # seven atoms make 42 edges
    assert second.computing_ms == pytest.approx(1e3 * 42 * 2 * 16 * 16 / 4e9)
    assert second.moving_ms == pytest.approx(1e3 * (second.work.read / 1e9 + second.work.written / 5e8))
    assert second.limit_ms == max(second.computing_ms, second.moving_ms)
    # input, and at least one byte a weight
    assert second.work.read >= 42 * 16 * 4 + 16 * 16 and second.work.written == 42 * 16 * 4


def test_a_graph_that_was_not_lowered_from_the_other_is_refused(springs_w8a8, springs):
    other = SimpleNamespace(
        graphs={**springs_w8a8.graphs, "group_rows": GraphModule(torch.nn.Module(), Graph())},
    )
    with pytest.raises(VerificationError, match="not what became"):
        step_times(other, {}, MACHINE)


@pytest.mark.slow
def test_a_real_models_convolutions_are_counted():
    pytest.importorskip("sevenn")
    salt = rattled(bulk("NaCl", "rocksalt", 5.64, cubic=True), 0.1, 3)
    potential = gaq_compile.quantize("sevennet-0", salt, "w8", measure=False, progress=False)
    from gaq_compile.capture.graphs import collate

    tensors = collate([salt], potential.form)
    found = step_times(potential, tensors, MACHINE, runs=2, warmup=1)
    edges = tensors["edge_vec"].shape[0]
    convolutions = [k for k in found.kernels if k.family == "conv"]
    gradients = [k for k in found.kernels if k.family == "conv_backward"]
    assert len(convolutions) == len(gradients) == 5
    for before, after in itertools.pairwise([*convolutions, *gradients]):
        assert before.work.operations["f32"] % edges == after.work.operations["f32"] % edges == 0
    weights = 4 * (edges // 2) * 128  # of the narrowest one, a row for an edge and its reverse
    assert all(k.work.read > weights for k in (*convolutions, *gradients))
