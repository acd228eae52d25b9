"""Real spherical harmonics and their gradient, by recursion over the degree.

Solid harmonics are homogeneous harmonic polynomials, so with the Wigner 3j symbols ``C`` of
(l-1, 1, l) and a constant ``k_l``::

    Y_l[m]           = k_l     * sum_(m', i) C[m', i, m] Y_(l-1)[m'] v[i]
    dY_l[m] / dv[i]  = k_l * l * sum_(m')    C[m', i, m] Y_(l-1)[m']

The second line is the first with Euler's theorem (v . grad Y_l = l Y_l): the gradient is the one
equivariant map to degree l-1, and the theorem fixes its factor. Order and signs are e3nn's.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from e3nn import o3
from torch import Tensor

_SMALLEST = 1e-12  # Å; as torch.nn.functional.normalize


def scale_factor(l: int, normalization: str) -> float:
    """|Y_l| on the unit sphere: "norm" 1, "component" sqrt(2l+1), "integral" sqrt((2l+1)/4pi)."""
    factor = {"norm": 1.0, "component": 2 * l + 1.0, "integral": (2 * l + 1) / (4 * math.pi)}[normalization]
    return math.sqrt(factor)


@lru_cache(maxsize=64)
def recursion(l: int) -> Tensor:
    """``k_l * C`` (2l-1, 3, 2l+1) in float64, with e3nn's sign and |Y_l| = 1 on the sphere."""
    coupling = o3.wigner_3j(l - 1, 1, l, dtype=torch.float64)
    unit = torch.tensor([[0.3, -0.5, 0.81]], dtype=torch.float64)
    unit = unit / unit.norm()
    below = o3.spherical_harmonics(l - 1, unit, False, "norm")
    here = o3.spherical_harmonics(l, unit, False, "norm")
    raw = torch.einsum("nm,ni,mik->nk", below, unit, coupling)
    return coupling * ((here * raw).sum() / (raw * raw).sum())


def _solid(v: Tensor, lmax: int) -> list[Tensor]:
    levels = [torch.ones_like(v[:, :1])]
    for l in range(1, lmax + 1):
        levels.append(torch.einsum("nm,ni,mik->nk", levels[-1], v, recursion(l).to(v)))
    return levels


def spherical_harmonics(vec: Tensor, degrees: list[int], normalize: bool, normalization: str) -> Tensor:
    """Harmonics of ``vec`` (n, 3) -> (n, sum(2l+1)); of the unit vector if ``normalize``."""
    v = _unit(vec)[0] if normalize else vec
    levels = _solid(v, max(degrees, default=0))
    return torch.cat([levels[l] * scale_factor(l, normalization) for l in degrees], dim=1)


def spherical_harmonics_backward(
    grad: Tensor, vec: Tensor, degrees: list[int], normalize: bool, normalization: str
) -> Tensor:
    """Gradient of :func:`spherical_harmonics` with respect to ``vec``: (n, 3)."""
    v, length = _unit(vec) if normalize else (vec, None)
    levels = _solid(v, max(degrees, default=0))
    out, start = torch.zeros_like(vec), 0
    for l in degrees:
        g = grad[:, start : start + 2 * l + 1] * (scale_factor(l, normalization) * l)
        start += 2 * l + 1
        if l > 0:
            out = out + torch.einsum("nk,nm,mik->ni", g, levels[l - 1], recursion(l).to(v))
    if length is None:
        return out
    return (out - v * (out * v).sum(1, keepdim=True)) / length


def _unit(vec: Tensor) -> tuple[Tensor, Tensor]:
    length = vec.norm(dim=1, keepdim=True).clamp_min(_SMALLEST)
    return vec / length, length
