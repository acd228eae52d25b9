"""weigh_channels, round_weights, shift_energies: what an error costs, who gets more bits, energies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.config import preset
from gaq_compile.errors import StructureError
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.weights import quantize_weight, weight_bytes
from gaq_compile.passes import weigh_channels as module
from gaq_compile.passes.round_weights import round_weights
from gaq_compile.passes.shift_energies import shift_energies
from gaq_compile.passes.weigh_channels import weigh_channels

gaq = torch.ops.gaq
FORM = GraphFormat(("numbers", "edge_vec", "receivers", "senders", "batch", "ptr"), 5.0)
WIDTH = {"first": "3x0e -> 8x0e", "second": "8x0e -> 16x0e", "last": "16x0e -> 1x0e"}


class Potential(torch.nn.Module):
    """Atomic energies from edge lengths through three layers."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, spec in WIDTH.items():
            size = linear_spec(spec).weight_numel
            self.register_buffer(name, torch.randn(size, generator=random) / 2)

    def forward(self, numbers, edge_vec, receivers, senders, batch, ptr):
        length = edge_vec.square().sum(1, keepdim=True)
        y = torch.exp(-(length - torch.arange(3.0)).square() / 3)
        for name, spec in WIDTH.items():
            y = torch.tanh(gaq.irreps_linear.default(y, getattr(self, name), None, spec, False, name))
        rows = y.new_zeros(numbers.shape[0], 1).index_add(0, receivers, y)
        return rows.squeeze(1).double() * (1 + 0.1 * numbers)


def _batch(seed: int = 0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, generator=random)
    i, j = (~torch.eye(5, dtype=torch.bool)).nonzero().T
    numbers = torch.tensor([1, 6, 6, 8, 1])
    return [
        numbers,
        x[j] - x[i],
        i.contiguous(),
        j.contiguous(),
        torch.zeros(5, dtype=torch.int64),
        torch.tensor([0, 5]),
    ]


@pytest.fixture(scope="module")
def graph():
    return torch.fx.symbolic_trace(Potential())


@pytest.fixture(scope="module")
def hessians(graph):
    return weigh_channels(graph, FORM, [_batch(0), _batch(1)])


def _energy_and_forces(graph, batch):
    edge = batch[1].clone().requires_grad_(True)
    energy = graph(batch[0], edge, *batch[2:]).sum()
    (gradient,) = torch.autograd.grad(energy, edge)
    forces = torch.zeros(5, 3).index_add(0, batch[2], gradient).index_add(0, batch[3], -gradient)
    return energy.detach(), forces.double()


@pytest.mark.parametrize("name", WIDTH)
def test_cost_predicts_what_an_error_does_to_the_energy(graph, monkeypatch, name):
    """On one edge, random errors of a layer change the energy by what H says, on average."""
    monkeypatch.setattr(module, "DRAWS", 0)
    monkeypatch.setattr(module, "ENERGY_WEIGHT", 1.0)
    edge = [torch.tensor([[0.9, -0.4, 0.3]]), torch.tensor([0]), torch.tensor([1])]
    batch = [torch.tensor([6, 8]), *edge, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2])]
    spec, random, model = linear_spec(WIDTH[name]), torch.Generator().manual_seed(1), Potential()
    (h,) = weigh_channels(graph, FORM, [batch])[name].values()
    seen = said = 0.0
    for _ in range(400):
        error = 1e-3 * torch.randn(spec.weight_numel, generator=random)
        setattr(model, name, getattr(graph, name) + error)
        e = error.view(h.shape[0], -1).double()
        seen += float(model(*batch).sum() - graph(*batch).sum()) ** 2
        said += 2 * float((e * (h @ e)).sum()) / e.shape[1]  # H is per atom; outputs count alike in it
    assert seen == pytest.approx(said, rel=0.25)


def test_displacements_leave_edges_alone(graph, hessians):
    assert set(hessians) == set(WIDTH)
    for name, spec in WIDTH.items():
        ((irrep, h),) = hessians[name].items()
        assert irrep == (0, 1) and h.shape == (linear_spec(spec).inputs[0].mul,) * 2
        assert torch.allclose(h, h.T) and float(torch.linalg.eigvalsh(h).min()) > -1e-9 * float(h.trace())


