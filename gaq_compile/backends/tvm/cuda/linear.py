"""Equivariant linears on GPUs: the CPU kernels' problems and packed weights, another text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dense_plan import DensePlan, LinearProblem, make_plan
from ..linear import Given, check, check_input, packed
from .device import Gpu, Kernel, blocks, empty, on_device
from .linear_kernel import jobs, linear_text, rows_per_block


@dataclass(frozen=True)
class LinearKernel:
    """A lowered linear: call it with x (N, dim_in) float32, get y (N, dim_out) float32.

    Attributes:
        plan: what the kernel's text is made from.
        kernel: the compiled kernel.
        constants: by name; they move to the device of the first x they meet.
    """

    plan: DensePlan
    kernel: Kernel
    constants: dict[str, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        check_input(x, self.plan.dim_in, self.plan)
        rows = x.shape[0]
        y = empty(x, rows, self.plan.dim_out)
        if self.plan.dim_out:
            grid = (blocks(rows, rows_per_block(self.plan)), len(jobs(self.plan)))
            self.kernel(grid, {"x": x.contiguous(), "y": y, "m": rows, **on_device(self.constants, x)})
        return y

    @property
    def weight_bytes(self) -> int:
        """Bytes of all packed constants."""
        twice = "words" if "weight" in self.constants else ""
        held = (t for name, t in self.constants.items() if name != twice)
        return sum(t.numel() * t.element_size() for t in held)


def lower_linear(
    problem: LinearProblem,
    weight: Tensor,
    weight_scale: Tensor | None,
    x_scale: Tensor | None,
    bias: Tensor | None,
    gpu: Gpu,
) -> LinearKernel:
    """Pack weights and return the function ``x -> y``; tensors and errors as the CPU's ``lower_linear``.

    Args:
        problem: what to compute.
        weight, weight_scale, x_scale, bias: as :func:`..linear.lower_linear` takes them.
        gpu: what to compile for.
    """
    given = Given(weight, weight_scale, x_scale, bias)
    check(problem, given)
    plan = make_plan(problem, gpu.target)
    constants = packed(plan, given)
    if problem.weight == "s4":
        constants["weight"] = constants["weight"] ^ 0x88  # code + 8 to two's complement
        constants["sums"] = constants["sums"] * 16  # of codes that are 16 times as large
    if any(o.kind != "f32" for o in plan.operands):
        constants["words"] = constants["weight"].view(torch.int32)
    if all(o.kind != "f32" for o in plan.operands):
        del constants["weight"]
    held = {name: value for name, value in constants.items() if value.numel()}
    return LinearKernel(plan, gpu.kernel(linear_text(plan)), held)
