"""What rounded activations cost, which of them get 16 bits; biases and species tables of rounded weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.config import QuantConfig, activation_scheme, preset, resolve
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.weights import dequantize_weight
from gaq_compile.passes import weigh_channels as weighing
from gaq_compile.passes.calibrate import calibrate, quantization_sites
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.round_weights import round_weights
from gaq_compile.passes.weigh_channels import ChannelCosts, weigh_channels
from gaq_compile.passes.widen_activations import widen_activations

gaq, aten = torch.ops.gaq, torch.ops.aten
FORM = GraphFormat(("positions", "numbers"), 0.0, positions="positions")
SPECS = {"first": "3x0e -> 8x0e", "wide": "8x0e -> 64x0e", "last": "64x0e -> 1x0e"}


class Potential(torch.nn.Module):
    """Atomic energies from positions and a species table, through three layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, spec in SPECS.items():
            s = linear_spec(spec)
            inputs = s.inputs[0].mul
            self.register_buffer(name, torch.randn(s.weight_numel, generator=random) / inputs**0.5)
            self.register_buffer(f"{name}_bias", torch.randn(s.outputs[0].mul, generator=random) / 4)
        self.register_buffer("species", torch.randn(12, generator=random) * torch.logspace(0, -2, 12))

    def forward(self, positions, numbers):
        z = aten._to_copy.default(aten.one_hot.default(numbers, 4), dtype=torch.float32)
        y = gaq.irreps_linear.default(z, self.species, None, "4x0e -> 3x0e", False, "species")
        y = y + torch.sin(positions) + 0.5
        for name, spec in SPECS.items():
            bias = None if name == "last" else getattr(self, f"{name}_bias")
            y = torch.tanh(gaq.irreps_linear.default(y, getattr(self, name), bias, spec, False, name))
        return y.squeeze(1).double()


def _batch(seed: int, atoms: int = 40) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(atoms, 3, generator=random), torch.randint(0, 4, (atoms,), generator=random)]


BATCHES = [_batch(0), _batch(1)]
A8 = QuantConfig("a8", None, "s8 m8d8")


@pytest.fixture(scope="module")
def graph():
    return torch.fx.symbolic_trace(Potential())


@pytest.fixture(scope="module")
def costs(graph):
    return weigh_channels(graph, FORM, BATCHES, quantization_sites(graph, A8))


def test_species_are_integers_already(graph, costs):
    assert [site.label for site in quantization_sites(graph, A8)] == list(SPECS)
    assert set(costs.impacts) == set(SPECS) and set(costs.hessians) == {*SPECS, "species"}


