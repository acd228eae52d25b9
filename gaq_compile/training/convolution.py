"""Convolutions that training can differentiate twice, through the compiled kernels.

A loss on forces needs derivatives of derivatives. A convolution ``T(x, sh, w)`` is linear in each of its
arguments, so these are convolutions again: with the gradients ``(a_x, a_sh, a_w)`` of those of ``<g, T>``,

    d/dg:  T(a_x, sh, w) + T(x, a_sh, w) + T(x, sh, a_w)
    d/dx:  the x part of T's gradient at (a_sh, w) and at (sh, a_w); likewise for sh and w

and the same two kernels that inference runs compute all of it. They take a tenth of the time of e3nn's code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..backends.tvm.build import host_target
from ..backends.tvm.conv import conv_backward, conv_forward
from ..capture.modules import TensorProduct, convert_tensor_product
from ..errors import CaptureError
from ..models.transformer import Convolution
from ..operators.reference import sort_edges
from ..operators.registration import ops


class Kernels(NamedTuple):
    """A convolution and its gradient, compiled."""

    forward: Any
    backward: Any


class _Conv(torch.autograd.Function):
    """``T(x, sh, w)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sh: Tensor, weight: Tensor, kernels: Kernels, *edges: Tensor) -> Tensor:
        ctx.kernels, ctx.edges = kernels, edges
        ctx.save_for_backward(x, sh, weight)
        return kernels.forward(x, sh, weight, edges)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = _ConvBackward.apply(grad.contiguous(), *ctx.saved_tensors, ctx.kernels, *ctx.edges)
        return *found, None, *[None] * len(ctx.edges)


class _ConvBackward(torch.autograd.Function):
    """The gradients of ``<g, T(x, sh, w)>`` by x, sh and w."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor, kernels: Kernels, *edges: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.kernels, ctx.edges = kernels, edges
        ctx.save_for_backward(grad, x, sh, weight)
        return kernels.backward(grad, x, sh, weight, edges)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, a_x: Tensor, a_sh: Tensor, a_weight: Tensor) -> Any:
        grad, x, sh, weight = ctx.saved_tensors
        a_x, a_sh, a_weight = (a.contiguous() for a in (a_x, a_sh, a_weight))
        kernels: Kernels = ctx.kernels
        edges: tuple[Tensor, ...] = ctx.edges
        to_grad = kernels.forward(a_x, sh, weight, edges)
        to_grad += kernels.forward(x, a_sh, weight, edges)
        to_grad += kernels.forward(x, sh, a_weight, edges)
        _, sh_1, weight_1 = kernels.backward(grad, a_x, sh, weight, edges)
        x_2, _, weight_2 = kernels.backward(grad, x, a_sh, weight, edges)
        x_3, sh_3, _ = kernels.backward(grad, x, sh, a_weight, edges)
        return to_grad, x_2 + x_3, sh_1 + sh_3, weight_1 + weight_2, None, *[None] * len(edges)


def convolve(x: Tensor, sh: Tensor, weight: Tensor, edges: Sequence[Tensor], kernels: Kernels) -> Tensor:
    """``out[n] = sum_{e: receivers[e] = n} TP(x[senders[e]], sh[e], weight[e])``, twice differentiable.

    Args:
        x: (N, dim_x), component-major.
        sh: (E, dim_sh).
        weight: (E, weight_numel).
        edges: from :func:`~gaq_compile.operators.reference.sort_edges`.
        kernels: from :func:`kernels_of`.
    """
    given = (t.contiguous() for t in (x, sh, weight))
    return _Conv.apply(*given, kernels, *edges)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def kernels_of(spec: str) -> Kernels:
    """The kernels of a tensor product spec for this machine."""
    target = host_target()
    return Kernels(conv_forward(spec, target), conv_backward(spec, target))


class FastConvolution(nn.Module):
    """A model's :class:`~gaq_compile.models.transformer.Convolution` through compiled kernels, float32."""

    def __init__(self, plain: Convolution) -> None:
        super().__init__()
        product = convert_tensor_product(plain.product, "convolution")
        if not isinstance(product, TensorProduct):
            raise CaptureError("a convolution whose paths are not all channel by channel")
        self.irreps_in, self.irreps_out = product.irreps_x, product.irreps_out
        self.kernels, self.paths = kernels_of(product.spec), plain.paths

    def forward(self, h: Tensor, sh: Tensor, weights: Tensor, receivers: Tensor, senders: Tensor) -> Tensor:
        edges = sort_edges(senders, receivers, h.shape[0])
        x = ops.relayout(h, self.irreps_in, "ir_mul")
        return ops.relayout(convolve(x, sh, weights, edges, self.kernels), self.irreps_out, "mul_ir")


def with_fast_convolutions(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters, with convolutions through compiled kernels."""
    fast = copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})
    for module in fast.modules():
        for name, child in module.named_children():
            if isinstance(child, Convolution):
                setattr(module, name, FastConvolution(child))
    return fast
