"""The gated nonlinearity and its gradient on GPUs: a thread for each channel, a gate with all it scales."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ....ir.layout import dim
from ....ir.specs import gate_spec
from ..gate_kernel import gate_backward_ranges, gate_ranges
from .device import Gpu, blocks, empty
from .emit import THREADS, ThreadEmitter, by_channels


def lower_gate(spec: str, gpu: Gpu) -> Callable[[Tensor], Tensor]:
    """The compiled gate, x (N, dim_in) -> y (N, dim_out); arguments and errors as the CPU's."""
    kernel, units = gpu.kernel(gate_text(spec)), _units(spec)
    width = dim(gate_spec(spec).irreps_out)

    def run(x: Tensor) -> Tensor:
        y = empty(x, x.shape[0], width)
        kernel((blocks(x.shape[0] * units, THREADS), 1), {"x": x, "y": y, "n": x.shape[0]})
        return y

    return run


def lower_gate_backward(spec: str, gpu: Gpu) -> Callable[[Tensor, Tensor], Tensor]:
    """The compiled gradient (grad (N, dim_out), x (N, dim_in)) -> grad_x; else as :func:`lower_gate`."""
    kernel, units = gpu.kernel(gate_backward_text(spec)), _units(spec)

    def run(grad: Tensor, x: Tensor) -> Tensor:
        gx = torch.empty_like(x)
        kernel((blocks(x.shape[0] * units, THREADS), 1), {"grad": grad, "x": x, "gx": gx, "n": x.shape[0]})
        return gx

    return run


@lru_cache(maxsize=256)
def gate_text(spec: str) -> str:
    """TVMScript of ``main(x, y)``."""
    s = gate_spec(spec)
    buffers = [("x", f"n, {dim(s.irreps_in)}", "float32"), ("y", f"n, {dim(s.irreps_out)}", "float32")]
    return by_channels(buffers, [(count, e.lines) for count, e in gate_ranges(spec, _emitter)])


@lru_cache(maxsize=256)
def gate_backward_text(spec: str) -> str:
    """TVMScript of ``main(grad, x, gx)``."""
    s = gate_spec(spec)
    widths = {"grad": dim(s.irreps_out), "x": dim(s.irreps_in), "gx": dim(s.irreps_in)}
    buffers = [(name, f"n, {width}", "float32") for name, width in widths.items()]
    return by_channels(buffers, [(count, e.lines) for count, e in gate_backward_ranges(spec, _emitter)])


def _emitter(count: int) -> ThreadEmitter:
    return ThreadEmitter()


def _units(spec: str) -> int:
    """Threads per row: scalars, and gates."""
    s = gate_spec(spec)
    return dim(s.scalars) + dim(s.gates)
