"""Magnitudes in equal steps and in equal ratios: their errors, codes and limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.errors import ConfigError
from gaq_compile.numerics.codebooks import IntegerGrid
from gaq_compile.numerics.magnitudes import LinearMagnitudes, LogMagnitudes, Magnitudes, quantize_vectors
from gaq_compile.numerics.sphere import OctahedralGrid

KINDS: list[Magnitudes] = [
    *(LinearMagnitudes(bits, step) for bits, step in ((1, 1.0), (4, 0.3), (8, 1e-6), (16, 2e4))),
    *(
        LogMagnitudes(*a)
        for a in ((2, 1.0, 0.5), (4, 3.0, 1e-3), (8, 1e5, 1e-5), (16, 2.0, 1.0), (16, 7.0, 1e-9))
    ),
]
every_kind = pytest.mark.parametrize("magnitudes", KINDS, ids=str)
ANY = st.one_of(st.floats(0, 1e30), st.floats(-30, 30).map(lambda e: 10**e), st.floats(0, 4))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_reads_back(magnitudes: Magnitudes, dtype: torch.dtype) -> None:
    q = torch.arange(magnitudes.qmax + 1).to(dtype)
    m = magnitudes.decode(q)
    assert m.dtype == dtype and float(m[0]) == 0.0
    assert bool((m.diff() > 0).all())
    assert torch.equal(magnitudes.encode(m), q)


@every_kind
def test_errors_stay_within_their_bound(magnitudes: Magnitudes) -> None:
    @settings(max_examples=200, deadline=None, database=None)
    @given(ANY)
    def check(value: float) -> None:
        m = torch.tensor([value], dtype=torch.float64)
        error = (magnitudes.decode(magnitudes.encode(m)) - m).abs()
        assert bool(error <= magnitudes.error_bound(m) * (1 + 1e-6) + 1e-300)

    check()


@every_kind
def test_the_bound_is_reached_and_rounding_is_monotonic(magnitudes: Magnitudes) -> None:
    codes = torch.arange(min(magnitudes.qmax, 100) + 1, dtype=torch.float64)
    grid = magnitudes.decode(codes)
    m = torch.cat([a + (b - a) * torch.linspace(0, 1, 200) for a, b in itertools.pairwise(grid)])
    q = magnitudes.encode(m)
    error = (magnitudes.decode(q) - m).abs() / magnitudes.error_bound(m).clamp(min=1e-300)
    assert bool((q.diff() >= 0).all())
    assert float(error[m > 0].max()) > 0.9


def test_equal_ratios_have_the_error_they_claim() -> None:
    magnitudes = LogMagnitudes(8, 100.0, 0.01)
    m = torch.logspace(-2, 2, 100_001, dtype=torch.float64)
    error = (magnitudes.decode(magnitudes.encode(m)) - m).abs() / m
    assert 0.99 * magnitudes.relative_error < float(error.max()) <= magnitudes.relative_error * (1 + 1e-9)
    assert magnitudes.relative_error == pytest.approx(0.5 * math.log(1e4) / 254, rel=0.02)
    assert float(magnitudes.decode(torch.tensor(255.0).double())) == 100.0
    assert float(magnitudes.decode(torch.tensor(1.0).double())) == pytest.approx(0.01, rel=1e-12)


@every_kind
def test_special_values(magnitudes: Magnitudes) -> None:
    m = torch.tensor([0.0, -0.0, -1.0, 1e-40, torch.inf, torch.nan])
    q = magnitudes.encode(m)
    assert q[:5].tolist() == [0.0, 0.0, 0.0, 0.0, magnitudes.qmax]
    assert bool(torch.isnan(q[5]))
    assert bool(torch.isnan(magnitudes.decode(q)[5]))
    assert bool(torch.isfinite(magnitudes.decode(q)[:5]).all())


def test_up_to_reaches_the_largest() -> None:
    magnitudes = LinearMagnitudes.up_to(3.0, 8)
    assert magnitudes.step * magnitudes.qmax == pytest.approx(3.0, rel=1e-15)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((LinearMagnitudes, (b, 1.0)) for b in (0, 17, -1)),
        *((LinearMagnitudes, (8, s)) for s in (0.0, -1.0, math.inf, math.nan)),
        *((LogMagnitudes, (b, 1.0, 0.1)) for b in (1, 17)),
        *((LogMagnitudes, (8, a, b)) for a, b in ((1.0, 0.0), (1.0, 0.6), (1.0, 2.0), (math.inf, 1.0))),
        *((LogMagnitudes, (8, a, b)) for a, b in ((math.nan, 1.0), (1.0, math.nan), (1.0, -0.1))),
    ],
)
def test_settings_that_cannot_be(
    kind: type[LinearMagnitudes] | type[LogMagnitudes], settings: tuple[float, ...]
) -> None:
    with pytest.raises(ConfigError):
        kind(*settings)


def test_settings_of_a_range_that_cannot_be() -> None:
    for largest, bits in ((0.0, 8), (-1.0, 8), (1.0, 0), (math.nan, 8)):
        with pytest.raises(ConfigError):
            LinearMagnitudes.up_to(largest, bits)


@pytest.mark.parametrize("directions", [IntegerGrid(1, 8), OctahedralGrid(8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantized_vectors(directions: IntegerGrid | OctahedralGrid, dtype: torch.dtype) -> None:
    magnitudes = LinearMagnitudes(8, 0.5)
    v = torch.zeros(1, 3, 7, dtype=dtype)
    v[0, 0] = torch.tensor([0.0, 0.2, 1e-30, 3.1, 1e9, torch.inf, torch.nan])
    got = quantize_vectors(v, directions, magnitudes)
    assert got.dtype == dtype
    assert got[0, 0, :5].tolist() == [0.0, 0.0, 0.0, 3.0, 127.5]
    assert bool((got[0, 1:, :5] == 0).all())
    assert bool(torch.isnan(got[0, :, 5:]).any(0).all())
