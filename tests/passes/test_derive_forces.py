"""derive_forces: energy, forces and virial against autograd over positions and strain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.operators import registration as _registration  # noqa: F401 - registers the operators
from gaq_compile.passes import derive_forces as derive_forces_pass
from gaq_compile.passes.derive_forces import derive_forces, outputs
from gaq_compile.passes.simplify import simplify

gaq = torch.ops.gaq
NAMES = ("numbers", "edge_vec", "receivers", "senders", "batch", "ptr")
FORM = GraphFormat(NAMES, 5.0)
PRODUCT = "4x0e * 1x0e+1x1o -> 4x0e+4x1o | 0.0.0 0.1.1"
GATE = "4x0e ; 4x0e ; 4x1o ; silu ; sigmoid"


class Energy(nn.Module):
    """One convolution of a small equivariant potential, in gaq operators and float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Parameter(torch.randn(9, 4, dtype=torch.float64))
        self.radial = nn.Parameter(torch.randn(8, dtype=torch.float64))
        self.mix = nn.Parameter(torch.randn(4 * 8 + 4 * 4, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def forward(self, numbers, edge_vec, receivers, senders, batch, ptr):
        x = self.table[numbers]
        length = edge_vec.norm(dim=1, keepdim=True)
        weight = gaq.irreps_linear.default(
            torch.exp(-length), self.radial, None, "1x0e -> 8x0e", False, "radial"
        )
        sh = gaq.spherical_harmonics.default(edge_vec, "1x0e+1x1o", True, "component", "sh")
        message = gaq.tensor_product.default(x[senders], sh, weight, PRODUCT, "tp")
        y = x.new_zeros(x.shape[0], 16).index_add(0, receivers, message)
        y = gaq.irreps_linear.default(y, self.mix, None, "4x0e+4x1o -> 8x0e+4x1o", False, "mix")
        y = gaq.gate.default(y, GATE, "gate")
        vectors = y[:, 4:].reshape(-1, 3, 4).square().sum((1, 2))
        return (
            vectors
            + gaq.irreps_linear.default(y[:, :4], self.head, None, "4x0e -> 1x0e", False, "head")[:, 0]
        )


def _graph(sizes: list[int], seed: int, neighbours: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Positions and inputs of disconnected graphs; edges are random pairs, with periodic shifts."""
    g = torch.Generator().manual_seed(seed)
    atoms, ptr = sum(sizes), [0]
    senders, receivers = [], []
    for n in sizes:
        for i in range(n):
            for j in torch.randperm(n, generator=g)[:neighbours].tolist():
                if i != j:
                    receivers.append(ptr[-1] + i)
                    senders.append(ptr[-1] + j)
        ptr.append(ptr[-1] + n)
    positions = torch.randn(atoms, 3, generator=g, dtype=torch.float64) * 2
    receivers, senders = torch.tensor(receivers, dtype=torch.int64), torch.tensor(senders, dtype=torch.int64)
    edge_vec = positions[senders] - positions[receivers]
    numbers = torch.randint(0, 9, (atoms,), generator=g)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return positions, [numbers, edge_vec, receivers, senders, batch, torch.tensor(ptr)]


def _truth(model: nn.Module, positions: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Energies, atomic energies, forces and virials from positions and a strain per graph."""
    numbers, _, receivers, senders, batch, ptr = inputs
    x = positions.clone().requires_grad_(True)
    strain = torch.zeros(len(ptr) - 1, 3, 3, dtype=x.dtype, requires_grad=True)
    vectors = x[senders] - x[receivers]
    vectors = vectors + torch.einsum("ei,eij->ej", vectors, strain[batch[receivers]])
    atomic = model(numbers, vectors, receivers, senders, batch, ptr)
    energy = torch.zeros(len(ptr) - 1, dtype=torch.float64).index_add(0, batch, atomic)
    gx, gs = torch.autograd.grad(atomic.sum(), (x, strain))
    return energy.detach(), atomic.detach(), -gx, gs


def _check(graph, model, sizes, seed, neighbours=3):
    positions, inputs = _graph(sizes, seed, neighbours)
    expected = _truth(model, positions, inputs)
    got = graph(*inputs)
    assert len(got) == len(expected) == len(outputs(FORM))
    for name, a, b in zip(outputs(FORM), got, expected, strict=True):
        assert a.shape == b.shape, name
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9), name


@pytest.fixture(scope="module")
def model():
    return Energy()


@pytest.fixture(scope="module")
def derived(model):
    return derive_forces(symbolic_trace(model), FORM, _graph([5, 3], 0)[1])


@pytest.mark.parametrize("sizes", [[5, 3], [4], [2], [7, 1, 2, 9], [3, 3, 3, 3, 3]], ids=str)
def test_against_autograd(derived, model, sizes):
    _check(derived, model, sizes, seed=sum(sizes))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1]], ids=str)
