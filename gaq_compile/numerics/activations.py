"""Activations as integers: what a kernel multiplies, its float meaning, and its gradient.

Tensors are component-major, ``x`` (N, dim), with simplified irreps; ``scale`` (n_channels,) holds one
static step per channel. All roundings are half to even. With ``s`` a channel's scale:

* scalars (l = 0), and ``"component"`` blocks: ``X = clamp(round(x/s), -qmax, qmax)``,
  ``xhat = s X``.
* ``"mddq"``, per channel vector v of 2l+1 components: ``m = |v|``, ``q = clamp(round(m/s), 0, qmax)``,
  ``n_c = round(v_c (B/m))``, ``X_c = round(n_c (q 2^f / |n|))``, ``xhat_c = s 2^-f X_c``; 0 where q = 0.
* ``"svq"``: the same with ``X_c = round(q 2^f k_c)``, k the nearest of ``2^K`` unit vectors that
  k-means found (:func:`learned_directions`).
* ``"exact"``: ``xhat_c = v_c (s q / m)``: an integer magnitude with a float direction.

The channels of a block, each with its step, are added up in integers. Either the weights hold the
steps, ``W'[u, w] = s[u] W[u, w]``; or (``common``) the integers come on a grid that all channels
share, with ``S = max_u s[u]`` and r[u] = s[u]/S: ``X_c = round(X_c r 2^f)`` for scalars and
components, ``round(n_c (q r 2^f / |n|))`` and ``v_c (q r / m)`` for vectors, ``xhat = S 2^-f X``.

Every kernel follows these orders of operations, so that float32 results agree up to values that lie
within float32 rounding of a tie. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import overload

import torch
from torch import Tensor

from ..config import ActivationScheme, activation_scheme
from ..errors import IrrepsError
from ..ir.layout import Block, blocks, channels, dim, simplified
from .codebooks import IntegerGrid, norm
from .magnitudes import linear_codes
from .sphere import LearnedDirections

__all__ = [
    "ActivationScheme",
    "activation_blocks",
    "activation_scheme",
    "fake_quantize",
    "fake_quantize_backward",
    "learned_directions",
    "quantize_block",
]


SAMPLES = 64  # per direction that k-means learns


def activation_blocks(irreps: str) -> tuple[Block, ...]:
    """The blocks whose channels own one scale each: those of the simplified irreps, in order."""
    return blocks(simplified(irreps))


@overload
def quantize_block(x: Tensor, l: int, scale: float, scheme: ActivationScheme) -> tuple[Tensor, float]: ...
@overload
def quantize_block(x: Tensor, l: int, scale: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]: ...
def quantize_block(
    x: Tensor,
    l: int,
    scale: Tensor | float,
    scheme: ActivationScheme,
) -> tuple[Tensor, Tensor | float]:
    """The operand of one block and its step: ``xhat = step * operand``.

    Args:
        x: (N, 2l+1, mul).
        l: the block's degree.
        scale: its static step, a number, or a tensor of one step for all channels or (mul,).
        scheme: the activation scheme.

    Returns:
        The operand X, int32 with the shape of x (``"exact"`` and l >= 1: float, v q / m), and the
        step, ``scale * 2^-f``, or ``max(scale) * 2^-f`` where it is common.
    """
    operand = _operand(x, l, scale, scheme)
    step = _unit(scale, scheme) * 2.0 ** -scheme.fraction_bits(l)
    exact = l > 0 and scheme.vector == "exact"
    return (operand if exact else operand.to(torch.int32)), step


def fake_quantize(x: Tensor, scale: Tensor, irreps: str, scheme: ActivationScheme) -> Tensor:
    """The float tensor that the integers stand for.

    Args:
        x: (N, dim), component-major, float32 or float64.
        scale: (n_channels,) steps.
        irreps: of x.
        scheme: the activation scheme.

    Returns:
        xhat, like x.

    Raises:
        IrrepsError: if x or scale does not fit the irreps.
    """

    def block(v: Tensor, l: int, s: Tensor) -> Tensor:
        return _operand(v, l, s, scheme) * (_unit(s, scheme) * 2.0 ** -scheme.fraction_bits(l))

    return by_block((x,), scale, irreps, block)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, scale: Tensor, irreps: str, scheme: ActivationScheme
) -> Tensor:
    """The straight-through gradient of :func:`fake_quantize`.

    Scalars and components: ``grad`` where ``|x/s| <= qmax``, else 0. Vectors with direction
    u = v/m: ``u (g.u) [m/s <= qmax] + (s q / m) (g - u (g.u))``, so nothing leaks from the tangential
    into the radial direction; where m = 0 the gradient passes unchanged.

    Args:
        grad: gradient with respect to xhat, (N, dim).
        x: the tensor that was quantized, (N, dim).
        scale: (n_channels,).
        irreps: of x.
        scheme: the activation scheme.

    Returns:
        Gradient with respect to x.

    Raises:
        IrrepsError: if a tensor does not fit the irreps.
    """

    def block(g: Tensor, v: Tensor, l: int, s: Tensor) -> Tensor:
        qmax = scheme.qmax(l)
        if l == 0 or scheme.vector == "component":
            return g * (torch.abs(v / s) <= qmax)
        m = norm(v)
        safe = torch.where(m == 0, 1.0, m)
        u = v / safe
        radial = u * (g * u).sum(-2, keepdim=True)
        bent = radial * (m / s <= qmax) + (s * linear_codes(m, s, qmax) / safe) * (g - radial)
        return torch.where(m == 0, g, bent)

    return by_block((grad, x), scale, irreps, block)


@lru_cache(maxsize=32)
def learned_directions(l: int, code_bits: int) -> LearnedDirections:
    """The k-means directions of a degree: learned from random ones, as structures come in any orientation.

    They are no part of a file, but learned anew, from a fixed seed, where it is read: this is a baseline.

    Args:
        l: the degree, >= 1.
        code_bits: ``2^code_bits`` directions.
    """
    samples = torch.randn(
        2 * l + 1, SAMPLES << code_bits, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return LearnedDirections.fit(samples, code_bits)


@overload
def _unit(scale: float, scheme: ActivationScheme) -> float: ...
@overload
def _unit(scale: Tensor, scheme: ActivationScheme) -> Tensor: ...
def _unit(scale: Tensor | float, scheme: ActivationScheme) -> Tensor | float:
    """What operands are whole or fractional multiples of."""
    return scale.max() if scheme.common and isinstance(scale, Tensor) else scale


def _operand(v: Tensor, l: int, scale: Tensor | float, scheme: ActivationScheme) -> Tensor:
    """X of one block (N, 2l+1, mul), held in v's dtype."""
    qmax = scheme.qmax(l)
    fine = scale / _unit(scale, scheme) * 2.0 ** scheme.fraction_bits(l)
    if l == 0 or scheme.vector == "component":
        operand = torch.clamp(torch.round(v / scale), -qmax, qmax)
        return torch.round(operand * fine) if scheme.common else operand
    m = norm(v)
    q = linear_codes(m, scale, qmax)
    if scheme.vector == "exact":
        operand = v * (q * fine / m)
    elif scheme.vector == "svq":
        book = learned_directions(l, scheme.direction_bits)
        operand = torch.round(book.decode(book.encode(v, m), v.dtype) * (q * fine))
    else:
        n = IntegerGrid(l, scheme.direction_bits).encode(v, m)
        operand = torch.round(n * (q * fine / norm(n)))
    # q == 0 and not m == 0: also keeps NaN visible, and drops the 0/0 of vanishing vectors
    return torch.where(q == 0, 0.0, operand)


