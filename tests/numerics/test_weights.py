"""Weight integers: error within half a step, scales per path and output channel, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.errors import ConfigError, GaqError, IrrepsError
from gaq_compile.ir.layout import blocks, channels
from gaq_compile.ir.specs import LinearSpec, linear_spec
from gaq_compile.numerics.weights import (
    QMAX,
    dequantize_weight,
    quantize_weight,
    stored_scale,
    weight_bytes,
    with_steps,
)

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


def some_steps(spec: LinearSpec, seed: int) -> torch.Tensor:
    """Steps of every input channel, that differ by up to 10 times."""
    generator = torch.Generator().manual_seed(seed + 1)
    return 0.003 + 0.027 * torch.rand(channels(spec.irreps_in), generator=generator)


def step_per_weight(steps: torch.Tensor, spec: LinearSpec) -> torch.Tensor:
    """The step that meets each weight, found by counting channels block by block."""
    first, total = {}, 0
    for block in blocks(spec.irreps_in):
        first[block], total = total, total + block.mul
    out = torch.zeros(spec.weight_numel)
    for path in spec.paths:
        for u in range(path.block_in.mul):
            start = path.offset + u * path.block_out.mul
            out[start : start + path.block_out.mul] = steps[first[path.block_in] + u]
    return out


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("text", SPECS)
def test_one_scale_for_a_whole_layer(text: str, bits: int) -> None:
    spec = linear_spec(text)
    weight = example(spec, 3)
    codes, scale = quantize_weight(weight, spec, bits, whole=True)
    assert len(scale.unique()) == 1 and int(codes.abs().max()) > 0.98 * QMAX[bits]  # bfloat16
    error = (dequantize_weight(codes, scale, spec) - weight).abs()
    inside = weight.abs() <= float(scale[0]) * QMAX[bits]
    assert bool((error[inside] <= 0.5 * float(scale[0]) * (1 + 1e-5)).all())
    assert bool(inside.all()) or bits == 4  # 4 bits may be clipped


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000))
def test_weights_with_steps_meet_the_steps_of_their_rows(text: str, seed: int) -> None:
    spec = linear_spec(text)
    weight, steps = example(spec, seed), some_steps(spec, seed)
    held = with_steps(weight, spec, steps)
    assert held.shape == weight.shape and held.dtype == weight.dtype
    assert torch.equal(held, weight * step_per_weight(steps, spec))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 10_000), st.floats(0, 4), st.sampled_from([4, 8]))
def test_held_codes_give_back_weights_within_half_a_scale_over_step(
    text: str, seed: int, spread: float, bits: int
) -> None:
    spec = linear_spec(text)
    weight, steps = example(spec, seed, spread), some_steps(spec, seed)
    held = with_steps(weight, spec, steps)
    codes, scale = quantize_weight(held, spec, bits)
    unit = scale_per_weight(scale, spec)
    inside = held.abs() <= QMAX[bits] * unit * (1 + 1e-5)
    assert bits == 4 or bool(inside.all())
    error = (dequantize_weight(codes, scale, spec, steps) - weight).abs()
    assert bool((error <= 0.5001 * unit / step_per_weight(steps, spec))[inside].all())
    # what they stand for beside integers x / steps: the same products
    plain = dequantize_weight(codes, scale, spec)
    torch.testing.assert_close(
        dequantize_weight(codes, scale, spec, steps) * step_per_weight(steps, spec), plain
    )


def test_steps_of_known_weights() -> None:
    spec = linear_spec("1x0e+2x1o+1x0e -> 2x0e+1x1o")
    steps = torch.tensor([2.0, 0.5, 4.0, 10.0])  # of 0e, 1o, 1o, 0e
    assert [(p.block_in.base, p.block_out.mul) for p in spec.paths] == [(0, 2), (1, 1), (7, 2)]
    held = with_steps(torch.ones(6), spec, steps)
    assert held.tolist() == [2.0, 2.0, 0.5, 4.0, 10.0, 10.0]
    codes = torch.full((6,), 8, dtype=torch.int8)
    scale = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])
    decoded = dequantize_weight(codes, scale, spec, steps)
    assert decoded.tolist() == pytest.approx([4.0, 12.0, 80.0, 10.0, 5.6, 7.2])
    assert dequantize_weight(codes, scale, spec).tolist() == [8.0, 24.0, 40.0, 40.0, 56.0, 72.0]


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
        full = stored_scale(columns.abs().amax(0) / 7)
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
    codes, scale = quantize_weight(torch.tensor([127.0, 127.0 / 8, -127.0 / 128]), spec, 8)
    assert scale.tolist() == [1.0, 1 / 8, 1 / 128]
    assert codes.tolist() == [127, 127, -127]


def test_a_stored_scale_is_the_next_number_of_bfloat16() -> None:
    scale = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 2000)
    stored = stored_scale(scale)
    assert stored.dtype == torch.float32 and torch.equal(stored.to(torch.bfloat16).float(), stored)
    assert bool(((stored >= scale) & (stored <= scale * (1 + 2.0**-7))).all())
    assert torch.equal(stored_scale(stored), stored)


def test_sixteen_bits_keep_eleven_and_more_of_every_weight() -> None:
    spec = linear_spec(SPECS[0])
    weight = example(spec, 3)
    codes, scale = quantize_weight(weight, spec, 16)
    assert codes.dtype == torch.int16 and int(codes.abs().max()) > 32000
    step = scale_per_weight(scale, spec)
    assert bool(((dequantize_weight(codes, scale, spec) - weight).abs() <= 0.5001 * step).all())
    assert float(step.max()) <= float(weight.abs().max()) / 32000


def test_weight_bytes() -> None:
    spec = linear_spec("5x0e -> 3x0e")
    assert [weight_bytes(spec, bits) for bits in (None, 16, 8, 4)] == [60, 30 + 6, 15 + 6, 8 + 6]


def test_a_linear_without_paths_is_empty() -> None:
    spec = linear_spec("3x0e -> 2x1o")
    codes, scale = quantize_weight(torch.zeros(0), spec, 8)
    assert (codes.numel(), scale.numel(), dequantize_weight(codes, scale, spec).numel()) == (0, 0, 0)
    assert dequantize_weight(codes, scale, spec, torch.ones(3)).numel() == 0
    assert with_steps(torch.zeros(0), spec, torch.ones(3)).numel() == 0


def test_wrong_arguments_are_refused() -> None:
    spec = linear_spec("2x0e -> 3x0e")
    with pytest.raises(ConfigError, match="3 bits"):
        quantize_weight(torch.zeros(6), spec, 3)
    with pytest.raises(ConfigError, match="12 bits"):
        weight_bytes(spec, 12)
    with pytest.raises(IrrepsError, match="6 weights"):
        quantize_weight(torch.zeros(5), spec, 8)
    with pytest.raises(IrrepsError, match="3 scales"):
        dequantize_weight(torch.zeros(6, dtype=torch.int8), torch.ones(2), spec)
    for wrong in (torch.ones(1), torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(IrrepsError, match="2 steps"):
            dequantize_weight(torch.zeros(6, dtype=torch.int8), torch.ones(3), spec, wrong)
        with pytest.raises(IrrepsError, match="2 steps"):
            with_steps(torch.zeros(6), spec, wrong)
    with pytest.raises(IrrepsError, match="6 weights"):
        with_steps(torch.zeros(5), spec, torch.ones(2))
    with pytest.raises(GaqError, match="NaN"):
        quantize_weight(torch.full((6,), torch.nan), spec, 8)
