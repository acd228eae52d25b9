"""choose_bits: the fewest bytes that keep a force error, measured."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.config import QuantConfig, resolve
from gaq_compile.errors import ConfigError
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.weights import weight_bytes
from gaq_compile.operators.registration import ops as gaq
from gaq_compile.passes.choose_bits import ErrorOf, GraphError, Trial, Variants, bisect, choose_bits
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.observe import Observed, observe
from gaq_compile.passes.round_weights import Rounder, round_weights
from gaq_compile.verify.energy_graphs import Comparison, energy_and_forces

FORM = GraphFormat(("positions", "numbers"), 0.0, positions="positions")
WIDTHS = {
    "first": "3x0e -> 24x0e",
    "second": "24x0e -> 24x0e",
    "third": "24x0e -> 24x0e",
    "last": "24x0e -> 1x0e",
}


class Network(nn.Module):
    """Atoms in a field: an energy with four layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for name, spec in WIDTHS.items():
            size = linear_spec(spec).weight_numel
            self.register_buffer(name, 0.4 * torch.randn(size, generator=generator))

    def forward(self, positions: Tensor, numbers: Tensor) -> Tensor:
        x = positions
        for name, spec in WIDTHS.items():
            x = gaq.irreps_linear.default(x, getattr(self, name), None, spec, False, name)
            x = torch.tanh(x) if name != "last" else x
        return x.squeeze(1).double()


def batch(seed: int, atoms: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(atoms, 3, generator=generator), torch.zeros(atoms, dtype=torch.int64)]


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    return torch.fx.symbolic_trace(Network())


@pytest.fixture(scope="module")
def comparison(graph) -> Comparison:
    return Comparison(graph, FORM, [batch(11), batch(12, 24)])


@pytest.fixture(scope="module")
def error_of(comparison) -> ErrorOf:
    return comparison.error


CALIBRATION = [batch(1), batch(2)]


def observed(graph: GraphModule, config: QuantConfig) -> Observed:
    return observe(graph, config, FORM, CALIBRATION)


def test_forces_are_the_energy_s_gradient(graph) -> None:
    inputs = batch(3, 6)
    found = energy_and_forces(graph, FORM, inputs)
    assert found.energy == pytest.approx(float(graph(*inputs).sum()), rel=1e-6)
    step = 1e-2
    for atom, axis in ((0, 0), (3, 2)):
        ends = []
        for sign in (1, -1):
            moved = inputs[0].clone()
            moved[atom, axis] += sign * step
            ends.append(float(graph(moved, inputs[1]).sum()))
        assert found.forces[atom, axis] == pytest.approx(-(ends[0] - ends[1]) / (2 * step), abs=2e-3)


def test_a_comparison_is_a_mean_over_atoms(graph, comparison) -> None:
    assert comparison.atoms == 64
    assert comparison.error(graph) == GraphError(0.0, 0.0, 0.0)
    rounded = insert_mddq(graph, resolve("w4"), {})
    found = comparison.error(rounded)
    gaps, sizes = [], []
    for inputs in (batch(11), batch(12, 24)):
        f, t = (energy_and_forces(g, FORM, inputs).forces for g in (rounded, graph))
        gaps.append(abs(f - t).ravel())
        sizes.append(abs(t).ravel())
    mean = sum(g.sum() for g in gaps) / sum(g.size for g in gaps)
    assert found.force_mev_per_a == pytest.approx(1e3 * mean, rel=1e-6)
    assert found.force_rel == pytest.approx(mean / (sum(s.sum() for s in sizes) / (3 * 64)), rel=1e-6)


def test_shares_are_those_where_one_layer_gets_wider(graph) -> None:
    config = resolve("w4")
    rounder = Rounder(graph, config, observed(graph, config).costs)
    shares = rounder.shares()
    assert shares == sorted(shares) and len(shares) == 2 * len(WIDTHS) + 1
    widths = [{k: w.bits for k, w in rounder.within(share).items()} for share in shares]
    assert set(widths[0].values()) == {4} and set(widths[-1].values()) == {16}
    for before, after in itertools.pairwise(widths):
        (changed,) = (k for k in WIDTHS if before[k] != after[k])
        assert after[changed] == 2 * before[changed]
    size = sum(weight_bytes(linear_spec(WIDTHS[k]), b) for k, b in widths[3].items())
    assert rounder.bytes_of(rounder.within(shares[3])) == size <= shares[3] * rounder.float_bytes < size + 1


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_what_is_chosen_keeps_the_error_with_few_bytes(graph, error_of, share) -> None:
    """As small as exhaustive search over the same sequence finds it, where errors fall along it."""
    start = resolve("w4", max_force_error=1.0)
    known = observed(graph, start)
    variants = Variants(graph, start, known, error_of)
    errors = [variants.measure(s, None).error.force_mev_per_a for s in variants.shares(None)]
    most = share * errors[0]
    choice = choose_bits(graph, replace(start, max_force_error=most), known, error_of)
    assert choice.chosen.error.force_mev_per_a <= most and choice.chosen in choice.trials
    assert len(choice.trials) <= 5  # of nine that there are
    place = variants.shares(None).index(choice.chosen.max_weight_share)
    assert place > 0 and errors[place - 1] > most
    weights = round_weights(graph, choice.config, known.costs)
    again = error_of(insert_mddq(graph, choice.config, {}, weights))
    assert again.force_mev_per_a == pytest.approx(choice.chosen.error.force_mev_per_a, rel=1e-6)


