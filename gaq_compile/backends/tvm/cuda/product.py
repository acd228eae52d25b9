"""The channelwise tensor product of per-row tensors and its gradients on GPUs: a thread for each row.

Models use it with one channel; a thread goes through several one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ....ir.layout import dim
from ....ir.specs import tensor_product_spec
from ..product_kernel import (
    product_backward_buffers,
    product_backward_lines,
    product_buffers,
    product_lines,
)
from .device import Gpu, blocks, empty
from .emit import THREADS, by_rows, local

Gradients = tuple[Tensor, Tensor, Tensor]


def lower_product(spec: str, gpu: Gpu) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The compiled product (x, sh, weight) -> y; arguments and errors as the CPU's."""
    kernel, width = gpu.kernel(product_text(spec)), dim(tensor_product_spec(spec).irreps_out)

    def run(x: Tensor, sh: Tensor, weight: Tensor) -> Tensor:
        y, n = empty(x, x.shape[0], width), x.shape[0]
        kernel((blocks(n, THREADS), 1), {"x": x, "sh": sh, "weight": weight, "y": y, "n": n})
        return y

    return run


def lower_product_backward(spec: str, gpu: Gpu) -> Callable[[Tensor, Tensor, Tensor, Tensor], Gradients]:
    """The compiled gradients (grad, x, sh, weight) -> (gx, gsh, gw)."""
    kernel = gpu.kernel(product_backward_text(spec))

    def run(grad: Tensor, x: Tensor, sh: Tensor, weight: Tensor) -> Gradients:
        gx, gsh, gw, n = torch.empty_like(x), torch.empty_like(sh), torch.empty_like(weight), x.shape[0]
        inputs = {"grad": grad, "x": x, "sh": sh, "weight": weight}
        kernel((blocks(n, THREADS), 1), {**inputs, "gx": gx, "gsh": gsh, "gw": gw, "n": n})
        return gx, gsh, gw

    return run


@lru_cache(maxsize=256)
def product_text(spec: str) -> str:
    """TVMScript of ``main(x, sh, weight, y)``."""
    return by_rows(product_buffers(spec), product_lines(spec, 1))


@lru_cache(maxsize=256)
def product_backward_text(spec: str) -> str:
    """TVMScript of ``main(grad, x, sh, weight, gx, gsh, gw)``."""
    return by_rows(product_backward_buffers(spec), product_backward_lines(spec, 1, local))
