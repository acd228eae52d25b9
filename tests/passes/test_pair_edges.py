"""pair_edges: what an edge and its reverse share is computed once, and nothing else is."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental._config as fx_config
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.passes.fuse_rows import fuse_rows
from gaq_compile.passes.graph_tools import LINEARS, calls
from gaq_compile.passes.row_groups import fused_rows
from gaq_compile.passes.simplify import simplify

aten, gaq = torch.ops.aten, torch.ops.gaq
FORM = GraphFormat(("edge_vec", "receivers", "senders", "batch"), 5.0)
ATOMS, BONDS, WIDTH = 6, 9, 8
SPEC = f"{WIDTH}x0e -> {WIDTH}x0e"


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    vec, ends = torch.randn(BONDS, 3), torch.randint(0, ATOMS, (2, BONDS))
    batch = torch.tensor([0, 0, 0, 0, 1, 1])
    return torch.cat([vec, -vec]), torch.cat([ends[0], ends[1]]), torch.cat([ends[1], ends[0]]), batch


@pytest.fixture
def graph(inputs):
    """``graph(function)``: of edge_vec, receivers, senders, batch, by the names that potentials use."""

    def named(function) -> GraphModule:
        with fx_config.patch(use_duck_shape=False):
            gm = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
        for node, name in zip([n for n in gm.graph.nodes if n.op == "placeholder"], FORM.inputs, strict=True):
            node.target = name
        return simplify(gm, differentiated=True)

    return named


def _drawn(*shape):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(32)]


WEIGHTS, TABLES, BENDS = _drawn(WIDTH * WIDTH), _drawn(2, WIDTH), _drawn(3, WIDTH)


def _linear(x, seed):
    return gaq.irreps_linear(x, WEIGHTS[seed], None, SPEC, False, f"linear{seed}")


def _network(x, seed):
    return _linear(torch.nn.functional.silu(_linear(x, seed)), seed + 1)


def _radial(vec, seed=0):
    """Functions of the length (E, 8)."""
    length = vec.square().sum(-1, keepdim=True).sqrt()
    scales = torch.linspace(0.3, 2.0, WIDTH)
    basis = torch.where(length < 3.0, torch.exp(-length * scales), torch.zeros_like(length))
    return _network(basis, seed)


def _atoms(batch, seed=7):
    return TABLES[seed][batch]


def _add(values, index, batch):
    return values.new_zeros(batch.shape[0], values.shape[1]).index_add(0, index, values)


def _forces(energy):
    """Energy and forces of an energy of the four inputs."""

    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        total = energy(vec, receivers, senders, batch)
        (gradient,) = torch.autograd.grad(total.sum(), vec)
        forces = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, gradient)
        return total.detach(), forces.index_add(0, senders, -gradient)

    return function


def _check(gm: GraphModule, inputs) -> dict[str, int]:
    """That nothing has changed but the rows; returns how many linears have how many rows."""
    after = fuse_rows(gm, FORM, linears=False)
    for a, b in zip(gm(*inputs), after(*inputs), strict=True):
        assert a.shape == b.shape and a.abs().max() > 1e-3
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-6)
    seen: dict[str, int] = {}

    class Rows(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.target in LINEARS:
                kind = {2 * BONDS: "edge", BONDS: "bond"}.get(len(value), "atom")
                seen[kind] = seen.get(kind, 0) + 1
            return value

    Rows(after).run(*inputs)
    return seen


def _gather_first(vec, receivers, senders, batch):
    """A radial network, whose products with senders are added to receivers."""
    messages = _radial(vec) * _atoms(batch)[senders]
    return torch.tanh(_add(messages, receivers, batch)).sum(1)


def test_a_radial_network_and_its_gradient_run_on_bonds(graph, inputs):
    gm = graph(_forces(_gather_first))
    assert _check(gm, inputs) == {"bond": 4}
    after = fuse_rows(gm, FORM)
    assert "bond" in [fused_rows(after, n).rows for n in after.graph.nodes if fused_rows(after, n)]


def test_differences_of_both_ends_are_odd_and_their_squares_even(graph, inputs):
    def energy(vec, receivers, senders, batch):
        per_atom = _gather_first(vec, receivers, senders, batch)[:, None] * _atoms(batch, 3)
        apart = per_atom[senders] - per_atom[receivers]
        filters = _radial(vec, 10) + _network(apart * apart, 20)
        return torch.tanh(_add(filters * per_atom[senders], receivers, batch)).sum(1)

    assert _check(graph(_forces(energy)), inputs) == {"bond": 12}


def test_a_convolution_reads_the_weights_of_bonds(graph, inputs):
    spec = f"{WIDTH}x0e * 1x1o -> {WIDTH}x1o | 0.0.0*1.0"

    def energy(vec, receivers, senders, batch):
        edges = gaq.sort_edges(senders, receivers, batch.shape[0])
        return torch.tanh(gaq.conv(_atoms(batch), vec, _radial(vec), edges, spec, "conv")).sum(1)

    gm = graph(_forces(energy))
    assert _check(gm, inputs) == {"bond": 4}
    after = fuse_rows(gm, FORM, linears=False)
    linears = {n for target in LINEARS for n in calls(after, target)}
    assert next(calls(after, gaq.conv.default)).args[2] in linears
    backward = next(calls(after, gaq.conv_backward.default))
    assert backward.args[3] in linears
    (gradient,) = (user for user in backward.users if user.args[1] == 2)
    assert linears.issuperset(gradient.users), "both edges' sum comes out of the kernel"


def test_a_convolution_reads_the_rounded_weights_of_bonds(graph, inputs):
    """The gradient is rounded after both edges' sum, where it was rounded before."""
    spec = f"{WIDTH}x0e * 1x1o -> {WIDTH}x1o | 0.0.0*1.0"

    def energy(vec, receivers, senders, batch):
        edges = gaq.sort_edges(senders, receivers, batch.shape[0])
        weight = gaq.round_half(_radial(vec), 0, "conv")
        return torch.tanh(gaq.conv(_atoms(batch), vec, weight, edges, spec, "conv")).sum(1)

    gm = graph(_forces(energy))
    after = fuse_rows(gm, FORM, linears=False)
    backward = next(calls(after, gaq.conv_backward.default))
    (gradient,) = (user for user in backward.users if user.args[1] == 2)
    found = dict(zip(("energy", "forces"), zip(gm(*inputs), after(*inputs), strict=True), strict=True))
    assert torch.equal(*found["energy"]), "weights are rounded alike"
    assert torch.allclose(*found["forces"], rtol=2e-3, atol=2e-4)
    rows = {}

    class Rows(torch.fx.Interpreter):
        def run_node(self, n):
            rows[n] = super().run_node(n)
            return rows[n]

    Rows(after).run(*inputs)
    assert len(rows[backward.args[3]]) == len(rows[gradient]) == BONDS


