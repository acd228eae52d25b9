"""Weights rounded together instead of one by one: second-order rounding of an irreps-linear.

Rounding each weight to its nearest integer leaves an error E in ``y = x W``; what counts is not
``|E|^2`` but the error of the outputs, ``tr(E^T H E)`` with ``H = sum x x^T`` over calibration
rows. GPTQ (Frantar et al. 2023, arXiv 2210.17323) rounds the rows of W one after another and lets
those still to come make up for each; coordinate descent (QuantEase, arXiv 2309.01885) then revisits
every row until nothing improves. An irreps-linear mixes channels only, so H is over channels,
pooled over rows and components m, and rounding this way keeps equivariance exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ir.layout import Block, view
from ..ir.specs import LinearPath, LinearSpec
from .weights import QMAX, TINY, check_weight, column_scales, dequantize_weight, stored_scale

DAMPING = 0.01  # of H's mean diagonal (or of the inputs' mean): what the few examples lack must not be free
SWEEPS = 4  # of coordinate descent; it has settled by then
RANGES = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58)}  # of max|W|; beyond, weights are clipped
Irrep = tuple[int, int]  # (l, p)


def channel_hessians(x: Tensor, spec: LinearSpec, weight: Tensor | None = None) -> dict[Irrep, Tensor]:
    """``H = sum_{n,m} w_n x[n,m] x[n,m]^T`` over the channels of each irrep of a linear's input.

    Args:
        x: (N, dim(spec.irreps_in)), component-major.
        spec: the linear.
        weight: (N,) nonnegative; how much each row counts.

    Returns:
        ``{(l, p): (C, C) float64}``, C the channels of all input blocks of that irrep, in order.
    """
    found = {}
    for irrep in dict.fromkeys((b.l, b.p) for b in spec.inputs):
        rows = torch.cat([view(x, b) for b in spec.inputs if (b.l, b.p) == irrep], dim=2).double()
        scaled = rows if weight is None else rows * weight.double()[:, None, None]
        found[irrep] = torch.einsum("nmu,nmv->uv", scaled, rows)
    return found


def over_steps(hessians: Mapping[Irrep, Tensor], spec: LinearSpec, steps: Tensor) -> dict[Irrep, Tensor]:
    """H of the integers ``x / steps`` that weights with steps meet: ``H[u, v] / (s[u] s[v])``.

    Args:
        hessians: :func:`channel_hessians` of x.
        spec: the linear.
        steps: (channels of irreps_in,).
    """
    found = {}
    for irrep, hessian in hessians.items():
        parts = [steps[b.channel :][: b.mul] for b in spec.inputs if (b.l, b.p) == irrep]
        s = torch.cat(parts).to(hessian.dtype)
        found[irrep] = hessian / (s[:, None] * s)
    return found


def without_mean(hessians: Mapping[Irrep, Tensor], mean: Tensor) -> dict[Irrep, Tensor]:
    """H of what a bias cannot take up: nearly the Schur complement ``H - h h^T / c`` of the 0e channels.

    A hundredth of what the bias takes up stays: inputs that were constant on the examples (a total
    charge) may not be, elsewhere.

    Args:
        hessians: :func:`channel_hessians`.
        mean: (C + 1,): h, H of the 0e channels with the bias, and c, of the bias with itself.
    """
    h, c = mean[:-1], float(mean[-1])
    if c <= 0.0:
        return dict(hessians)
    return dict(hessians) | {(0, 1): hessians[0, 1] - (1.0 - DAMPING) * torch.outer(h, h) / c}


def bias_correction(error: Tensor, spec: LinearSpec, mean: Tensor) -> Tensor:
    """The change of a linear's bias that makes up best for errors of its weights: ``-h^T E / c``.

    Args:
        error: (spec.weight_numel,), rounded minus true weights.
        spec: the linear.
        mean: as for :func:`without_mean`.

    Returns:
        (n,) float64, concatenated over the 0e output blocks.
    """
    h, c = mean[:-1], float(mean[-1])
    places, sums = _channel_places(spec), {b: torch.zeros(b.mul, dtype=mean.dtype) for b in spec.bias_blocks}
    for path in spec.paths if c > 0.0 else ():
        if path.block_out in sums:
            start = places[path.block_in]
            matrix = error[path.offset : path.offset + path.numel].view(-1, path.block_out.mul).to(mean.dtype)
            sums[path.block_out] -= h[start : start + path.block_in.mul] @ matrix / c
    return torch.cat([*sums.values()]) if sums else mean.new_zeros(0)


def round_second_order(
    weight: Tensor, spec: LinearSpec, hessians: Mapping[Irrep, Tensor], bits: int
) -> tuple[Tensor, Tensor]:
    """Integer codes and scales of an irreps-linear, as :func:`.weights.quantize_weight` gives them.

    All paths into one output block are rounded together: their errors add up in the same outputs.
    Each output channel keeps the best of several ranges.

    Args:
        weight: (spec.weight_numel,) float.
        spec: the linear.
        hessians: :func:`channel_hessians` of calibration rows.
        bits: 8 or 4.

    Returns:
        Codes (spec.weight_numel,) int8 and scales (spec.scale_numel,) float32.

    Raises:
        ConfigError, IrrepsError, GaqError: as :func:`.weights.quantize_weight`.
    """
    check_weight(weight, spec, bits)
    codes = torch.zeros(spec.weight_numel, dtype=torch.int8)
    scale = torch.ones(spec.scale_numel, dtype=torch.float32)
    for rows, paths in _shared_outputs(spec):
        block = paths[0].block_out
        matrices = [weight[p.offset : p.offset + p.numel].view(-1, block.mul) for p in paths]
        hessian = _damped(hessians[block.l, block.p][rows][:, rows])
        rounded, steps = _best_range(matrices, hessian, bits)
        start = 0
        for path in paths:
            part = rounded[start : start + path.block_in.mul]
            codes[path.offset : path.offset + path.numel] = part.to(torch.int8).flatten()
            scale[path.scale_offset : path.scale_offset + block.mul] = steps[start].float()
            start += path.block_in.mul
    return codes, scale


def _damped(hessian: Tensor) -> Tensor:
    mean = float(hessian.diagonal().mean())
    return hessian + (DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(hessian), dtype=hessian.dtype)


def _best_range(matrices: list[Tensor], hessian: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and steps (in, out), each column from the range that leaves it the smallest error."""
    weight = torch.cat(matrices).double()
    best_steps = torch.cat([column_scales(m, bits).double().expand(len(m), -1) for m in matrices])
    best_codes = torch.clamp(torch.round(weight / best_steps), -QMAX[bits], QMAX[bits])
    best_cost = _cost(best_codes * best_steps - weight, hessian)  # rounded to nearest: never worse than that
    order = torch.argsort(hessian.diagonal(), descending=True)  # the largest channel is rounded first
    back, h = torch.argsort(order), hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for ratio in RANGES[bits]:
        steps = torch.cat([_steps(m, ratio, bits) for m in matrices])
        w, s = weight[order], steps[order]
        codes = _descended(w, h, s, _gptq(w, inverse, s, QMAX[bits]), QMAX[bits])[back]
        cost = _cost(codes * steps - weight, hessian)
        better = cost < best_cost
        best_codes = torch.where(better, codes, best_codes)
        best_steps = torch.where(better, steps, best_steps)
        best_cost = torch.where(better, cost, best_cost)
    return best_codes, best_steps