def test_atoms_without_neighbours(derived, model, sizes):
    _check(derived, model, sizes, seed=1)
    out = dict(zip(outputs(FORM), derived(*_graph(sizes, 1)[1]), strict=True))
    assert out["forces"].abs().max() == 0 and out["virial"].abs().max() == 0


def test_forces_and_torques_vanish(derived):
    positions, inputs = _graph([8, 6], 3)
    _, _, forces, virial = derived(*inputs)
    for graph in (0, 1):
        mine = inputs[4] == graph
        assert forces[mine].sum(0).abs().max() < 1e-12
        assert torch.linalg.cross(positions[mine], forces[mine]).sum(0).abs().max() < 1e-11
    assert (virial - virial.transpose(1, 2)).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("sizes", "neighbours"),
    [([3, 1], 4), ([2, 2], 2), ([4, 4], 5), ([1, 3], 3), ([6, 10], 20), ([2, 1], 2), ([5, 4], 2)],
    ids=str,
)
def test_sizes_of_the_example_are_not_baked_in(model, sizes, neighbours):
    """Examples whose atoms, edges or graphs happen to equal channels, components or each other."""
    graph = derive_forces(symbolic_trace(model), FORM, _graph(sizes, 0, neighbours)[1])
    _check(graph, model, [5, 1, 3], seed=2)
    _check(graph, model, [9], seed=3)


def test_result_is_functional_and_pure(model, derived, assert_pure):
    assert_pure(lambda g: derive_forces(g, FORM, _graph([5, 3], 0)[1]), symbolic_trace(model))
    for node in derived.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
    assert [n.target for n in derived.graph.nodes if n.op == "placeholder"] == list(NAMES)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class TwoRanges(Energy):
    """A short-ranged energy and a long-ranged one on edges of its own."""

    def forward(
        self, numbers, edge_vec, receivers, senders, batch, ptr, edge_vec_lr, receivers_lr, senders_lr
    ):
        short = super().forward(numbers, edge_vec, receivers, senders, batch, ptr)
        pair = 1.0 / (1.0 + edge_vec_lr.square().sum(1))
        return short.index_add(0, receivers_lr, pair * self.head[0])


def test_long_range_edges():
    model, form = TwoRanges(), GraphFormat((*NAMES, "edge_vec_lr", "receivers_lr", "senders_lr"), 5.0, 9.0)

    def joined(sizes, seed):
        positions, short = _graph(sizes, seed)
        _, long = _graph(sizes, seed + 1, 6)
        return positions, [*short, positions[long[3]] - positions[long[2]], long[2], long[3]]

    graph = derive_forces(symbolic_trace(model), form, joined([5, 3], 0)[1])
    positions, inputs = joined([4, 6], 7)
    x = positions.clone().requires_grad_(True)
    batch = inputs[4]
    strain = torch.zeros(2, 3, 3, dtype=x.dtype, requires_grad=True)
    moved = list(inputs)
    for at, r, s in ((1, inputs[2], inputs[3]), (6, inputs[7], inputs[8])):
        vectors = x[s] - x[r]
        moved[at] = vectors + torch.einsum("ei,eij->ej", vectors, strain[batch[r]])
    gx, gs = torch.autograd.grad(model(*moved).sum(), (x, strain))
    _, _, forces, virial = graph(*inputs)
    assert torch.allclose(forces, -gx, atol=1e-10) and torch.allclose(virial, gs, atol=1e-10)


