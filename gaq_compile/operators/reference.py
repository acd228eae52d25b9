"""What every gaq operator means, in plain torch: readable, differentiable by hand, any dtype.

These functions are the definition that kernels are tested against and the ``reference`` backend
runs. All tensors are component-major (see :mod:`.layout`).
"""

from __future__ import annotations

import functools
import itertools
from functools import lru_cache

import torch
from e3nn import o3
from torch import Tensor

from ..errors import IrrepsError
from ..ir.layout import Block, blocks, dim, permutation, simplified, view
from ..ir.specs import gate_spec, linear_spec, tensor_product_spec
from ..numerics.gradients import fake_quantize_gradient
from ..numerics.weights import rows_of
from . import activations, harmonics


def relayout(x: Tensor, irreps: str, to: str) -> Tensor:
    """Reorder the last axis between ``mul_ir`` and ``ir_mul``."""
    order = torch.tensor(permutation(irreps, to), dtype=torch.int64, device=x.device)
    return x[..., order]


def irreps_linear(x: Tensor, weight: Tensor, bias: Tensor | None, spec: str, transpose: bool) -> Tensor:
    """``y[n,c,w] = sum_u x[n,c,u] W[u,w] (+ bias)``, per path; with ``transpose`` by ``W^T``."""
    s = linear_spec(spec)
    y = x.new_zeros(x.shape[0], dim(s.irreps_in if transpose else s.irreps_out))
    for path in s.paths:
        matrix = weight[path.offset : path.offset + path.numel].reshape(path.block_in.mul, path.block_out.mul)
        source, sink = path.block_in, path.block_out
        if transpose:
            matrix, source, sink = matrix.t(), sink, source
        view(y, sink).add_(view(x, source) @ matrix)
    if bias is not None:
        offset = 0
        for block in s.bias_blocks:
            view(y, block).add_(bias[offset : offset + block.mul])
            offset += block.mul
    return y


def irreps_linear_weight_gradient(grad: Tensor, x: Tensor, spec: str, transpose: bool) -> Tensor:
    """Gradient of :func:`irreps_linear` with respect to the flat weights: ``sum_{n,c} x[u] grad[w]``."""
    source, sink = (grad, x) if transpose else (x, grad)
    parts = [
        torch.einsum("ncu,ncw->uw", view(source, path.block_in), view(sink, path.block_out)).flatten()
        for path in linear_spec(spec).paths
    ]
    return torch.cat(parts) if parts else grad.new_zeros(0)


def gradient_linear(grad: Tensor, codes: Tensor, scale: Tensor, steps: Tensor | None, spec: str) -> Tensor:
    """The adjoint map on a gradient in 16-bit integers: ``gx = s X C^T`` with ``s X ~ grad * scale``.

    Where the codes hold the steps of the layer's input, the result is divided by these.
    """
    s = linear_spec(spec)
    out = grad.new_zeros(grad.shape[0], dim(s.irreps_in))
    for path in s.paths:
        span = slice(path.scale_offset, path.scale_offset + path.block_out.mul)
        rows = fake_quantize_gradient(view(grad, path.block_out) * scale[span].to(grad.dtype))
        matrix = codes[path.offset : path.offset + path.numel].reshape(path.block_in.mul, path.block_out.mul)
        product = rows @ matrix.t().to(grad.dtype)
        view(out, path.block_in).add_(product if steps is None else product / rows_of(steps, path)[:, 0])
    return out


@lru_cache(maxsize=512)
def _coupling(l1: int, l2: int, l3: int, dtype: torch.dtype) -> Tensor:
    return o3.wigner_3j(l1, l2, l3, dtype=torch.float64).to(dtype)


def to_half(x: Tensor, exponent: int) -> Tensor:
    """The float16 nearest to ``2^exponent x``: to 1 / 2048, or 2^-24 below 2^-14; infinite from 65,520 on."""
    return (x * 2.0**exponent).half()


