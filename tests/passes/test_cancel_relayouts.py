"""cancel_relayouts: conversions meet and vanish, values never change."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.ir import layout
from gaq_compile.operators.registration import ops
from gaq_compile.passes.cancel_relayouts import cancel_relayouts

IRREPS = "2x0e+3x1o"
N, D = 5, 11


def _to(x, layout):
    return ops.relayout(x, IRREPS, layout)


def _rows(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _check(trace, listing, function, *inputs, relayouts):
    """The pass leaves ``relayouts`` conversions and no other value; returns what is left."""
    graph = trace(function, *inputs)
    after = cancel_relayouts(graph)
    assert torch.equal(after(*inputs), graph(*inputs))
    lines = listing(after)
    assert sum("gaq.relayout" in line for line in lines) == relayouts, lines
    assert listing(cancel_relayouts(after)) == lines
    return lines


def test_before_and_after(trace, listing):
    """The module's own example, through a gather, a factor and a scatter."""

    def function(a, b, senders, receivers):
        x = (_to(a, "mul_ir") + _to(b, "mul_ir"))[senders] * 0.5
        zeros = a.new_zeros(a.shape[0], a.shape[1])
        return _to(zeros.index_add(0, receivers, -x), "ir_mul")

    inputs = _rows(N, D), _rows(N, D), torch.tensor([0, 1, 1]), torch.tensor([2, 0, 2])
    assert _check(trace, listing, function, *inputs, relayouts=0) == [
        "add = aten.add(a_1, b_1)",
        "index = aten.index(add, [senders_1])",
        "mul = aten.mul(index, 0.5)",
        "new_zeros = aten.new_zeros(a_1, [a_1.size(0), a_1.size(1)])",
        "neg = aten.neg(mul)",
        "index_add = aten.index_add(new_zeros, 0, receivers_1, neg)",
        "return index_add",
    ]


def test_pure(trace, assert_pure):
    assert_pure(cancel_relayouts, trace(lambda x: _to(-_to(x, "mul_ir"), "ir_mul"), _rows(N, D)))


def test_scalars_need_no_conversion(trace, listing):
    _check(trace, listing, lambda x: ops.relayout(x, "11x0e", "mul_ir") * 2, _rows(N, D), relayouts=0)


def test_parts_are_joined_and_divided_in_either_layout(trace, listing):
    """Scalars beside vectors lie alike in both layouts, whatever they are converted with."""

    def function(scalars, vectors):
        scalars, vectors = (rows @ torch.eye(n, dtype=rows.dtype) for rows, n in ((scalars, 2), (vectors, 9)))
        joined = torch.cat([scalars, ops.relayout(vectors, "3x1o", "mul_ir")], dim=1)
        twice = _to(_to(joined, "ir_mul") * 2.0, "mul_ir")
        return torch.cat([part * 3.0 for part in twice.split([2, 9], dim=1)], dim=1) + joined

    def in_our_layout(scalars, vectors):
        return _to(function(scalars, vectors), "ir_mul")

    lines = _check(trace, listing, in_our_layout, _rows(N, 2), _rows(N, 9), relayouts=0)
    assert sum("split_with_sizes(" in line for line in lines) == 1
    assert sum("cat(" in line for line in lines) == 2


@pytest.mark.parametrize("sizes", [[5, 6], [1, 10], [4, 7]])
def test_a_block_that_is_cut_stays_as_it_is(trace, listing, sizes):
    def function(x):
        return torch.cat(_to(x, "mul_ir").split(sizes, dim=1)[::-1], dim=1)

    _check(trace, listing, function, _rows(N, D), relayouts=1)


def test_rows_that_are_joined_or_divided_are_left_alone(trace, listing):
    def function(x):
        y = _to(x, "mul_ir")
        return torch.cat([y, y], dim=0), y.split([2, 3], dim=0)[1]

    graph = trace(function, _rows(N, D))
    assert listing(cancel_relayouts(graph)) == listing(graph)


def test_a_conversion_that_is_seen_stays(trace, listing):
    _check(trace, listing, lambda x: _to(x, "mul_ir") * 2.0, _rows(N, D), relayouts=1)


def test_same_direction_twice_is_not_undone(trace, listing):
    _check(trace, listing, lambda x: _to(_to(x, "ir_mul"), "ir_mul"), _rows(N, D), relayouts=2)