@pytest.mark.parametrize("name", SPECS)
def test_impact_predicts_what_an_error_does_to_the_energy(graph, monkeypatch, name):
    """Random errors of a site, seen by its readers alone, change energies by what I says, on average."""
    monkeypatch.setattr(weighing, "DRAWS", 0)
    monkeypatch.setattr(weighing, "ENERGY_WEIGHT", 1.0)
    impact = weigh_channels(graph, FORM, [_batch(3)], quantization_sites(graph, A8)).impacts[name]
    (site,) = (s for s in quantization_sites(graph, A8) if s.label == name)
    random, spread = torch.Generator().manual_seed(1), torch.linspace(0.2, 2.0, len(impact)) * 1e-3

    class Disturbed(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n is site.source:
                value = value + spread * torch.randn(value.shape, generator=random)
            return value

    batch, seen = _batch(3), []
    for _ in range(60):
        seen.append(((Disturbed(graph).run(*batch) - graph(*batch)) ** 2).mean())  # per atom
    assert float(torch.stack(seen).mean()) == pytest.approx(float((impact * spread**2).sum()), rel=0.15)


def test_an_impact_counts_a_site_s_readers_alone(graph):
    """A tensor that is also read in float costs nothing there."""

    def function(positions, numbers, w):
        y = gaq.irreps_linear.default(positions, w, None, "3x0e -> 1x0e", False, "l")
        return (y.squeeze(1) + 1e6 * positions.sum(1)).double()

    traced = torch.fx.symbolic_trace(function)
    form = GraphFormat(("positions", "numbers", "w"), 0.0, positions="positions")
    sites, w = quantization_sites(traced, A8), torch.tensor([1.0, -2.0, 0.0])
    found = weigh_channels(traced, form, [[*_batch(0), w]], sites)
    torch.testing.assert_close(
        found.impacts["l"], weighing.ENERGY_WEIGHT * w.double() ** 2, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("share", [None, 0.03, 0.2, 10.0])
def test_the_costliest_per_multiplication_get_16_bits_within_the_share(graph, costs, share):
    sites, steps = quantization_sites(graph, A8), calibrate(graph, BATCHES, A8)
    found = widen_activations(sites, steps, costs, share)
    wide = {label for label, site in found.items() if site.scheme == "s16 m16d16"}
    work = {"first": 24, "wide": 512, "last": 64}
    assert sum(work[label] for label in wide) <= (share or 0) * sum(work.values())
    assert wide == {None: set(), 0.03: set(), 0.2: {"first", "last"}, 10.0: set(SPECS)}[share] or (
        share == 0.2 and "first" in wide
    )
    scheme, finer = activation_scheme("s8 m8d8"), activation_scheme("s16 m16d16")
    for label, site in found.items():
        want = steps[label]
        if label in wide:
            want = torch.full_like(want, float(want.max()) * scheme.qmax(0) / finer.qmax(0))
        torch.testing.assert_close(site.steps, want)
        assert (site.error > 0) == (label not in wide)


def test_wide_sites_leave_less_error(graph, costs):
    sites, steps, batch = quantization_sites(graph, A8), calibrate(graph, BATCHES, A8), _batch(5)
    errors = []
    for share in (None, 0.2, 10.0):
        quantized = insert_mddq(graph, A8, widen_activations(sites, steps, costs, share))
        errors.append(float((quantized(*batch) - graph(*batch)).abs().mean()))
    assert errors[0] > errors[1] > 20 * errors[2] > 0


def test_what_was_never_seen_costs_nothing(graph):
    """An input that is zero on every example has the step 1, but its rounding changes nothing."""
    still = [[torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)]]

    def function(positions, numbers, w):
        y = gaq.irreps_linear.default(positions * 0.0, w, None, "3x0e -> 1x0e", False, "l")
        return (y.squeeze(1) + positions.sum(1)).double()

    traced = torch.fx.symbolic_trace(function)
    form = GraphFormat(("positions", "numbers", "w"), 0.0, positions="positions")
    batches = [[*still[0], torch.ones(3)]]
    sites, steps = quantization_sites(traced, A8), calibrate(traced, batches, A8)
    costs = weigh_channels(traced, form, batches, sites)
    assert steps["l"].tolist() == [1.0] * 3 and float(costs.impacts["l"].sum()) > 0
    assert widen_activations(sites, steps, costs, 10.0)["l"].error == 0.0


def test_sixteen_bits_are_not_widened_and_unknown_sites_stay(graph, costs):
    config = QuantConfig("a16", None, "s16 m16d16")
    sites, steps = quantization_sites(graph, config), calibrate(graph, BATCHES, config)
    for known in (costs, ChannelCosts()):
        found = widen_activations(sites, steps, known, 10.0)
        assert all(found[label].steps is steps[label] for label in SPECS)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_makes_up_for_the_mean_of_the_weights_errors(graph, costs, bits):
    """No other bias costs less, to second order; layers without a bias get none."""
    config = replace(preset(f"w{bits}"), max_weight_share=None)
    weights = round_weights(graph, config, costs)
    assert weights["last"].bias is None and weights["species"].bias is None
    for name in ("first", "wide"):
        spec, rounded, mean = linear_spec(SPECS[name]), weights[name], costs.means[name]
        error = (dequantize_weight(rounded.codes, rounded.scale, spec) - getattr(graph, name)).double()
        whole = torch.cat([error.view(-1, spec.outputs[0].mul), rounded.bias.double()[None]])
        h = torch.cat([costs.hessians[name][0, 1], mean[None, :-1]])
        h = torch.cat([h, mean[:, None]], 1)
        slope = h @ whole  # of tr(E^T H E): zero in the bias' row at its minimum
        assert float(slope[-1].abs().max()) < 1e-5 * float((h[-1].abs() @ whole.abs()).max())
        assert float(rounded.bias.abs().max()) > 0


def test_the_bias_is_stored_with_its_correction(graph, monkeypatch):
    monkeypatch.setattr(
        weighing, "DRAWS", 2
    )  # a mean that is not weighed as the costs are: chance has a part
    costs = weigh_channels(graph, FORM, BATCHES, quantization_sites(graph, A8))
    weights = round_weights(graph, preset("w8"), costs)
    quantized = insert_mddq(graph, preset("w8"), {}, weights)
    torch.testing.assert_close(
        quantized.first_bias_1 if hasattr(quantized, "first_bias_1") else quantized.first_bias,
        graph.first_bias + weights["first"].bias,
    )
    plain = {k: replace(w, bias=None) for k, w in weights.items()}
    without = insert_mddq(graph, preset("w8"), {}, plain)
    batch = _batch(6, 2000)
    corrected, uncorrected = (g(*batch) - graph(*batch) for g in (quantized, without))
    assert abs(float(corrected.mean())) < abs(float(uncorrected.mean()))


@pytest.mark.parametrize("label", ["first", "wide"])
def test_the_bias_makes_up_best_for_the_weights_errors(graph, costs, label):
    """The cost of weights' errors E and a bias' change d: ``tr(E^T H E) + 2 d (E^T h) + c d^2``."""
    spec, rounded = linear_spec(SPECS[label]), round_weights(graph, preset("w8"), costs)[label]
    error = dequantize_weight(rounded.codes, rounded.scale, spec) - getattr(graph, label)
    matrix = error.double().view(spec.inputs[0].mul, -1)
    h, c = costs.means[label][:-1], costs.means[label][-1]

    def cost(change):
        squares = (matrix * (costs.hessians[label][0, 1] @ matrix)).sum(0)
        return squares + 2 * change * (h @ matrix) + c * change**2

    best = rounded.bias.double()
    assert float(best.abs().max()) > 0 and float(cost(best).sum()) < float(cost(0 * best).sum())
    for step in (1e-3, -1e-3):
        assert bool((cost(best + step) > cost(best)).all())


@pytest.mark.parametrize(
    ("scheme", "share", "bits"),
    [
        ("w8", 10.0, 16),
        ("w8", None, 8),
        ("w4", 0.01, 4),
        ("w4", 10.0, 16),
        ("w4", None, 4),
    ],
)
def test_species_tables_have_16_bits_where_bytes_allow(graph, costs, scheme, share, bits):
    """A table's rows are looked up, not summed: rounding them together gains nothing, more bits do."""
    table = linear_spec("4x0e -> 3x0e")
    found = round_weights(graph, replace(preset(scheme), max_weight_share=share), costs)
    rounded = found["species"]
    assert rounded.bits == bits and rounded.codes.dtype == (torch.int16 if bits == 16 else torch.int8)
    decoded = dequantize_weight(rounded.codes, rounded.scale, table)
    reach = {16: 1e-4, 8: 0.02, 4: 0.3}[bits] * float(graph.species.abs().max())
    torch.testing.assert_close(decoded, graph.species, rtol=0, atol=reach)


def test_sixteen_bits_can_be_asked_for(graph, costs):
    config = replace(resolve("w8", {"wide": {"weight_bits": 16}}), max_weight_share=None)
    assert {k: w.bits for k, w in round_weights(graph, config, costs).items()} == {
        "species": 8,
        "first": 8,
        "wide": 16,
        "last": 8,
    }


def test_two_uses_of_a_layer_are_counted_once_each():
    def function(positions, numbers, w):
        y = gaq.irreps_linear.default(torch.sin(positions), w, None, "3x0e -> 1x0e", False, "l")
        y = y + gaq.irreps_linear.default(torch.cos(positions), w, None, "3x0e -> 1x0e", False, "l")
        return y.squeeze(1).double()

    traced = torch.fx.symbolic_trace(function)
    form = GraphFormat(("positions", "numbers", "w"), 0.0, positions="positions")
    sites = quantization_sites(traced, A8)
    costs = weigh_channels(traced, form, [[*_batch(0), torch.ones(3)]], sites)
    assert len(sites) == 2 and costs.rows["l"] == pytest.approx(2.0)
    expected = 2 * weighing.ENERGY_WEIGHT * torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(costs.impacts["l"], expected, rtol=1e-3, atol=1e-6)
    found = widen_activations(sites, {"l": torch.full((3,), 0.01)}, costs, 1.0)
    assert found["l"].scheme == "s16 m16d16"  # all of the work is within a share of 1


def test_a_biased_layer_without_invariant_inputs_is_weighed(graph):
    """Its bias meets no channel, so there is no mean to take up."""

    def function(positions, numbers, w, b):
        y = gaq.irreps_linear.default(positions, w, b, "1x1o -> 1x1o+1x0e", False, "l")
        return (y[:, :3].square().sum(1) + y[:, 3]).double()

    traced = torch.fx.symbolic_trace(function)
    form = GraphFormat(("positions", "numbers", "w", "b"), 0.0, positions="positions")
    found = weigh_channels(traced, form, [[*_batch(0), torch.ones(1), torch.ones(1)]])
    assert found.means == {} and float(found.hessians["l"][1, -1].trace()) > 0
