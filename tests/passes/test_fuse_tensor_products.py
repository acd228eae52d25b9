"""fuse_tensor_products: the chain becomes one operator; whatever only looks like it does not."""

from __future__ import annotations

import pytest
import torch

from gaq_compile.operators.registration import ops
from gaq_compile.passes.fuse_tensor_products import fuse_tensor_products
from gaq_compile.passes.simplify import simplify

SPEC = "2x0e+1x1o * 1x0e+1x1o -> 2x0e+2x1o+1x0e | 0.0.0 0.1.1 1.1.2*0.5"
ATOMS, EDGES, WIDTH, OUT = 5, 7, 5, 9
SENDERS = torch.tensor([1, 0, 3, 3, 0, 1, 4])
RECEIVERS = torch.tensor([0, 1, 0, 2, 3, 0, 0])


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return (
        torch.randn(ATOMS, WIDTH, dtype=torch.float64),
        torch.randn(EDGES, 4, dtype=torch.float64),
        torch.randn(EDGES, 5, dtype=torch.float64),
        SENDERS,
        RECEIVERS,
    )


def _product(x, sh, w, senders):
    return ops.tensor_product(x[senders], sh, w, SPEC, "tp")


def _zeros(x, rows=None):
    return x.new_zeros(x.shape[0] if rows is None else rows, OUT)


def _plain(x, sh, w, senders, receivers):
    return _zeros(x).index_add(0, receivers, _product(x, sh, w, senders))


def _fused(lines):
    return sum("gaq.conv(" in line for line in lines)


def _check(trace, listing, function, inputs, fused):
    """The pass makes ``fused`` convolutions and changes no value."""
    graph = trace(function, *inputs)
    after = fuse_tensor_products(graph)
    for a, b in zip(_flat(after(*inputs)), _flat(graph(*inputs)), strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-13, atol=1e-13)
    lines = listing(after)
    assert _fused(lines) == fused, lines
    assert listing(fuse_tensor_products(after)) == lines
    return lines


def _flat(value):
    return value if isinstance(value, tuple) else (value,)


def test_before_and_after(trace, listing, inputs):
    assert _check(trace, listing, _plain, inputs, fused=1) == [
        "sort_edges_default = gaq.sort_edges(senders_1, receivers_1, x_1.size(0))",
        "conv_default = gaq.conv(x_1, sh_1, w_1, sort_edges_default, "
        "'2x0e+1x1o * 1x0e+1x1o -> 2x0e+2x1o+1x0e | 0.0.0 0.1.1 1.1.2*0.5')",
        "return conv_default",
    ]


def test_pure(trace, assert_pure, inputs):
    assert_pure(fuse_tensor_products, trace(_plain, *inputs))


@pytest.mark.parametrize("kind", ["scatter_add", "scatter_reduce"])
def test_other_scatters(trace, listing, inputs, kind):
    def function(x, sh, w, senders, receivers):
        message = _product(x, sh, w, senders)
        index = receivers.unsqueeze(-1).expand(message.shape[0], message.shape[1])
        if kind == "scatter_add":
            return _zeros(x).scatter_add(0, index, message)
        return _zeros(x).scatter_reduce(0, index, message, "sum")

    _check(trace, listing, function, inputs, fused=1)


def _own_zeros(x, sh, w, senders, receivers):
    messages = _product(x, sh, w, senders)
    return messages.new_zeros(x.shape[0], OUT).index_add(0, receivers, messages)


def _own_zeros_after_a_relayout(x, sh, w, senders, receivers):
    messages = _product(x, sh, w, senders)
    base = ops.relayout(messages, "2x0e+2x1o+1x0e", "mul_ir").new_zeros(x.shape[0], OUT)
    return base.index_add(0, receivers, messages)


@pytest.mark.parametrize("function", [_own_zeros, _own_zeros_after_a_relayout])
def test_a_sum_into_zeros_of_the_messages_type(trace, listing, inputs, function) -> None:
    lines = _check(trace, listing, function, inputs, fused=1)
    assert len(lines) == 3  # no messages are left


def test_index_select_gathers_too(trace, listing, inputs):
    def function(x, sh, w, senders, receivers):
        message = ops.tensor_product(torch.index_select(x, 0, senders), sh, w, SPEC, "tp")
        return _zeros(x).index_add(0, receivers, message)

    _check(trace, listing, function, inputs, fused=1)