def test_a_convolution_whose_weights_gradient_is_read_by_itself_reads_the_weights_of_edges(graph, inputs):
    spec = f"{WIDTH}x0e * 1x1o -> {WIDTH}x1o | 0.0.0*1.0"

    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        edges, weight = gaq.sort_edges(senders, receivers, batch.shape[0]), _radial(vec)
        total = torch.tanh(gaq.conv(_atoms(batch), vec, weight, edges, spec, "conv")).sum(1)
        to_vec, to_weight = torch.autograd.grad(total.sum(), (vec, weight))
        forces = vec.new_zeros(batch.shape[0], 3).index_add(0, receivers, to_vec)
        return total.detach(), forces.index_add(0, senders, -to_vec), _add(to_weight, senders, batch)

    gm = graph(function)
    _check(gm, inputs)
    after = fuse_rows(gm, FORM, linears=False)
    linears = {n for target in LINEARS for n in calls(after, target)}
    assert next(calls(after, gaq.conv.default)).args[2] in linears
    assert next(calls(after, gaq.conv_backward.default)).args[3] not in linears


@pytest.mark.parametrize("order", ["one", "other"])
def test_what_tells_the_ends_apart_is_left_alone(graph, inputs, order):
    """A function of the sender's atom, or of the product of different tensors of both, is not even."""

    def energy(vec, receivers, senders, batch):
        one, other = _atoms(batch)[senders], _atoms(batch, 9)[receivers]
        known = one * other if order == "one" else one - other
        return torch.tanh(_add(_network(known, 2) * _radial(vec), receivers, batch)).sum(1)

    found = _check(graph(_forces(energy)), inputs)
    assert found["bond"] == 4 and found["edge"] == 2


