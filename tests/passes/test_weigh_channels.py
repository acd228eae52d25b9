"""weigh_channels, round_weights, shift_energies: what an error costs, who gets more bits, energies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.config import preset
from gaq_compile.errors import StructureError
from gaq_compile.ir.layout import channels
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.second_order import output_error, over_steps, round_second_order
from gaq_compile.numerics.weights import dequantize_weight, quantize_weight, weight_bytes, with_steps
from gaq_compile.passes import weigh_channels as module
from gaq_compile.passes.round_weights import round_weights
from gaq_compile.passes.shift_energies import shift_energies
from gaq_compile.passes.weigh_channels import ChannelCosts, weigh_channels
from gaq_compile.passes.widen_activations import RoundedSite

gaq = torch.ops.gaq
FORM = GraphFormat(("numbers", "edge_vec", "receivers", "senders", "batch", "ptr"), 5.0)
WIDTH = {"first": "3x0e -> 8x0e", "second": "8x0e -> 16x0e", "last": "16x0e -> 1x0e"}


RANDOM = torch.Generator().manual_seed(5)


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
def costs(graph):
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
    (h,) = weigh_channels(graph, FORM, [batch]).hessians[name].values()
    seen = said = 0.0
    for _ in range(400):
        error = 1e-3 * torch.randn(spec.weight_numel, generator=random)
        setattr(model, name, getattr(graph, name) + error)
        e = error.view(h.shape[0], -1).double()
        seen += float(model(*batch).sum() - graph(*batch).sum()) ** 2
        said += 2 * float((e * (h @ e)).sum()) / e.shape[1]  # H is per atom; outputs count alike in it
    assert seen == pytest.approx(said, rel=0.25)


def test_displacements_leave_edges_alone(graph, costs):
    hessians = costs.hessians
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
    assert float(found.hessians["l"][0, 1].trace()) > 0


def test_rounding_is_second_order_only_where_asked(graph, costs):
    near = round_weights(graph, replace(preset("w8"), rounding="nearest"), costs)
    for name, spec in WIDTH.items():
        assert torch.equal(near[name].codes, quantize_weight(getattr(graph, name), linear_spec(spec), 8)[0])
    together = round_weights(graph, preset("w8"), costs)
    assert any(not torch.equal(together[n].codes, near[n].codes) for n in WIDTH)


STEPS = {
    name: 0.003 + 0.03 * torch.rand(channels(linear_spec(spec).irreps_in), generator=RANDOM)
    for name, spec in WIDTH.items()
}
SITES = {name: RoundedSite("s8 m8d8", steps) for name, steps in STEPS.items()}


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_eight_bit_weights_hold_the_steps_of_their_inputs(graph, costs, rounding):
    known = costs if rounding == "second-order" else ChannelCosts()
    config = replace(preset("w8a8"), rounding=rounding)
    found, plain = (round_weights(graph, config, known, sites) for sites in (SITES, None))
    for name, text in WIDTH.items():
        spec, weight, rounded = linear_spec(text), getattr(graph, name), found[name]
        assert rounded.holds_steps and not plain[name].holds_steps and rounded.bits == 8
        meant = with_steps(weight, spec, STEPS[name])
        if rounding == "nearest":
            assert torch.equal(rounded.codes, quantize_weight(meant, spec, 8)[0]) and rounded.error == 0.0
            continue
        over = over_steps(costs.hessians[name], spec, STEPS[name])
        codes, scale = round_second_order(meant, spec, over, 8)
        assert torch.equal(rounded.codes, codes) and torch.equal(rounded.scale, scale)
        # the error is in the same unit as that of weights without steps: of the float weights, in H
        error = dequantize_weight(codes, scale, spec, STEPS[name]).double() - weight.double()
        e, (h,) = error.view(spec.inputs[0].mul, -1), costs.hessians[name].values()
        assert rounded.error == pytest.approx(float((e * (h @ e)).sum()), rel=1e-3)
        nearest = quantize_weight(meant, spec, 8)
        assert rounded.error <= 1.05 * output_error(meant, *nearest, spec, over)


def test_four_bit_weights_hold_no_steps_unless_they_are_promoted(graph, costs):
    config = replace(preset("w4a8"), max_weight_share=None)
    plain, found = (round_weights(graph, config, costs, sites) for sites in (None, SITES))
    for name in WIDTH:
        assert not found[name].holds_steps and found[name].bits == 4
        assert torch.equal(found[name].codes, plain[name].codes) and found[name].error == plain[name].error
    wide = round_weights(graph, replace(config, max_weight_share=10.0), costs, SITES)
    eight = round_weights(graph, preset("w8a8"), costs, SITES)
    for name in WIDTH:
        assert wide[name].holds_steps and wide[name].bits == 8
        assert torch.equal(wide[name].codes, eight[name].codes)


def test_steps_are_held_by_the_layers_that_meet_them_alone(graph, costs):
    found = round_weights(graph, preset("w8"), costs, {"second": SITES["second"]})
    assert [found[name].holds_steps for name in WIDTH] == [False, True, False]


@pytest.mark.parametrize("share", [None, 0.2, 0.25, 0.3, 10.0])
def test_the_worst_layers_get_more_bits_within_the_share(graph, costs, share):
    config = replace(preset("w4"), max_weight_share=share)
    found = round_weights(graph, config, costs)
    plain = round_weights(graph, replace(config, max_weight_share=None), costs)
    total = sum(weight_bytes(linear_spec(WIDTH[n]), None) for n in WIDTH)
    smallest = sum(weight_bytes(linear_spec(WIDTH[n]), 4) for n in WIDTH)
    stored = sum(weight_bytes(linear_spec(WIDTH[n]), found[n].bits) for n in WIDTH)
    assert stored <= max(smallest, (share or 0) * total)
    wide = [n for n in WIDTH if found[n].bits > 4]
    assert (share is not None or not wide) and (share != 10.0 or {w.bits for w in found.values()} == {16})
    assert all(found[n].error < plain[n].error for n in wide)


def test_overrides_keep_layers_in_float(graph, costs):
    config = preset("w8")
    from gaq_compile.config import resolve

    found = round_weights(graph, resolve(config, {"second": {"weight_bits": None}}), costs)
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
