"""Quantizing activations and its straight-through gradient on GPUs: a thread for each channel."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ....config import activation_scheme
from ....errors import LoweringError
from ....ir.layout import channels
from ..mddq_kernel import buffers, channel_steps, mddq_backward_lines, mddq_blocks, mddq_lines
from .device import Gpu, blocks, on_device
from .emit import THREADS, ThreadEmitter, by_channels


def lower_mddq(irreps: str, scheme: str, scale: Tensor, gpu: Gpu) -> Callable[[Tensor], Tensor]:
    """The compiled ``fake_quantize``, x (N, dim) -> xhat (N, dim); arguments and errors as the CPU's."""
    if activation_scheme(scheme).common:
        raise LoweringError(
            "activations on a common grid have a kernel only together with integer weights", where=scheme
        )
    steps, count = {"scale": channel_steps(scale, irreps)}, channels(irreps)
    kernel = gpu.kernel(mddq_text(irreps, scheme))

    def run(x: Tensor) -> Tensor:
        xhat, n = torch.empty_like(x), x.shape[0]
        kernel((blocks(n * count, THREADS), 1), {"x": x, "xhat": xhat, "n": n, **on_device(steps, x)})
        return xhat

    return run


def lower_mddq_backward(
    irreps: str, scheme: str, scale: Tensor, gpu: Gpu
) -> Callable[[Tensor, Tensor], Tensor]:
    """The compiled ``fake_quantize_backward``, (grad, x) -> grad_x, all (N, dim)."""
    steps, count = {"scale": channel_steps(scale, irreps)}, channels(irreps)
    kernel = gpu.kernel(mddq_backward_text(irreps, scheme))

    def run(grad: Tensor, x: Tensor) -> Tensor:
        gx, n = torch.empty_like(x), x.shape[0]
        tensors = {"grad": grad, "x": x, "gx": gx, **on_device(steps, x)}
        kernel((blocks(n * count, THREADS), 1), {**tensors, "n": n})
        return gx

    return run


@lru_cache(maxsize=256)
def mddq_text(irreps: str, scheme: str) -> str:
    """TVMScript of ``main(x, scale, xhat)``."""
    chosen, found = activation_scheme(scheme), mddq_blocks(irreps)
    ranges = [(b.mul, mddq_lines(ThreadEmitter(), b, chosen)) for b in found]
    return by_channels(buffers(irreps, ("x",), "xhat"), ranges)


@lru_cache(maxsize=256)
def mddq_backward_text(irreps: str, scheme: str) -> str:
    """TVMScript of ``main(grad, x, scale, gx)``."""
    chosen, found = activation_scheme(scheme), mddq_blocks(irreps)
    ranges = [(b.mul, mddq_backward_lines(ThreadEmitter(), b, chosen)) for b in found]
    return by_channels(buffers(irreps, ("grad", "x"), "gx"), ranges)
