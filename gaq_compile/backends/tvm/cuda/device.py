"""A GPU as the kernels see it: something that turns kernel text into a function of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....errors import ConfigError, LoweringError
from ..launch import MAX_ELEMENTS
from .driver import gpu_architecture, launcher
from .source import cuda_target, device_function, machine_code

Grid = tuple[int, int]
Kernel = Callable[[Grid, Mapping[str, Any]], None]
"""Runs blocks (along x, along y) on arguments by name; a grid without blocks does nothing."""

DEFAULT_ARCH = "sm_80"  # what is compiled for where there is no GPU to ask


@dataclass(frozen=True)
class Gpu:
    """NVIDIA GPUs of one architecture.

    Attributes:
        arch: e.g. ``"sm_90"``.
    """

    arch: str = DEFAULT_ARCH

    @property
    def target(self) -> str:
        """The TVM target in JSON."""
        return cuda_target(self.arch)

    def kernel(self, text: str) -> Kernel:
        """Compile kernel text; needs no GPU. The result raises a ``DeviceError`` where there is none.

        Raises:
            LoweringError: if TVM or nvcc rejects the kernel.
            MissingPackageError: if it has to be compiled and there is no nvcc.
        """
        function = device_function(text, self.arch)
        return checked(launcher(function, machine_code(function.source, self.arch).cubin))


def checked(kernel: Kernel) -> Kernel:
    """The kernel, refusing what its 32-bit indices cannot reach."""

    def run(grid: Grid, arguments: Mapping[str, Any]) -> None:
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.numel() > MAX_ELEMENTS:
                raise LoweringError(
                    f"{name} has {value.numel()} elements, and kernels count in 32 bits",
                    where="target cuda",
                    fix="evaluate fewer atoms at once",
                )
        if grid[0] > 0 and grid[1] > 0:
            kernel(grid, arguments)

    return run


def is_cuda(target: str | None) -> bool:
    """Whether a target, in JSON or in short, names a GPU."""
    if target is None:
        return False
    return target.partition(":")[0] == "cuda" or (
        target.lstrip().startswith("{") and json.loads(target).get("kind") == "cuda"
    )


def gpu(target: str) -> Gpu:
    """The GPU of a target: ``"cuda"`` (the one of this machine), ``"cuda:sm_89"``, or a TVM target in JSON.

    Raises:
        ConfigError: for an architecture that is not written ``sm_NN``, or that has no dp4a.
    """
    arch = json.loads(target).get("arch", "") if target.lstrip().startswith("{") else target.partition(":")[2]
    arch = arch or gpu_architecture() or DEFAULT_ARCH
    digits = arch.removeprefix("sm_").rstrip("af")
    if not arch.startswith("sm_") or not digits.isdigit() or int(digits) < 61:
        raise ConfigError(
            f"unknown GPU architecture {arch!r}", where=target, fix='"cuda", or "cuda:sm_80" and newer'
        )
    return Gpu(arch)


def blocks(items: int, per_block: int) -> int:
    """How many blocks hold so many items."""
    return -(-items // per_block)


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A new tensor beside another."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def on_device(constants: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """The constants beside a tensor; moved once, in place, so that later calls find them there."""
    for name, value in constants.items():
        if value.device != like.device:
            constants[name] = value.to(like.device)
    return constants