def test_convolutions_of_one_graph_share_the_order_of_edges(trace, listing, inputs):
    def function(x, sh, w, senders, receivers):
        y = _plain(x, sh, w, senders, receivers)[:, :5]
        return _plain(y, sh, w, senders, receivers) + _plain(x * 2, sh, w, receivers, senders)

    lines = _check(trace, lambda graph: listing(simplify(graph)), function, inputs, fused=3)
    assert sum("gaq.sort_edges(" in line for line in lines) == 2  # one for each direction


def _used_twice(x, sh, w, senders, receivers):
    message = _product(x, sh, w, senders)
    return _zeros(x).index_add(0, receivers, message), message.sum(1)


def _two_scatters(x, sh, w, senders, receivers):
    message = _product(x, sh, w, senders)
    return _zeros(x).index_add(0, receivers, message) + _zeros(x).index_add(0, senders, message)


def _along_columns(x, sh, w, senders, receivers):
    message = _product(x, sh, w, senders)
    return message.new_zeros(message.shape[0], 20).index_add(1, torch.arange(9) * 2, message)


def _onto_something(x, sh, w, senders, receivers):
    return torch.cat([x, x[:, :4]], 1).index_add(0, receivers, _product(x, sh, w, senders))


def _onto_ones(x, sh, w, senders, receivers):
    return x.new_ones(x.shape[0], OUT).index_add(0, receivers, _product(x, sh, w, senders))


def _largest(x, sh, w, senders, receivers):
    message = _product(x, sh, w, senders)
    index = receivers.unsqueeze(-1).expand(message.shape[0], message.shape[1])
    return _zeros(x).scatter_reduce(0, index, message, "amax")


def _mean(x, sh, w, senders, receivers):
    message = _product(x, sh, w, senders)
    index = receivers.unsqueeze(-1).expand(message.shape[0], message.shape[1])
    return _zeros(x).scatter_reduce(0, index, message, "mean", include_self=False)


def _modified_between(x, sh, w, senders, receivers):
    return _zeros(x).index_add(0, receivers, torch.tanh(_product(x, sh, w, senders)))


def _gather_modified(x, sh, w, senders, receivers):
    message = ops.tensor_product(torch.tanh(x[senders]), sh, w, SPEC, "tp")
    return _zeros(x).index_add(0, receivers, message)


def _gather_of_columns(x, sh, w, senders, receivers):
    edges = torch.cat([x, x])[:7]
    message = ops.tensor_product(edges[:, torch.tensor([0, 1, 4, 3, 2])], sh, w, SPEC, "tp")
    return _zeros(x).index_add(0, receivers, message)


def _by_element(x, sh, w, senders, receivers):
    index = torch.arange(EDGES * OUT).reshape(EDGES, OUT) % ATOMS
    message = _product(x, sh, w, senders)
    return _zeros(x).scatter_add(0, index, message)


def _index_along_columns(x, sh, w, senders, receivers):
    index = (torch.arange(OUT) % ATOMS).expand(EDGES, OUT)
    message = _product(x, sh, w, senders)
    return _zeros(x).scatter_add(0, index, message)


def _scaled(x, sh, w, senders, receivers):
    return _zeros(x).index_add(0, receivers, _product(x, sh, w, senders), alpha=0.5)


def _to_graphs(x, sh, w, senders, receivers):
    return _zeros(x, 2).index_add(0, receivers % 2, _product(x, sh, w, senders))


def _to_more_rows(x, sh, w, senders, receivers):
    return _zeros(x, 11).index_add(0, receivers + 6, _product(x, sh, w, senders))


REFUSED = [
    _used_twice,
    _two_scatters,
    _along_columns,
    _onto_something,
    _onto_ones,
    _largest,
    _mean,
    _modified_between,
    _gather_modified,
    _gather_of_columns,
    _by_element,
    _index_along_columns,
    _scaled,
    _to_graphs,
    _to_more_rows,
]


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_is_not_fused(trace, listing, inputs, function):
    _check(trace, listing, function, inputs, fused=0)


def test_receivers_that_come_after_the_gather(trace, listing, inputs):
    def function(x, sh, w, senders, edge_index):
        message = _product(x, sh, w, senders)
        return _zeros(x).index_add(0, edge_index.clone(), message)

    _check(trace, listing, function, inputs, fused=1)


def test_no_edges_and_one_atom(trace, inputs):
    after = fuse_tensor_products(trace(_plain, *inputs))
    none = torch.zeros(0, dtype=torch.int64)
    x = torch.randn(1, WIDTH, dtype=torch.float64)
    out = after(x, x.new_zeros(0, 4), x.new_zeros(0, 5), none, none)
    assert out.shape == (1, OUT) and out.abs().max() == 0