def from_half(stored: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """What :func:`to_half` was given, as it was rounded."""
    return stored.to(dtype) * 2.0**-exponent


def tensor_product(x: Tensor, sh: Tensor, weight: Tensor, spec: str) -> Tensor:
    """Channelwise tensor product per edge: x (E, dim_x), sh (E, dim_sh), weight (E, weight_numel)."""
    s = tensor_product_spec(spec)
    out = x.new_zeros(x.shape[0], dim(s.irreps_out))
    for path in s.paths:
        mixed = torch.einsum("eik,eiu->eku", _mix(path, sh), view(x, path.block_x))
        w = weight[:, path.offset : path.offset + path.block_x.mul]
        view(out, path.block_out).add_(mixed * w[:, None, :])
    return out


def tensor_product_backward(
    grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor, spec: str, of_sh: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`tensor_product` with respect to x, sh (zeros without ``of_sh``) and weight."""
    s = tensor_product_spec(spec)
    gx, gsh, gw = torch.zeros_like(x), torch.zeros_like(sh), torch.zeros_like(weight)
    for path in s.paths:
        coupling = path.coefficient * _coupling(path.block_x.l, path.block_sh.l, path.block_out.l, x.dtype)
        coupling = coupling.to(x.device)
        g, xb, mix = view(grad, path.block_out), view(x, path.block_x), _mix(path, sh)
        span = slice(path.offset, path.offset + path.block_x.mul)
        w = weight[:, span]
        gw[:, span] += _weight_gradient(g, mix, xb)
        weighted = g * w[:, None, :]
        view(gx, path.block_x).add_(torch.einsum("eku,eik->eiu", weighted, mix))
        if not of_sh:
            continue
        outer = torch.einsum("eku,eiu->eik", weighted, xb)
        view(gsh, path.block_sh).add_(torch.einsum("eik,ijk->ej", outer, coupling)[:, :, None])
    return gx, gsh, gw


def _weight_gradient(g: Tensor, mix: Tensor, x: Tensor) -> Tensor:
    """``sum_ik g[e,k,u] mix[e,i,k] x[e,i,u]``: bit for bit what one einsum gives, in half its time."""
    if mix.shape[1] == mix.shape[2] == 1:
        return (g * x * mix)[:, 0]
    if mix.shape[1] <= mix.shape[2]:  # the shorter sum last
        pairs = torch.einsum("eku,eik->eui", g, mix).transpose(1, 2) * x
    else:
        pairs = torch.einsum("eik,eiu->euk", mix, x).transpose(1, 2) * g
    return functools.reduce(torch.add, pairs.unbind(1))


def _mix(path, sh: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    coupling = path.coefficient * _coupling(path.block_x.l, path.block_sh.l, path.block_out.l, sh.dtype)
    return torch.einsum("ej,ijk->eik", view(sh, path.block_sh)[:, :, 0], coupling.to(sh.device))


def sort_edges(senders: Tensor, receivers: Tensor, num_nodes: int) -> list[Tensor]:
    """Both adjacency orders as int32 CSR.

    Returns:
        ``[senders, receivers, receiver_ptr, receiver_order, sender_ptr, sender_order]``: the edges
        of receiver n are ``receiver_order[receiver_ptr[n] : receiver_ptr[n + 1]]``, in ascending order.
    """
    lists = [senders.to(torch.int32), receivers.to(torch.int32)]
    for index in (receivers, senders):
        order = torch.argsort(index, stable=True)
        pointer = torch.zeros(num_nodes + 1, dtype=torch.int64, device=index.device)
        pointer[1:] = torch.bincount(index, minlength=num_nodes).cumsum(0)
        lists += [pointer.to(torch.int32), order.to(torch.int32)]
    return lists


def bonds(receivers: Tensor, senders: Tensor) -> list[Tensor]:
    """Which edges are each other's reverse: edge ``e`` and ``e + E / 2``.

    Returns:
        Per edge its bond, and 1.0 for the first of the two, 0.0 for the second; per bond its first
        and its second edge, and the receiver and the sender of the first.
    """
    half = receivers.shape[0] // 2
    first = torch.arange(half, device=receivers.device)
    mask = torch.zeros(2 * half, device=receivers.device)
    mask[:half] = 1.0
    return [first.repeat(2), mask, first, first + half, receivers[:half].clone(), senders[:half].clone()]


def sum_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """``out[n] = sum_{e: index[e]=n} values[e]``: zeros where no row has the index."""
    return values.new_zeros(rows, *values.shape[1:]).index_add_(0, index, values)


def conv(x: Tensor, sh: Tensor, weight: Tensor, edges: list[Tensor], spec: str) -> Tensor:
    """``out[n] = sum_{e: receivers[e]=n} TP(x[senders[e]], sh[e], weight[e])``.

    ``weight`` has one row per edge, or one per bond (:func:`bonds`).
    """
    senders, receivers = edges[0].long(), edges[1].long()
    messages = tensor_product(x[senders], sh, _of_edges(weight, sh), spec)
    return messages.new_zeros(x.shape[0], messages.shape[1]).index_add_(0, receivers, messages)


def conv_backward(
    grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor, edges: list[Tensor], spec: str, of_sh: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`conv` with respect to x, sh (zeros without ``of_sh``) and weight.

    Each has its tensor's shape: that of a bond's weights is the sum of both its edges'.
    """
    senders, receivers = edges[0].long(), edges[1].long()
    gx, gsh, gw = tensor_product_backward(grad[receivers], x[senders], sh, _of_edges(weight, sh), spec, of_sh)
    return torch.zeros_like(x).index_add_(0, senders, gx), gsh, _of_rows(gw, weight)


def _of_edges(weight: Tensor, sh: Tensor) -> Tensor:
    return weight if weight.shape[0] == sh.shape[0] else weight.repeat(2, 1)


def _of_rows(gradient: Tensor, weight: Tensor) -> Tensor:
    """What an edge's and its reverse's gradients are together, where they share a row of weights."""
    rows = weight.shape[0]
    return gradient if gradient.shape[0] == rows else gradient[:rows] + gradient[rows:]


def spherical_harmonics(vec: Tensor, irreps: str, normalize: bool, normalization: str) -> Tensor:
    """Real spherical harmonics of ``vec`` (n, 3), e3nn's component order and signs."""
    return harmonics.spherical_harmonics(vec, _degrees(irreps), normalize, normalization)


def spherical_harmonics_backward(
    grad: Tensor, vec: Tensor, irreps: str, normalize: bool, normalization: str
) -> Tensor:
    """Gradient of :func:`spherical_harmonics` with respect to ``vec``."""
    return harmonics.spherical_harmonics_backward(grad, vec, _degrees(irreps), normalize, normalization)


def _degrees(irreps: str) -> list[int]:
    found = blocks(irreps)
    if any((a.l, a.p) == (b.l, b.p) for a, b in itertools.pairwise(found)):
        raise IrrepsError(f"harmonics of one degree side by side, {irreps!r}, have no place in the layout")
    return [block.l for block in found]


def gate(x: Tensor, spec: str) -> Tensor:
    """``[act(scalars), gated * act(gates)]``; see :class:`.specs.GateSpec`."""
    s = gate_spec(spec)
    n_scalars, n_gates = dim(s.scalars), dim(s.gates)
    parts = [_pointwise(x[:, :n_scalars], s.scalars, s.scalar_activations)]
    gates = _pointwise(x[:, n_scalars : n_scalars + n_gates], s.gates, s.gate_activations)
    for span, gate_span, block in _gated(spec):
        scaled = x[:, span].reshape(x.shape[0], block.components, block.mul) * gates[:, None, gate_span]
        parts.append(scaled.reshape(x.shape[0], block.components * block.mul))
    return torch.cat(parts, dim=1)


def gate_backward(grad: Tensor, x: Tensor, spec: str) -> Tensor:
    """Gradient of :func:`gate` with respect to x."""
    s = gate_spec(spec)
    n_scalars, n_gates = dim(s.scalars), dim(s.gates)
    middle = slice(n_scalars, n_scalars + n_gates)
    gates = _pointwise(x[:, middle], s.gates, s.gate_activations)
    gate_grad = torch.empty_like(gates)
    out = torch.empty_like(x)
    out[:, :n_scalars] = grad[:, :n_scalars] * _slope(x[:, :n_scalars], s.scalars, s.scalar_activations)
    for span, gate_span, block in _gated(spec):
        shape = (x.shape[0], block.components, block.mul)
        g = grad[:, span.start - n_gates : span.stop - n_gates].reshape(shape)
        gate_grad[:, gate_span] = (g * x[:, span].reshape(shape)).sum(1)
        out[:, span] = (g * gates[:, None, gate_span]).reshape(x.shape[0], block.components * block.mul)
    out[:, middle] = gate_grad * _slope(x[:, middle], s.gates, s.gate_activations)
    return out


def _gated(spec: str) -> list[tuple[slice, slice, Block]]:
    """(columns of the input, columns of the gates, block) per simplified gated block."""
    s = gate_spec(spec)
    base, channel, out = dim(s.scalars) + dim(s.gates), 0, []
    for block in blocks(simplified(s.gated)) if s.gated else ():
        width = block.components * block.mul
        out.append((slice(base, base + width), slice(channel, channel + block.mul), block))
        base, channel = base + width, channel + block.mul
    return out


def _pointwise(x: Tensor, irreps: str, acts: tuple[str, ...]) -> Tensor:
    if len(set(acts)) <= 1:
        return activations.apply(acts[0], x) if acts else x
    return torch.cat([activations.apply(a, part) for a, part in _split(x, irreps, acts)], dim=1)


def _slope(x: Tensor, irreps: str, acts: tuple[str, ...]) -> Tensor:
    if len(set(acts)) <= 1:
        return activations.derivative(acts[0], x) if acts else torch.ones_like(x)
    return torch.cat([activations.derivative(a, part) for a, part in _split(x, irreps, acts)], dim=1)


def _split(x: Tensor, irreps: str, acts: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    sizes = [mul for mul, _ in o3.Irreps(irreps)]
    return list(zip(acts, x.split(sizes, dim=1), strict=True))
