"""Spherical harmonics against e3nn, and their gradient against autograd through e3nn."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3

from gaq_compile.operators import harmonics
from gaq_compile.operators.registration import ops

DEGREES = [[0], [1], [0, 1, 2, 3], [4, 2, 6], [3, 5], [2, 2]]
NORMALIZATIONS = ["norm", "component", "integral"]


@pytest.fixture
def vectors() -> torch.Tensor:
    """Random edge vectors of very different lengths, and the axes."""
    torch.manual_seed(1)
    random = torch.randn(40, 3, dtype=torch.float64) * torch.logspace(-3, 2, 40, dtype=torch.float64)[:, None]
    return torch.cat([random, torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64)])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_value_and_gradient(vectors, degrees, normalize, normalization):
    v = vectors.requires_grad_(True)
    expected = o3.spherical_harmonics(degrees, v, normalize, normalization)
    got = harmonics.spherical_harmonics(v, degrees, normalize, normalization)
    scale = expected.abs().amax(1, keepdim=True)
    assert ((got - expected).abs() <= 1e-11 * scale).all()
    grad = torch.randn_like(expected)
    (true,) = torch.autograd.grad((expected * grad).sum() + 0 * v.sum(), v)
    ours = harmonics.spherical_harmonics_backward(grad, v.detach(), degrees, normalize, normalization)
    assert ((ours - true).abs() <= 1e-10 * (1e-12 + true.norm(dim=1, keepdim=True).clamp_min(1e-3))).all()


def test_operator_gradient():
    v = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: ops.spherical_harmonics(x, "1x0e+1x1o+1x2e", True, "component", "sh"), v
    )


def test_radial_direction_has_no_gradient(vectors):
    """Harmonics of the unit vector do not change along the vector."""
    grad = torch.randn(len(vectors), 9, dtype=torch.float64)
    back = harmonics.spherical_harmonics_backward(grad, vectors, [0, 1, 2], True, "component")
    along = (back * vectors).sum(1) / vectors.norm(dim=1)
    assert (along.abs() <= 1e-12 * (1 + back.norm(dim=1))).all()


def test_float32_and_no_rows():
    v = torch.randn(30, 3)
    expected = o3.spherical_harmonics([0, 1, 2, 3, 4], v.double(), True, "component")
    got = harmonics.spherical_harmonics(v, [0, 1, 2, 3, 4], True, "component")
    assert got.dtype == torch.float32 and (got - expected).abs().max() < 5e-6
    assert harmonics.spherical_harmonics(v[:0], [0, 1], True, "norm").shape == (0, 4)
    back = harmonics.spherical_harmonics_backward(torch.zeros(0, 4), v[:0], [0, 1], True, "norm")
    assert back.shape == (0, 3)


def test_zero_vector_is_finite():
    zero = torch.zeros(1, 3, dtype=torch.float64)
    expected = o3.spherical_harmonics([0, 1, 2], zero, True, "component")
    assert torch.equal(harmonics.spherical_harmonics(zero, [0, 1, 2], True, "component"), expected)


@pytest.mark.parametrize("l", range(1, 8))
def test_recursion_keeps_unit_length(l):
    unit = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=1)
    values = harmonics.spherical_harmonics(unit, [l], False, "norm")
    assert (values.norm(dim=1) - 1).abs().max() < 1e-12
