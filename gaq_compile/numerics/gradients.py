"""Gradients as 16-bit integers with a step of their own for each row and product.

A gradient has no fixed range: it scales with the loss and differs between rows by orders of
magnitude. So its step is not calibrated but taken from the row, ``t`` (K,), that enters a product:

    s = max_w |t_w| / 32767,    X_w = round(t_w / s),    that = s X

with ``s = 0`` and ``X = 0`` where the maximum lies below :data:`SMALLEST` (the step would not be a
normal float32). Rounding is half to even; no value is ever clamped. The division is a product with
``32767 / max``, as in the kernels, so that float32 results agree up to values that lie within
float32 rounding of a tie. A row that holds a NaN or an infinity becomes NaN throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 32767
"""The largest gradient integer, 2^15 - 1."""

SMALLEST = 2.0**-110
"""Rows whose largest absolute value is below this count as zero."""


def quantize_gradient(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of each row and their step: ``fake_quantize_gradient(rows) = step * X``.

    Args:
        rows: (..., K) floating point, any unit; for a linear's gradient, times the weights' scales.

    Returns:
        X (..., K), whole numbers in the dtype of rows, ``|X| <= 32767``, and the step (..., 1) in
        the unit of rows: 0 for a zero row, NaN for a row with a NaN or an infinity.
    """
    if rows.shape[-1] == 0:
        return rows, rows.new_zeros(*rows.shape[:-1], 1)
    top = rows.abs().amax(-1, keepdim=True)
    zero = torch.zeros_like(top)
    step = torch.where(top.isfinite(), top * (1.0 / LARGEST), torch.full_like(top, torch.nan))
    inverse = torch.where(top < SMALLEST, zero, LARGEST / top)
    return torch.round(rows * inverse), torch.where(top < SMALLEST, zero, step)


def fake_quantize_gradient(rows: Tensor) -> Tensor:
    """Round each row to 16-bit integers with the row's own step (module docstring), and back.

    The error of a value is at most half a step, 1/65534 of its row's largest absolute value, plus
    what the arithmetic of its dtype adds (below 1% of that in float32).

    Args:
        rows: (..., K) floating point, any unit.

    Returns:
        A tensor like rows.
    """
    whole, step = quantize_gradient(rows)
    return whole * step