def by_block(
    tensors: tuple[Tensor, ...], scale: Tensor, irreps: str, function: Callable[..., Tensor]
) -> Tensor:
    """Apply ``function(*blocks, l, s)`` to every block of tensors (N, dim) and join the results."""
    found = activation_blocks(irreps)
    for tensor in tensors:
        if tensor.ndim != 2 or tensor.shape[1] != dim(irreps):
            raise IrrepsError(
                f"expected a tensor (N, {dim(irreps)}), got {tuple(tensor.shape)}", where=irreps
            )
    if tuple(scale.shape) != (channels(irreps),):
        raise IrrepsError(
            f"expected {channels(irreps)} scales, one per channel, got {tuple(scale.shape)}", where=irreps
        )
    # split at once: autograd then makes one gradient of all parts, not a whole one of each
    sizes, muls = [b.components * b.mul for b in found], [b.mul for b in found]
    split = [torch.split(t, sizes, dim=1) for t in tensors]
    parts = []
    for block, s, *pieces in zip(found, torch.split(scale, muls), *split, strict=True):
        views = (piece.unflatten(1, (block.components, block.mul)) for piece in pieces)
        parts.append(function(*views, block.l, s).flatten(1))
    return torch.cat(parts, 1) if parts else torch.zeros_like(tensors[0])