def test_a_function_of_the_vector_is_left_alone(graph, inputs):
    def energy(vec, receivers, senders, batch):
        bent = torch.tanh(vec) @ BENDS[5]
        return torch.tanh(_add(_network(bent, 2), receivers, batch)).sum(1)

    assert _check(graph(_forces(energy)), inputs) == {"edge": 4}


def test_a_gradient_that_is_added_to_one_end_only_stays_with_the_edges(graph, inputs):
    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        total = _gather_first(vec, receivers, senders, batch)
        (gradient,) = torch.autograd.grad(total.sum(), vec)
        return total.detach(), _add(gradient, receivers, batch), _add(-gradient, senders, batch)

    assert _check(graph(function), inputs) == {"bond": 2, "edge": 2}


@pytest.mark.parametrize("share", ["twice", "scaled"])
def test_unequal_shares_of_a_gradient_stay_with_the_edges(graph, inputs, share):
    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        total = _gather_first(vec, receivers, senders, batch)
        (gradient,) = torch.autograd.grad(total.sum(), vec)
        one, other = _add(gradient, receivers, batch), _add(-gradient, senders, batch)
        return total.detach(), one + one + other if share == "twice" else torch.add(one, other, alpha=0.5)

    assert _check(graph(function), inputs) == {"bond": 2, "edge": 2}


def test_a_gradient_that_is_read_by_itself_stays_with_the_edges(graph, inputs):
    def function(vec, receivers, senders, batch):
        vec = vec.detach().requires_grad_()
        total = _gather_first(vec, receivers, senders, batch)
        (gradient,) = torch.autograd.grad(total.sum(), vec)
        forces = _add(gradient, receivers, batch).index_add(0, senders, -gradient)
        return total.detach(), forces, gradient.clone()

    assert _check(graph(function), inputs) == {"bond": 2, "edge": 2}


def test_biases_and_constants_in_a_gradient_are_not_doubled(graph, inputs):
    """A constant added to something of which pairs are summed up counts twice: nothing is lifted over it."""

    def function(vec, receivers, senders, batch):
        gradient = _linear(_linear(_radial(vec) * _atoms(batch)[senders], 30) + 0.5, 31)
        odd = vec * gradient.sum(1, keepdim=True)
        return _add(odd, receivers, batch).index_add(0, senders, -odd), gradient.sum(0)[:1]

    _check(graph(function), inputs)

    def summed_only(vec, receivers, senders, batch):
        gradient = _linear(_linear(_radial(vec) * _atoms(batch)[senders], 30) + 0.5, 31)
        odd = vec * gradient.sum(1, keepdim=True)
        return (_add(odd, receivers, batch).index_add(0, senders, -odd),)

    found = _check(graph(summed_only), inputs)
    assert found["bond"] >= 2


def test_nothing_happens_without_a_linear(graph, inputs):
    def energy(vec, receivers, senders, batch):
        return _add(torch.exp(-vec.square().sum(-1, keepdim=True)), receivers, batch).sum(1)

    after = fuse_rows(graph(_forces(energy)), FORM)
    assert not list(calls(after, gaq.bonds.default))


def test_the_bonds_of_edges(inputs):
    _, receivers, senders, _ = inputs
    bond, mask, first, second, ends, others = gaq.bonds(receivers, senders)
    edges = torch.arange(2 * BONDS)
    assert torch.equal(edges[first][bond] + BONDS * (mask == 0), edges)
    assert torch.equal(receivers[second], senders[first]) and torch.equal(ends, receivers[first])
    assert torch.equal(others, senders[first]) and mask.sum() == BONDS
    assert [len(t) for t in gaq.bonds(receivers[:0], senders[:0])] == [0] * 6