def test_other_irreps_do_not_cancel(trace, listing):
    def function(x):
        return ops.relayout(_to(x, "mul_ir"), "3x1o+2x0e", "ir_mul")

    _check(trace, listing, function, _rows(N, D), relayouts=2)


@pytest.mark.parametrize(
    "between",
    [
        lambda y, w: y * w,  # a weight per element
        lambda y, w: y + w,  # a row that is not converted
        lambda y, w: y[:, 1:].sum(1, keepdim=True) + y,  # columns
        lambda y, w: y[:, torch.arange(10, -1, -1)],  # a gather of columns
        lambda y, w: torch.softmax(y, 1),
        lambda y, w: w - y,
    ],
    ids=["mul", "add", "columns", "column gather", "softmax", "sub"],
)
def test_operators_that_see_the_order_are_not_passed(trace, listing, between):
    def function(x, w):
        return _to(between(_to(x, "mul_ir"), w), "ir_mul")

    _check(trace, listing, function, _rows(N, D), _rows(N, D), relayouts=2)


def test_division_by_one_number_is_passed(trace, listing):
    def function(x, s):
        return _to(_to(x, "mul_ir") / s, "ir_mul")

    _check(trace, listing, function, _rows(N, D), _rows(1), relayouts=0)
    _check(trace, listing, function, _rows(N, D), _rows(N, 1), relayouts=2)


@pytest.mark.parametrize(
    ("first", "second"),
    [("8x1o", "4x1o"), ("4x0e+8x1o", "4x1o+2x2e"), ("3x0e", "2x0e+5x1o")],
    ids=["vectors", "vectors within", "scalars"],
)
def test_joined_vectors_of_one_kind_are_not_taken_for_one_block(trace, first, second):
    """The component-major layout of 12x1o is not 8x1o's followed by 4x1o's."""
    sizes = [layout.dim(irreps) for irreps in (first, second)]

    def function(a, b):
        a, b = a @ torch.eye(sizes[0], dtype=a.dtype), b @ torch.eye(sizes[1], dtype=b.dtype)  # known widths
        return torch.cat([ops.relayout(a, first, "mul_ir"), ops.relayout(b, second, "mul_ir")], dim=1) * 2.0

    inputs = _rows(N, sizes[0]), _rows(N, sizes[1])
    graph = trace(function, *inputs)
    assert torch.equal(cancel_relayouts(graph)(*inputs), graph(*inputs))


def test_scatter_of_rows(trace, listing):
    def function(x, index):
        y = _to(x, "mul_ir")
        wide = index.unsqueeze(-1).expand(x.shape[0], x.shape[1])
        return _to(x.new_zeros(4, x.shape[1]).scatter_reduce(0, wide, y, "sum"), "ir_mul")

    _check(trace, listing, function, _rows(N, D), torch.tensor([0, 3, 3, 1, 0]), relayouts=0)


def _scatter_by_element(x, index):
    y = _to(x, "mul_ir")
    return _to(y.new_zeros(4, y.shape[1]).scatter_add(0, index, y), "ir_mul")


def test_scatter_by_element_is_not_passed(trace, listing):
    index = torch.randint(0, 4, (N, D), generator=torch.Generator().manual_seed(0))
    _check(trace, listing, _scatter_by_element, _rows(N, D), index, relayouts=2)


def test_scatter_onto_something_is_not_passed(trace, listing):
    def function(x, base, index):
        return _to(base.index_add(0, index, _to(x, "mul_ir")), "ir_mul")

    inputs = _rows(N, D), _rows(N, D), torch.tensor([0, 3, 3, 1, 0])
    _check(trace, listing, function, *inputs, relayouts=2)


def test_both_layouts_may_be_used(trace, listing):
    """One consumer wants each layout: the values stay right, and no conversion is made twice."""

    def function(x):
        y = _to(x, "mul_ir")
        return _to(-y, "ir_mul") + torch.softmax(y, 1)

    _check(trace, listing, function, _rows(N, D), relayouts=1)


def test_difference_with_a_factor(trace, listing):
    def function(a, b):
        return _to(torch.sub(_to(a, "mul_ir"), _to(b, "mul_ir"), alpha=3), "ir_mul")

    _check(trace, listing, function, _rows(N, D), _rows(N, D), relayouts=0)