def test_activations_leave_room_for_weights(graph, error_of) -> None:
    start = resolve("w4a8")
    known = observed(graph, start)
    variants = Variants(graph, start, known, error_of)
    alone = [variants.measure(None, wide).error.force_mev_per_a for wide in (0.0, 1.0)]
    assert alone[1] < 0.1 * alone[0]
    most = 0.8 * alone[0]  # narrow activations take all of it
    choice = choose_bits(graph, replace(start, max_force_error=most), known, error_of)
    assert choice.config.max_wide_share and choice.chosen.error.force_mev_per_a <= most
    activations = known.activations(choice.config.max_wide_share)
    assert {site.scheme for site in activations.values()} > {"s16 m16d16"}  # some, not all
    generous = replace(start, max_force_error=100 * alone[0])
    choice = choose_bits(graph, generous, known, error_of)
    assert choice.config.max_wide_share is None
    assert {w.bits for w in round_weights(graph, choice.config, known.costs).values()} == {4}


def test_an_error_that_cannot_be_kept_is_refused_with_the_least(graph, error_of) -> None:
    config = resolve("w4a8", max_force_error=1e-4)
    with pytest.raises(ConfigError, match="smallest measured") as caught:
        choose_bits(graph, config, observed(graph, config), error_of)
    assert "auto" in caught.value.fix
    with pytest.raises(ConfigError, match="no force error"):
        choose_bits(graph, resolve("w4"), observed(graph, resolve("w4")), error_of)


def test_what_is_not_a_choice_is_not_the_least(graph, error_of) -> None:
    """Activations of 16 bits: there is one way to widen them, and float weights are none to choose."""
    config = resolve("w4a16", max_force_error=1e-3)
    known = observed(graph, config)
    with pytest.raises(ConfigError, match="smallest measured is") as caught:
        choose_bits(graph, config, known, error_of)
    variants = Variants(graph, config, known, error_of)
    least = variants.measure(variants.shares(0.0)[-1], 0.0).error.force_mev_per_a
    assert f"{least:.3g}" in str(caught.value)
    choice = choose_bits(graph, replace(config, max_force_error=1.05 * least), known, error_of)
    assert choice.config.max_wide_share is None
    measured = [(t.max_weight_share, t.max_wide_share) for t in choice.trials]
    assert len(measured) == len(set(measured)) and {wide for _, wide in measured} == {0.0}


@pytest.mark.parametrize("overrides", [{"*": "fp32"}, {"*": {"weight_bits": None}}])
def test_without_integer_weights_there_is_nothing_to_choose(graph, error_of, overrides) -> None:
    config = resolve("auto", overrides, max_force_error=5.0)
    with pytest.raises(ConfigError, match="no layer has integer weights"):
        choose_bits(graph, config, observed(graph, config), error_of)


def test_layers_with_rounded_inputs_stay_at_eight_bits_alone_or_not(graph) -> None:
    """Whether or not the steps are known yet: integer kernels multiply no wider weights."""
    config = replace(resolve("w8a8"), max_weight_share=10.0)
    known = observed(graph, config)
    alone = round_weights(graph, config, known.costs)
    together = round_weights(graph, config, known.costs, known.activations(None))
    assert {w.bits for w in alone.values()} == {w.bits for w in together.values()} == {8}
    some = resolve(config, {"second": {"activation": None}})
    assert round_weights(graph, some, known.costs)["second"].bits == 16


def trial(share: float, error: float) -> Trial:
    return Trial(share, None, int(100 * share), GraphError(error, 0.0, 0.0))


def test_bisection_finds_the_first_that_is_good_enough() -> None:
    for first in range(9):
        asked: list[float] = []

        def measure(share: float, first: int = first, asked: list[float] = asked) -> Trial:
            asked.append(share)
            return trial(share, 1.0 if share >= first else 3.0)

        found = bisect([float(k) for k in range(9)], measure, 2.0)
        assert found is not None and found.max_weight_share == first and len(asked) <= 5
    assert bisect([1.0, 2.0], lambda share: trial(share, 3.0), 2.0) is None
    assert bisect([1.0], lambda share: trial(share, float("nan")), 2.0) is None
