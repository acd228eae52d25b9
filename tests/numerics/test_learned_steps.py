"""Learned quantization: the integers' values to the bit, and gradients that are what formulas say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.config import activation_scheme
from gaq_compile.ir.layout import channels, dim
from gaq_compile.ir.specs import linear_spec
from gaq_compile.numerics.activations import fake_quantize, fake_quantize_backward
from gaq_compile.numerics.learned_steps import learned_codes, learned_fake_quantize, learned_weight
from gaq_compile.numerics.weights import dequantize_weight, quantize_weight, with_steps

IRREPS = "5x0e+4x1o+3x2e"
SCHEMES = ["s8 m8d8", "s8 m8exact", "s8 c8", "s4 m6d6", "s16 m16d16", "s8 m8d8 common"]


def rows(seed: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dim(IRREPS), generator=g, dtype=torch.float64)
    x[0] = 0.0  # vectors without a direction
    x[1] *= 50.0  # beyond the range
    return x, torch.rand(channels(IRREPS), generator=g, dtype=torch.float64) * 0.02 + 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_values_and_gradients_by_x_are_inferences(scheme: str, seed: int) -> None:
    x, steps = rows(seed)
    kind = activation_scheme(scheme)
    x.requires_grad_(True)
    y = learned_fake_quantize(x, steps, IRREPS, kind)
    torch.testing.assert_close(y, fake_quantize(x.detach(), steps, IRREPS, kind), rtol=1e-12, atol=1e-14)
    out = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, out)
    expected = fake_quantize_backward(out, x.detach(), steps, IRREPS, kind)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_steps_learn_as_lsq_says() -> None:
    """Of scalars: round(x/s) - x/s within the range, its end outside."""
    kind, s = activation_scheme("s8 m8d8"), torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.234], [-0.07], [99.0], [-99.0]], dtype=torch.float64)
    for row, expected in zip(x, (2 - 2.34, -1 + 0.7, 127.0, -127.0), strict=True):
        (found,) = torch.autograd.grad(learned_fake_quantize(row[None], s, "1x0e", kind).sum(), s)
        assert float(found) == pytest.approx(expected)


def test_a_vectors_step_learns_along_its_direction() -> None:
    kind, s = activation_scheme("s8 m8exact"), torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[0.0, 0.3, 0.4]], dtype=torch.float64) * 0.47  # length 2.35 steps
    out = torch.tensor([[5.0, 1.0, 2.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(learned_fake_quantize(v, s, "1x1o", kind), s, out)
    assert float(found) == pytest.approx((2 - 2.35) * (0.6 * 1.0 + 0.8 * 2.0))


def test_the_gradient_has_a_gradient() -> None:
    """What a loss on forces needs: that of ``(|v| + e) v / |v|``, e the rounding error of the length. A
    staircase's own would be that of a constant length, however fine its steps."""
    kind = activation_scheme("s8 m8exact")
    g = torch.Generator().manual_seed(1)
    v, out, way = (torch.randn(1, 3, generator=g, dtype=torch.float64) for _ in range(3))
    step, v = torch.tensor([0.3], dtype=torch.float64), v.requires_grad_(True)

    def second(y: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(y, v, out, create_graph=True)
        return torch.autograd.grad(first, v, way)[0]

    length = v.norm()
    error = (0.3 * torch.round(length / 0.3) - length).detach()
    found = second(learned_fake_quantize(v, step, "1x1o", kind))
    torch.testing.assert_close(found, second((length + error) * v / length))
    fine = second(learned_fake_quantize(v, step / 100, "1x1o", kind))
    assert float(fine.norm()) < 0.05 * float(found.norm())


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("held", [False, True])
def test_weights_are_their_integers(bits: int, held: bool) -> None:
    spec = linear_spec("6x0e+4x1o -> 5x0e+3x1o")
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(spec.weight_numel, generator=g)
    steps = torch.rand(channels(spec.irreps_in), generator=g) + 0.5 if held else None
    codes, scale = quantize_weight(weight if steps is None else with_steps(weight, spec, steps), spec, bits)
    scale = scale.to(torch.bfloat16).float()
    parameter, learned = weight.requires_grad_(True), scale.clone().requires_grad_(True)
    found = learned_weight(parameter, learned, steps, bits, spec)
    mine = learned_codes(weight.detach(), scale, steps, bits, spec)
    assert float((mine - codes).abs().max()) <= 1  # a scale in bfloat16 may move a tie
    torch.testing.assert_close(found, dequantize_weight(mine, scale, spec, steps), rtol=1e-5, atol=1e-7)
    found.square().sum().backward()
    assert parameter.grad is not None and float(parameter.grad.abs().min()) >= 0
    inside = mine.abs() < {4: 7, 8: 127, 16: 32767}[bits]
    torch.testing.assert_close(parameter.grad[inside], 2 * found.detach()[inside])
    assert (
        learned.grad is not None
        and bool(learned.grad.isfinite().all())
        and float(learned.grad.abs().sum()) > 0
    )
