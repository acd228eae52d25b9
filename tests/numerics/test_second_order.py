"""Second-order rounding: smaller output errors than rounding to nearest, on the same integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.errors import ConfigError, GaqError, IrrepsError
from gaq_compile.ir.layout import blocks, channels, dim
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.second_order import (
    channel_hessians,
    output_error,
    over_steps,
    round_second_order,
)
from gaq_compile.numerics.weights import QMAX, dequantize_weight, quantize_weight, with_steps
from gaq_compile.operators import reference

SPECS = [
    "12x0e+6x1o -> 5x0e+4x1o",
    "4x0e+8x1o+6x0e -> 7x0e+3x1o+2x0e",  # several paths into one output block
    "8x0e+8x0e -> 3x0e+3x0e | 0:0 1:1",  # block-diagonal
    "3x0e+5x1o -> 4x2e+2x0e",  # an output that nothing reaches
    "5x0e+3x0e+2x1o+4x1o -> 6x0e+3x1o+1x1o",  # neighbours that merge
]


def _case(text: str, seed: int, rows: int = 40):
    """A linear, weights, and inputs whose channels are correlated as those of a network are."""
    spec, random = linear_spec(text), torch.Generator().manual_seed(seed)
    width = dim(spec.irreps_in)
    mixing = torch.randn(width, width, generator=random) / width**0.5
    x = torch.randn(rows, width, generator=random) @ mixing + 0.5 * torch.randn(1, width, generator=random)
    return spec, torch.randn(spec.weight_numel, generator=random), x


def _error_of_outputs(x, weight, rounded, spec, row_weight=None):
    """The definition: squared differences of the map's outputs, summed over rows."""
    plain = reference.irreps_linear(x.double(), weight.double(), None, str(spec), False)
    other = reference.irreps_linear(x.double(), rounded.double(), None, str(spec), False)
    squares = (other - plain).square().sum(1)
    return float((squares if row_weight is None else squares * row_weight).sum())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.sampled_from([4, 8]))
def test_output_error_is_that_of_the_outputs(text, seed, bits):
    spec, weight, x = _case(text, seed)
    row_weight = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)).double()
    hessians = channel_hessians(x, spec, row_weight)
    codes, scale = quantize_weight(weight, spec, bits)
    expected = _error_of_outputs(x, weight, dequantize_weight(codes, scale, spec), spec, row_weight)
    assert output_error(weight, codes, scale, spec, hessians) == pytest.approx(expected, rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.sampled_from([4, 8]))
def test_never_worse_than_nearest_and_on_the_grid(text, seed, bits):
    spec, weight, x = _case(text, seed)
    hessians = channel_hessians(x, spec)
    codes, scale = round_second_order(weight, spec, hessians, bits)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= QMAX[bits]
    assert scale.dtype == torch.float32 and bool((scale > 0).all())
    nearest = output_error(weight, *quantize_weight(weight, spec, bits), spec, hessians)
    assert output_error(weight, codes, scale, spec, hessians) <= 1.05 * nearest  # H is damped in between


def _with_steps(text, seed):
    """Steps per channel, and the input in units of them, which is what held weights meet."""
    spec, weight, x = _case(text, seed)
    random = torch.Generator().manual_seed(seed + 1)
    steps = 0.01 * 10 ** torch.rand(channels(spec.irreps_in), generator=random)
    units = x.clone()
    for b in blocks(spec.irreps_in):
        for c in range(b.components):
            columns = slice(b.base + c * b.stride, b.base + c * b.stride + b.mul)
            units[:, columns] /= steps[b.channel : b.channel + b.mul]
    return spec, weight, x, steps, units


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.booleans())
def test_hessians_over_steps_are_those_of_the_integers(text, seed, weighted):
    spec, _, x, steps, units = _with_steps(text, seed)
    rows = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) if weighted else None
    plain = channel_hessians(x, spec, rows)
    kept = {irrep: h.clone() for irrep, h in plain.items()}
    found, expected = over_steps(plain, spec, steps), channel_hessians(units, spec, rows)
    assert set(found) == set(expected) == set(plain)
    for irrep in expected:
        assert found[irrep].dtype == torch.float64
        small = 1e-6 * float(expected[irrep].diagonal().max())  # units are float32
        torch.testing.assert_close(found[irrep], expected[irrep], rtol=1e-5, atol=small)
        assert torch.equal(plain[irrep], kept[irrep])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.sampled_from([4, 8]))
