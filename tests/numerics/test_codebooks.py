"""Direction codebooks: their limits and figures (their properties: test_activations.py)."""

from __future__ import annotations

import math

import pytest
import torch

from gaq_compile.errors import ConfigError
from gaq_compile.numerics.codebooks import IntegerGrid


def test_figures_of_a_grid() -> None:
    grid = IntegerGrid(1, 8)
    assert (grid.levels, grid.components, grid.code_bits) == (127, 3, 24)
    assert math.degrees(grid.delta) == pytest.approx(0.391, abs=1e-3)
    assert grid.sin_delta(255, 7) == pytest.approx(math.sin(grid.delta), rel=1e-2)
    assert grid.sin_delta(0, 7) == math.sin(grid.delta)
    assert IntegerGrid(3, 12).delta < IntegerGrid(3, 8).delta < IntegerGrid(4, 8).delta


@pytest.mark.parametrize(("degree", "bits"), [(0, 8), (1, 1), (1, 17), (2, 2)])
def test_grids_that_would_lose_a_direction_are_refused(degree: int, bits: int) -> None:
    with pytest.raises(ConfigError):
        IntegerGrid(degree, bits)


def test_covering_angle_is_not_far_from_the_worst_direction() -> None:
    grid = IntegerGrid(1, 5)
    v = torch.randn(3, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = v / v.norm(dim=0)
    worst = float((grid.decode(grid.encode(u, torch.ones(1, 200_000))) * u).sum(0).min())
    assert 0.7 * grid.delta < math.acos(worst) <= grid.delta
