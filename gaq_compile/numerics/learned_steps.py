"""Quantization whose steps are learned: the integers' values, with gradients for training.

The values are those of :mod:`.activations` and :mod:`.weights`, to the bit. Gradients are those of a smooth
expression beside them (LSQ, Esser et al., ICLR 2020; for vectors the geometric straight-through gradient
of the GAQ paper), in which only the rounding is a constant: with ``[x]`` for a rounding that autograd does
not see,

    scalars, components, weights:  y = s (c + [round(c) - c]),      c = clamp(x / s, -qmax, qmax)
    vectors v = m u:               y = s (c + [round(c) - c]) u,    c = clamp(m / s, 0, qmax)

So ``dy/dx`` is 1 within the range and 0 outside, ``dy/ds = round(c) - c`` within and the range's end
outside; of a vector, the radial part goes through its magnitude and the tangential one is scaled by
``s q / m``. Being an expression, it can be differentiated again, as a loss on forces needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ActivationScheme
from ..ir.specs import LinearSpec
from .activations import by_block, fake_quantize
from .codebooks import norm
from .weights import QMAX, rows_of


def learned_fake_quantize(
    x: Tensor, steps: Tensor, irreps: str, scheme: ActivationScheme, geometric: bool = True
) -> Tensor:
    """:func:`.activations.fake_quantize` with gradients by ``x`` and ``steps``.

    Args:
        x: (N, dim), component-major.
        steps: (n_channels,), positive.
        irreps: of x.
        scheme: the activation scheme.
        geometric: whether vectors have the gradient of magnitude and direction; if not, each component has
            one of its own, as if it were rounded alone. Values are the same.

    Raises:
        IrrepsError: if x or steps do not fit the irreps.
    """

    def block(v: Tensor, l: int, s: Tensor) -> Tensor:
        if l == 0 or scheme.vector == "component" or not geometric:
            return s * _rounded(v / s, -scheme.qmax(l), scheme.qmax(l))
        # Where v = 0 there is no direction: the gradient passes unchanged, as in the kernels.
        nothing = (v == 0).all(-2, keepdim=True)
        safe = torch.where(nothing, torch.ones_like(v), v)
        m = norm(safe)
        bent = s * _rounded(m / s, 0, scheme.qmax(l)) * (safe / m)
        return torch.where(nothing, v, bent)

    smooth = by_block((x,), steps, irreps, block)
    with torch.no_grad():
        value = fake_quantize(x, steps, irreps, scheme)
    return smooth + (value - smooth).detach()


def learned_weight(
    weight: Tensor, scale: Tensor, steps: Tensor | None, bits: int, spec: LinearSpec
) -> Tensor:
    """A weight's integers as :func:`.weights.dequantize_weight` reads them; gradients by weight and scale.

    Args:
        weight: (spec.weight_numel,) float.
        scale: (spec.scale_numel,); it is rounded to bfloat16, as it is stored.
        steps: (channels of irreps_in,) where the integers hold the steps of the input; None where not.
        bits: 16, 8 or 4.
        spec: the linear.
    """
    stored = scale + (scale.to(torch.bfloat16).float() - scale).detach()
    parts, widths = [], [path.block_out.mul for path in spec.paths]
    columns_of = torch.split(weight, [path.numel for path in spec.paths])
    for path, columns, s in zip(spec.paths, columns_of, torch.split(stored, widths), strict=True):
        columns = columns.view(-1, path.block_out.mul)
        rows = None if steps is None else rows_of(steps.detach(), path)
        held = columns if rows is None else columns * rows
        made = s * _rounded(held / s, -QMAX[bits], QMAX[bits])
        parts.append((made if rows is None else made / rows).flatten())
    return torch.cat(parts) if parts else weight


def learned_codes(weight: Tensor, scale: Tensor, steps: Tensor | None, bits: int, spec: LinearSpec) -> Tensor:
    """The integers that :func:`learned_weight` stands for, (spec.weight_numel,)."""
    stored = scale.to(torch.bfloat16).float()
    parts = []
    for path in spec.paths:
        columns = weight[path.offset : path.offset + path.numel].view(-1, path.block_out.mul)
        s = stored[path.scale_offset : path.scale_offset + path.block_out.mul]
        held = columns if steps is None else columns * rows_of(steps, path)
        parts.append(torch.round(torch.clamp(held / s, -QMAX[bits], QMAX[bits])).flatten())
    return torch.cat(parts) if parts else weight


def _rounded(x: Tensor, low: float, high: float) -> Tensor:
    """x within the range, rounded; the gradient does not see the rounding."""
    inside = torch.clamp(x, low, high)
    return inside + (torch.round(inside) - inside).detach()