def test_positions_of_a_model_s_own():
    class Own(nn.Module):
        def forward(self, positions, charges):
            return (positions.square().sum(1) * charges).sum().reshape(1)

    form = GraphFormat(("positions", "charges"), 0.0, positions="positions")
    graph = derive_forces(symbolic_trace(Own()), form, [torch.randn(4, 3), torch.randn(4)])
    x, q = torch.randn(6, 3), torch.randn(6)
    energy, forces = graph(x, q)
    assert torch.allclose(energy, (x.square().sum(1) * q).sum()[None])
    assert torch.allclose(forces, -2 * x * q[:, None]) and outputs(form) == ("energy", "forces")


class Colliding(nn.Module):
    """``layer_0`` and ``layer.0`` are different weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_0 = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.layer = nn.ParameterList([nn.Parameter(torch.tensor(5.0, dtype=torch.float64))])

    def forward(self, numbers, edge_vec, receivers, senders, batch, ptr):
        pair = edge_vec.square().sum(1) * self.layer_0 + edge_vec.sum(1) * self.layer[0]
        return pair.new_zeros(numbers.shape[0]).index_add(0, receivers, pair)


def test_weights_of_similar_names_stay_apart():
    model = Colliding()
    _check(derive_forces(symbolic_trace(model), FORM, _graph([5, 3], 0)[1]), model, [4, 2], seed=1)


class Stopped(nn.Module):
    """A charge-like quantity through which the model stops the gradient."""

    def forward(self, numbers, edge_vec, receivers, senders, batch, ptr):
        length = edge_vec.square().sum(1)
        pair = length * torch.ops.aten.detach.default(length)
        return pair.new_zeros(numbers.shape[0]).index_add(0, receivers, pair)


def test_a_stopped_gradient_stays_stopped():
    _check(derive_forces(symbolic_trace(Stopped()), FORM, _graph([5, 3], 0)[1]), Stopped(), [4, 2], seed=1)


def test_a_stopped_gradient_survives_simplify():
    graph = simplify(symbolic_trace(Stopped()))
    _check(derive_forces(graph, FORM, _graph([5, 3], 0)[1]), Stopped(), [4, 2], seed=1)


class InPlace(nn.Module):
    """An energy whose gradient formula works in place: a norm's, masked where it is zero."""

    def forward(self, numbers, edge_vec, receivers, senders, batch, ptr):
        length = torch.linalg.vector_norm(edge_vec, dim=1, keepdim=True)
        return edge_vec.new_zeros(numbers.shape[0], 1).index_add(0, receivers, torch.exp(-length))[:, 0]


def test_no_operator_works_in_place(monkeypatch):
    """Found out without a second trace, and the same as with one."""
    _, inputs = _graph([5, 4], 8)
    found = derive_forces(symbolic_trace(InPlace()), FORM, inputs)
    assert not any(n.target._schema.is_mutable for n in found.graph.nodes if hasattr(n.target, "_schema"))
    assert any(n.target is torch.ops.aten.masked_fill.Scalar for n in found.graph.nodes)
    monkeypatch.setattr(derive_forces_pass, "_without_mutations", lambda traced: False)
    retraced = derive_forces(symbolic_trace(InPlace()), FORM, inputs)
    for a, b in zip(found(*inputs), retraced(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (y := x * 2, y[0].masked_fill_(x[0] > 0, 1.0), y)[-1],  # of a view
        lambda x: (y := x * 2, v := y[0], y.masked_fill_(x > 0, 1.0), v)[-1],  # seen through a view
        lambda x: x.masked_fill_(x > 0, 1.0) + x,  # of what was given
        lambda x: (y := x * 2, y.logical_and_(x > 0), y)[-1],  # the type would change
        lambda x: (y := x * 2, y.add_(x), y)[-1],  # not known
    ],
    ids=["view", "viewed", "input", "type", "unknown"],
)
def test_mutations_that_others_may_see_are_left(function):
    traced = make_fx(function, tracing_mode="symbolic")(torch.randn(3, 4))
    before = traced.code
    assert not derive_forces_pass._without_mutations(traced)
    assert traced.code == before
