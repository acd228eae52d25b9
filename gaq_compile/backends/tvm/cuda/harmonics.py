"""Real spherical harmonics and their gradient on GPUs: a thread for each vector."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..harmonics_kernel import harmonics_gradient, harmonics_values, harmonics_width
from .device import Gpu, blocks, empty
from .emit import THREADS, ThreadEmitter, by_rows


def lower_harmonics(irreps: str, normalize: bool, normalization: str, gpu: Gpu) -> Callable[[Tensor], Tensor]:
    """The compiled harmonics, vec (N, 3) -> (N, sum(2l+1)); arguments and errors as the CPU's."""
    kernel = gpu.kernel(harmonics_text(irreps, normalize, normalization))
    width = harmonics_width(irreps, normalization)

    def run(vec: Tensor) -> Tensor:
        sh, n = empty(vec, vec.shape[0], width), vec.shape[0]
        kernel((blocks(n, THREADS), 1), {"vec": vec, "sh": sh, "n": n})
        return sh

    return run


def lower_harmonics_backward(
    irreps: str, normalize: bool, normalization: str, gpu: Gpu
) -> Callable[[Tensor, Tensor], Tensor]:
    """The compiled gradient (grad (N, sum(2l+1)), vec (N, 3)) -> (N, 3)."""
    kernel = gpu.kernel(harmonics_backward_text(irreps, normalize, normalization))

    def run(grad: Tensor, vec: Tensor) -> Tensor:
        gvec, n = torch.empty_like(vec), vec.shape[0]
        kernel((blocks(n, THREADS), 1), {"grad": grad, "vec": vec, "gvec": gvec, "n": n})
        return gvec

    return run


@lru_cache(maxsize=64)
def harmonics_text(irreps: str, normalize: bool, normalization: str) -> str:
    """TVMScript of ``main(vec, sh)``."""
    e, width = ThreadEmitter(), harmonics_width(irreps, normalization)
    values = harmonics_values(e, _vector(e), irreps, normalize, normalization)
    e.lines += [f"sh[i, {column}] = {value}" for column, value in enumerate(values)]
    return by_rows([("vec", "n, 3", "float32"), ("sh", f"n, {width}", "float32")], e.lines)


@lru_cache(maxsize=64)
def harmonics_backward_text(irreps: str, normalize: bool, normalization: str) -> str:
    """TVMScript of ``main(grad, vec, gvec)``."""
    e, width = ThreadEmitter(), harmonics_width(irreps, normalization)

    def grad(column: int) -> str:
        return e.let(f"grad[i, {column}]")

    out = harmonics_gradient(e, _vector(e), grad, irreps, normalize, normalization)
    e.lines += [f"gvec[i, {c}] = {value}" for c, value in enumerate(out)]
    widths = {"grad": width, "vec": 3, "gvec": 3}
    return by_rows([(name, f"n, {size}", "float32") for name, size in widths.items()], e.lines)


def _vector(e: ThreadEmitter) -> list[str]:
    return [e.let(f"vec[i, {c}]") for c in range(3)]