def test_weights_that_hold_steps_are_rounded_together_as_well(text, seed, bits):
    """Their error is that of the outputs, on the values that codes and steps stand for."""
    spec, weight, x, steps, _ = _with_steps(text, seed)
    hessians = channel_hessians(x, spec)
    held, over = with_steps(weight, spec, steps), over_steps(hessians, spec, steps)
    codes, scale = round_second_order(held, spec, over, bits)
    assert int(codes.abs().max()) <= QMAX[bits]
    decoded = dequantize_weight(codes, scale, spec, steps)
    found = output_error(held, codes, scale, spec, over)
    assert found == pytest.approx(_error_of_outputs(x, weight, decoded, spec), rel=1e-3)
    nearest = quantize_weight(held, spec, bits)
    assert found <= 1.05 * output_error(held, *nearest, spec, over)


def test_rounding_without_the_steps_in_h_would_cost_more():
    ratios = []
    for seed in range(10):
        spec, weight, x, steps, _ = _with_steps("24x0e -> 12x0e", seed)
        hessians = channel_hessians(x, spec)
        held, over = with_steps(weight, spec, steps), over_steps(hessians, spec, steps)
        known, blind = (round_second_order(held, spec, h, 8) for h in (over, hessians))
        ratios.append(output_error(held, *blind, spec, over) / output_error(held, *known, spec, over))
    assert min(ratios) > 1 and sorted(ratios)[5] > 2


def test_much_better_than_nearest_where_channels_are_correlated():
    ratios = []
    for seed in range(10):
        spec, weight, x = _case("48x0e -> 16x0e", seed, rows=400)
        x = x @ torch.randn(48, 48, generator=torch.Generator().manual_seed(seed)) / 7
        hessians = channel_hessians(x, spec)
        first, second = quantize_weight(weight, spec, 4), round_second_order(weight, spec, hessians, 4)
        ratios.append(
            output_error(weight, *first, spec, hessians) / output_error(weight, *second, spec, hessians)
        )
    assert sorted(ratios)[5] > 2


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_on_the_grid_stay(bits):
    spec, _, x = _case(SPECS[0], 3)
    codes = torch.randint(-QMAX[bits], QMAX[bits] + 1, (spec.weight_numel,)).to(torch.int8)
    for path in spec.paths:  # every column reaches the end of its range
        codes[path.offset : path.offset + path.block_out.mul] = QMAX[bits]
    weight = dequantize_weight(codes, torch.full((spec.scale_numel,), 0.25), spec)
    again, scale = round_second_order(weight, spec, channel_hessians(x, spec), bits)
    assert torch.equal(again, codes) and torch.allclose(scale, torch.tensor(0.25))


def test_channels_that_calibration_never_saw_are_rounded_to_nearest():
    spec, weight, x = _case("6x0e -> 4x0e", 5)
    x[:, 4:] = 0
    codes, scale = round_second_order(weight, spec, channel_hessians(x, spec), 8)
    unseen = (dequantize_weight(codes, scale, spec) - weight).view(6, 4)[4:]
    assert bool((unseen.abs() <= scale / 2 + 1e-6).all())
    codes, scale = round_second_order(weight, spec, channel_hessians(0 * x, spec), 8)
    assert torch.equal(codes, quantize_weight(weight, spec, 8)[0])


def test_bad_input():
    spec, weight, x = _case(SPECS[0], 0)
    hessians = channel_hessians(x, spec)
    with pytest.raises(ConfigError):
        round_second_order(weight, spec, hessians, 3)
    with pytest.raises(IrrepsError):
        round_second_order(weight[1:], spec, hessians, 4)
    with pytest.raises(GaqError):
        round_second_order(weight * torch.nan, spec, hessians, 4)
