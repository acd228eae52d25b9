"""Weight integers: error within half a step, scales per path and output channel, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.errors import ConfigError, GaqError, IrrepsError
from gaq_compile.ir.specs import LinearSpec, linear_spec
from gaq_compile.numerics.weights import QMAX, dequantize_weight, quantize_weight, weight_bytes

SPECS = [
    "4x0e+3x1o -> 5x0e+2x1o",
    "2x0e+3x0e+4x2e -> 6x0e+1x2e+3x2e",
    "1x0e -> 1x0e",
    "3x1o+2x1o -> 4x1o | 1:0",
]


def scale_per_weight(scale: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
    out = torch.zeros(spec.weight_numel)
    for path in spec.paths:
        row = scale[path.scale_offset : path.scale_offset + path.block_out.mul]
        out[path.offset : path.offset + path.numel] = row.repeat(path.block_in.mul)
    return out


def example(spec: LinearSpec, seed: int, spread: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(spec.weight_numel, generator=generator)
    return weight * 10.0 ** (spread * torch.randn(spec.weight_numel, generator=generator))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.floats(0, 4))
def test_eight_bit_weights_err_by_half_a_step_at_most(text: str, seed: int, spread: float) -> None:
    spec = linear_spec(text)
    weight = example(spec, seed, spread)
    codes, scale = quantize_weight(weight, spec, 8)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (spec.scale_numel,)
    assert int(codes.abs().max()) <= 127
    step = scale_per_weight(scale, spec)
    error = (dequantize_weight(codes, scale, spec) - weight).abs()
    assert bool((error <= step * 0.5001).all())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.floats(0, 1))
def test_four_bit_scales_are_no_worse_than_the_range(text: str, seed: int, spread: float) -> None:
    spec = linear_spec(text)
    weight = example(spec, seed, spread)
    codes, scale = quantize_weight(weight, spec, 4)
    assert int(codes.abs().max()) <= 7
    chosen = (dequantize_weight(codes, scale, spec) - weight) ** 2
    step = scale_per_weight(scale, spec)
    inside = weight.abs() <= 7 * step
    assert bool((chosen.sqrt()[inside] <= step[inside] * 0.5001).all())
    for path in spec.paths:
        part = slice(path.offset, path.offset + path.numel)
        columns = weight[part].view(-1, path.block_out.mul)
        full = columns.abs().amax(0) / 7
        plain = ((torch.round(columns / full).clamp(-7, 7) * full - columns) ** 2).sum(0)
        assert bool((chosen[part].view_as(columns).sum(0) <= plain * (1 + 1e-5) + 1e-12).all())


def test_clipping_helps_four_bit_weights_on_a_real_size() -> None:
    spec = linear_spec("128x0e+64x1e -> 128x0e+64x1e")
    weight = example(spec, 0)
    codes, scale = quantize_weight(weight, spec, 4)
    error = float(((dequantize_weight(codes, scale, spec) - weight) ** 2).mean())
    matrices = [weight[p.offset : p.offset + p.numel].view(-1, p.block_out.mul) for p in spec.paths]
    full = torch.cat([matrix.abs().amax(0) / 7 for matrix in matrices])
    step = scale_per_weight(full, spec)
    plain = float(((torch.round(weight / step) * step - weight) ** 2).mean())
    assert error < 0.95 * plain


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_round_trip_exactly(bits: int) -> None:
    spec = linear_spec(SPECS[0])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-QMAX[bits], QMAX[bits] + 1, (spec.weight_numel,), generator=generator)
    codes = drawn.to(torch.int8)
    for path in spec.paths:  # every column reaches its range
        codes[path.offset : path.offset + path.block_out.mul] = QMAX[bits]
    scale = torch.full((spec.scale_numel,), 0.25)
    again, found = quantize_weight(dequantize_weight(codes, scale, spec), spec, bits)
    assert torch.equal(again, codes)
    assert torch.equal(found, scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_columns_get_scale_one(bits: int) -> None:
    spec = linear_spec("2x0e -> 3x0e")
    weight = torch.tensor([1.0, 0.0, 1e-40, -2.0, 0.0, 0.0])
    codes, scale = quantize_weight(weight, spec, bits)
    assert scale[1:].tolist() == [1.0, 1.0]
    assert codes.view(2, 3)[:, 1:].abs().sum() == 0


def test_scales_belong_to_path_and_output_channel() -> None:
    spec = linear_spec("1x0e+1x0e+1x1o -> 2x0e+1x1o | 0:0 2:1")
    codes, scale = quantize_weight(torch.tensor([127.0, 12.7, -1.27]), spec, 8)
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.1, 0.01]))
    assert codes.tolist() == [127, 127, -127]


def test_weight_bytes() -> None:
    spec = linear_spec("5x0e -> 3x0e")
    assert [weight_bytes(spec, bits) for bits in (None, 8, 4)] == [60, 15 + 12, 8 + 12]


def test_a_linear_without_paths_is_empty() -> None:
    spec = linear_spec("3x0e -> 2x1o")
    codes, scale = quantize_weight(torch.zeros(0), spec, 8)
    assert (codes.numel(), scale.numel(), dequantize_weight(codes, scale, spec).numel()) == (0, 0, 0)


def test_wrong_arguments_are_refused() -> None:
    spec = linear_spec("2x0e -> 3x0e")
    with pytest.raises(ConfigError, match="3 bits"):
        quantize_weight(torch.zeros(6), spec, 3)
    with pytest.raises(ConfigError, match="16 bits"):
        weight_bytes(spec, 16)
    with pytest.raises(IrrepsError, match="6 weights"):
        quantize_weight(torch.zeros(5), spec, 8)
    with pytest.raises(IrrepsError, match="3 scales"):
        dequantize_weight(torch.zeros(6, dtype=torch.int8), torch.ones(2), spec)
    with pytest.raises(GaqError, match="NaN"):
        quantize_weight(torch.full((6,), torch.nan), spec, 8)