def test_calibration_with_nan_is_refused(graph):
    batch = _batch(0)
    batch[1] = batch[1] * torch.nan
    with pytest.raises(StructureError, match="first"):
        weigh_channels(graph, FORM, [batch])


def test_a_model_of_its_own_tensors():
    def function(positions, w):
        y = gaq.irreps_linear.default(
            positions.square() @ torch.ones(3, 2), w, None, "2x0e -> 1x0e", False, "l"
        )
        return y.squeeze(1).double()

    graph = torch.fx.symbolic_trace(function)
    form = GraphFormat(("positions", "w"), 0.0, positions="positions")
    found = weigh_channels(graph, form, [[torch.randn(4, 3), torch.randn(2)]])
    assert float(found["l"][0, 1].trace()) > 0


def test_rounding_is_second_order_only_where_asked(graph, hessians):
    near = round_weights(graph, replace(preset("w8"), rounding="nearest"), {})
    for name, spec in WIDTH.items():
        assert torch.equal(near[name].codes, quantize_weight(getattr(graph, name), linear_spec(spec), 8)[0])
    together = round_weights(graph, preset("w8"), hessians)
    assert any(not torch.equal(together[n].codes, near[n].codes) for n in WIDTH)


@pytest.mark.parametrize("share", [None, 0.2, 0.25, 0.3, 10.0])
def test_the_worst_layers_get_more_bits_within_the_share(graph, hessians, share):
    config = replace(preset("w4"), max_weight_share=share)
    found = round_weights(graph, config, hessians)
    plain = round_weights(graph, replace(config, max_weight_share=None), hessians)
    total = sum(weight_bytes(linear_spec(WIDTH[n]), None) for n in WIDTH)
    smallest = sum(weight_bytes(linear_spec(WIDTH[n]), 4) for n in WIDTH)
    stored = sum(weight_bytes(linear_spec(WIDTH[n]), found[n].bits) for n in WIDTH)
    assert stored <= max(smallest, (share or 0) * total)
    wide = [n for n in WIDTH if found[n].bits == 8]
    assert len(wide) == (3 if share == 10.0 else len(wide)) and (share is not None or not wide)
    assert all(found[n].error < plain[n].error for n in wide)


def test_overrides_keep_layers_in_float(graph, hessians):
    config = preset("w8")
    from gaq_compile.config import resolve

    found = round_weights(graph, resolve(config, {"second": {"weight_bits": None}}), hessians)
    assert set(found) == {"first", "last"}


def test_shifted_energies_have_the_right_mean_per_element(graph):
    rounded = torch.fx.symbolic_trace(Potential())
    rounded.second = rounded.second * 1.05
    batches = [_batch(0), _batch(1)]
    shifted = shift_energies(rounded, graph, FORM, batches)
    numbers = torch.cat([b[0] for b in batches])
    error = torch.cat([shifted(*b) - graph(*b) for b in batches])
    before = torch.cat([rounded(*b) - graph(*b) for b in batches])
    for z in (1, 6, 8):
        assert abs(float(error[numbers == z].mean())) < 1e-6 < abs(float(before[numbers == z].mean()))
    for a, b in zip(
        _energy_and_forces(shifted, batches[0])[1:], _energy_and_forces(rounded, batches[0])[1:], strict=True
    ):
        assert torch.equal(a, b)  # no force changes


def test_elements_that_calibration_did_not_see_are_not_shifted(graph):
    rounded = torch.fx.symbolic_trace(Potential())
    rounded.second = rounded.second * 1.05
    form = replace(FORM, elements=(1, 6, 8, 26))
    shifted = shift_energies(rounded, graph, form, [_batch(0)])
    iron = _batch(2)
    iron[0] = torch.full_like(iron[0], 26)
    assert torch.equal(shifted(*iron), rounded(*iron))
    own = GraphFormat(("positions",), 0.0, positions="positions")
    assert shift_energies(rounded, graph, own, [_batch(0)]) is rounded
