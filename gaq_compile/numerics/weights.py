"""Weights of an irreps-linear as integers: ``W[u, w] = scale[path, w] * C[u, w]``.

One scale per path and output channel, a number that bfloat16 holds: integers are chosen for the
rounded scale, so two bytes for it lose nothing. A linear mixes channels only, so rounding its weights
commutes with rotations: it never costs equivariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, GaqError, IrrepsError
from ..ir.layout import channels
from ..ir.specs import LinearPath, LinearSpec

QMAX = {16: 32767, 8: 127, 4: 7}
CODES = {16: torch.int16, 8: torch.int8, 4: torch.int8}

# Of 15 levels the outermost are worth giving up: the best clip lies between half the range and all of it.
_CLIPPING = tuple(1.0 - 0.025 * k for k in range(21))

TINY = 1e-30  # a column this small is zero in float32 arithmetic; its step would be subnormal


def quantize_weight(
    weight: Tensor, spec: LinearSpec, bits: int, *, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """Round a linear's weights to integers, symmetric per path and output channel.

    8 bits: ``scale = max|W[:, w]| / 127``, and 16 alike. 4 bits: the scale among a few clipping ratios of
    ``max|W[:, w]| / 7`` with the smallest squared error. Columns of zeros get scale 1.

    Args:
        weight: (spec.weight_numel,) float.
        spec: the linear.
        bits: 16, 8 or 4.
        whole: one scale for the whole layer, chosen as that of a column.

    Returns:
        Codes (spec.weight_numel,) int8 (int16 for 16 bits) in the weights' order, |C| <= 32767, 127
        or 7, and scales (spec.scale_numel,) float32.

    Raises:
        ConfigError: for other bits.
        IrrepsError: if the weights do not fit the spec.
        GaqError: if a weight is not finite.
    """
    check_weight(weight, spec, bits)
    codes = torch.empty(spec.weight_numel, dtype=CODES[bits], device=weight.device)
    scale = torch.empty(spec.scale_numel, dtype=torch.float32, device=weight.device)
    common = column_scales(weight.detach()[:, None], bits) if whole else None
    for path in spec.paths:
        columns = weight.detach()[path.offset : path.offset + path.numel].view(-1, path.block_out.mul)
        s = column_scales(columns, bits) if common is None else common
        codes[path.offset : path.offset + path.numel] = round_columns(columns, s, bits).flatten()
        scale[path.scale_offset : path.scale_offset + path.block_out.mul] = s
    return codes, scale


def check_weight(weight: Tensor, spec: LinearSpec, bits: int) -> None:
    """Refuse weights that cannot be rounded; raises what :func:`quantize_weight` says."""
    if bits not in QMAX:
        raise ConfigError(f"weights of {bits} bits are not supported", where=str(spec), fix="use 16, 8 or 4")
    _check(weight, spec.weight_numel, "weights", spec)
    if not bool(torch.isfinite(weight).all()):
        raise GaqError("a weight is NaN or infinite", where=str(spec), fix="check the model's parameters")


def dequantize_weight(codes: Tensor, scale: Tensor, spec: LinearSpec, steps: Tensor | None = None) -> Tensor:
    """``W[u, w] = scale[path, w] * C[u, w] / steps[u]``: the float weights that the integers stand for.

    Args:
        codes: (spec.weight_numel,) integers.
        scale: (spec.scale_numel,) float.
        spec: the linear.
        steps: (channels of irreps_in,) where the integers hold the steps of the linear's input
            (:func:`with_steps`); None where they do not.

    Returns:
        (spec.weight_numel,) in the scale's dtype.

    Raises:
        IrrepsError: if codes, scale or steps do not fit the spec.
    """
    _check(codes, spec.weight_numel, "codes", spec)
    _check(scale, spec.scale_numel, "scales", spec)
    if steps is not None:
        _check(steps, channels(spec.irreps_in), "steps", spec)
    parts = []
    for path in spec.paths:
        mul = path.block_out.mul
        columns = codes[path.offset : path.offset + path.numel].view(-1, mul).to(scale.dtype)
        columns = columns * scale[path.scale_offset : path.scale_offset + mul]
        parts.append((columns if steps is None else columns / rows_of(steps, path)).flatten())
    return torch.cat(parts) if parts else scale.new_zeros(0)


def with_steps(weight: Tensor, spec: LinearSpec, steps: Tensor) -> Tensor:
    """``steps[u] * W[u, w]``: weights that meet the integers ``x[u] / steps[u]`` in a plain sum.

    Args:
        weight: (spec.weight_numel,) float.
        spec: the linear.
        steps: (channels of irreps_in,), the steps of the linear's input.

    Raises:
        IrrepsError: if weight or steps do not fit the spec.
    """
    _check(weight, spec.weight_numel, "weights", spec)
    _check(steps, channels(spec.irreps_in), "steps", spec)
    parts = []
    for path in spec.paths:
        columns = weight[path.offset : path.offset + path.numel].view(-1, path.block_out.mul)
        parts.append((columns * rows_of(steps, path)).flatten())
    return torch.cat(parts) if parts else weight.new_zeros(0)


def rows_of(steps: Tensor, path: LinearPath) -> Tensor:
    """The steps of a path's input channels, as a column (mul_in, 1)."""
    return steps[path.block_in.channel :][: path.block_in.mul, None]


def weight_bytes(spec: LinearSpec, bits: int | None) -> int:
    """Bytes of a linear's stored weights: (packed) codes and bfloat16 scales; None means float32.

    Raises:
        ConfigError: for bits other than 16, 8, 4 or None.
    """
    if bits is None:
        return 4 * spec.weight_numel
    if bits not in QMAX:
        raise ConfigError(f"weights of {bits} bits are not supported", where=str(spec), fix="use 16, 8 or 4")
    return (spec.weight_numel * bits + 7) // 8 + 2 * spec.scale_numel


def column_scales(columns: Tensor, bits: int) -> Tensor:
    """The scale of each output channel of one weight matrix (in, out): (out,) float32."""
    if columns.shape[0] == 0:
        return columns.new_ones(columns.shape[1], dtype=torch.float32)
    full = columns.abs().amax(0)
    zero = full <= TINY
    full = torch.where(zero, 1.0, full / QMAX[bits]).to(torch.float32)
    if bits > 4:
        return stored_scale(full)
    candidates = [stored_scale(full * ratio) for ratio in _CLIPPING]
    errors = torch.stack([_squared_error(columns, s, bits) for s in candidates])
    best = torch.stack(candidates).gather(0, errors.argmin(0, keepdim=True))[0]
    return torch.where(zero, 1.0, best)


def stored_scale(scale: Tensor) -> Tensor:
    """The smallest number of bfloat16 that is not below a positive scale: like it, float32."""
    near = scale.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, torch.inf))
    return torch.where(near.float() < scale, above, near).float()


def round_columns(columns: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of one weight matrix (in, out) on given scales (out,): (in, out) int8 or int16."""
    qmax = QMAX[bits]
    return torch.clamp(torch.round(columns / scale), -qmax, qmax).to(CODES[bits])


def _squared_error(columns: Tensor, scale: Tensor, bits: int) -> Tensor:
    return ((round_columns(columns, scale, bits) * scale - columns) ** 2).sum(0)


def _check(tensor: Tensor, numel: int, what: str, spec: LinearSpec) -> None:
    if tuple(tensor.shape) != (numel,):
        raise IrrepsError(f"expected {numel} {what}, got {tuple(tensor.shape)}", where=str(spec))