def _cost(error: Tensor, hessian: Tensor) -> Tensor:
    """``e^T H e`` of every column: (1, out)."""
    return (error * (hessian @ error)).sum(0, keepdim=True)


def _steps(matrix: Tensor, ratio: float, bits: int) -> Tensor:
    """The step of every weight of a path (in, out), the same along the inputs; float32 values."""
    largest = matrix.abs().amax(0).float()
    step = stored_scale(torch.where(largest > TINY, largest * (ratio / QMAX[bits]), 1.0))
    return step.double().expand(matrix.shape[0], -1)


def _shared_outputs(spec: LinearSpec) -> list[tuple[Tensor, list[LinearPath]]]:
    """Per output block: its paths, and their inputs' places among the channels of the irrep."""
    places, found = _channel_places(spec), []
    for block in dict.fromkeys(path.block_out for path in spec.paths):
        paths = [p for p in spec.paths if p.block_out == block]
        spans = [torch.arange(places[p.block_in], places[p.block_in] + p.block_in.mul) for p in paths]
        found.append((torch.cat(spans), paths))
    return found


def _channel_places(spec: LinearSpec) -> dict[Block, int]:
    """Where each input block's channels start among those of its irrep."""
    places: dict[Block, int] = {}
    taken: dict[Irrep, int] = {}
    for block in spec.inputs:
        places[block] = taken.get((block.l, block.p), 0)
        taken[block.l, block.p] = places[block] + block.mul
    return places


def _gptq(weight: Tensor, inverse: Tensor, step: Tensor, qmax: int) -> Tensor:
    """Codes (in, out), row after row; ``inverse`` is the upper Cholesky factor of H^-1."""
    left, codes = weight.clone(), torch.zeros_like(weight)
    for i in range(len(left)):
        codes[i] = torch.clamp(torch.round(left[i] / step[i]), -qmax, qmax)
        error = (left[i] - codes[i] * step[i]) / inverse[i, i]
        left[i:] -= inverse[i, i:, None] * error
    return codes


def _descended(weight: Tensor, hessian: Tensor, step: Tensor, codes: Tensor, qmax: int) -> Tensor:
    """Codes after coordinate descent on ``tr(E^T H E)``, a row at a time."""
    error = codes * step - weight
    pull = hessian @ error
    for _ in range(SWEEPS):
        for i in range(len(codes)):
            target = codes[i] - pull[i] / (hessian[i, i] * step[i])
            new = torch.clamp(torch.round(target), -qmax, qmax)
            pull += hessian[:, i, None] * ((new - codes[i]) * step[i])
            codes[i] = new
    return codes


def output_error(
    weight: Tensor, codes: Tensor, scale: Tensor, spec: LinearSpec, hessians: Mapping[Irrep, Tensor]
) -> float:
    """``tr(E^T H E)`` of rounded weights, E over all paths into an output block together."""
    error = (dequantize_weight(codes, scale, spec) - weight).double()
    total = 0.0
    for rows, paths in _shared_outputs(spec):
        block = paths[0].block_out
        e = torch.cat([error[p.offset : p.offset + p.numel].view(-1, block.mul) for p in paths])
        total += float((e * (hessians[block.l, block.p][rows][:, rows] @ e)).sum())
    return total
