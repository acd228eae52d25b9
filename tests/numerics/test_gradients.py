"""Integers of gradients: their definition, their error, rows that are zero or not finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.numerics.gradients import LARGEST, SMALLEST, fake_quantize_gradient, quantize_gradient

# Values of one row differ by at most 2^20, rows by far more, as gradients do.
VALUES = st.floats(-1, 1).filter(lambda v: v == 0 or abs(v) > 1e-6)
ROWS = st.tuples(st.lists(VALUES, min_size=1, max_size=40), st.integers(-80, 80))


def row(drawn: tuple[list[float], int], dtype: torch.dtype = torch.float64) -> Tensor:
    values, exponent = drawn
    return (torch.tensor(values, dtype=torch.float64) * 2.0**exponent).to(dtype)


@given(ROWS)
@settings(max_examples=300, deadline=None)
def test_definition(drawn: tuple[list[float], int]) -> None:
    """Against plain Python, whose ``round`` is half to even."""
    t = row(drawn)
    top = max(abs(v) for v in t.tolist())
    s = top / LARGEST
    whole, step = quantize_gradient(t)
    assert whole.shape == t.shape and step.shape == (1,)
    assert float(step) == pytest.approx(s, rel=1e-15)
    for value, found in zip(t.tolist(), whole.tolist(), strict=True):
        ratio = value / s if s else 0.0
        tie = abs(abs(ratio - round(ratio)) - 0.5) < 1e-9
        assert found == round(ratio) or (tie and abs(found - ratio) < 0.51)


@given(ROWS, st.sampled_from([torch.float64, torch.float32]))
@settings(max_examples=300, deadline=None)
def test_error_is_at_most_half_a_step(drawn: tuple[list[float], int], dtype: torch.dtype) -> None:
    t = row(drawn, dtype)
    error = (fake_quantize_gradient(t).double() - t.double()).abs().max()
    slack = 1e-9 if dtype == torch.float64 else 1e-2  # what float32 itself adds
    assert float(error) <= float(t.double().abs().max()) / 65534 * (1 + slack)


@given(ROWS, st.sampled_from([torch.float64, torch.float32]))
@settings(max_examples=300, deadline=None)
def test_idempotent(drawn: tuple[list[float], int], dtype: torch.dtype) -> None:
    """The integers stay the same; the step may move by its own rounding."""
    t = row(drawn, dtype)
    whole, step = quantize_gradient(t)
    again, step_again = quantize_gradient(whole * step)
    assert torch.equal(again, whole)
    assert torch.allclose(step_again, step, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


@given(ROWS, st.integers(-20, 20))
@settings(max_examples=100, deadline=None)
def test_powers_of_two_and_signs_pass_through(drawn: tuple[list[float], int], exponent: int) -> None:
    t, factor = row(drawn, torch.float32), -(2.0**exponent)
    assert torch.equal(fake_quantize_gradient(t * factor), fake_quantize_gradient(t) * factor)


def test_rows_are_independent() -> None:
    t = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0))
    t *= 10.0 ** torch.arange(-7, 8).view(3, 5, 1)
    together = fake_quantize_gradient(t)
    for i in range(3):
        for j in range(5):
            assert torch.equal(together[i, j], fake_quantize_gradient(t[i, j]))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-42, SMALLEST / 2])
def test_zero_and_tiny_rows_are_zero(value: float) -> None:
    t = torch.tensor([[value, -value, 0.0], [1.0, value, -0.5]])
    whole, step = quantize_gradient(t)
    assert torch.equal(whole[0], torch.zeros(3)) and float(step[0]) == 0.0
    assert torch.equal(fake_quantize_gradient(t)[0], torch.zeros(3))
    assert float(fake_quantize_gradient(t)[1, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_nan_throughout(bad: float) -> None:
    t = torch.tensor([[1.0, bad, 0.0], [1.0, 2.0, 3.0]])
    y = fake_quantize_gradient(t)
    assert bool(y[0].isnan().all()) and bool(y[1].isfinite().all())


def test_empty_rows() -> None:
    assert fake_quantize_gradient(torch.zeros(3, 0)).shape == (3, 0)
    assert fake_quantize_gradient(torch.zeros(0, 3)).shape == (0, 3)
    assert quantize_gradient(torch.zeros(3, 0))[1].shape == (3, 1)
