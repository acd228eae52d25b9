"""Cubins on a GPU, through CUDA's driver library.

The driver comes with every NVIDIA GPU's software and loads a cubin as it is: neither TVM's runtime
for CUDA nor a compiler is needed where kernels are in the cache. Kernels run on torch's current
stream, in the context that torch has made, on the tensors' own device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....errors import DeviceError
from .source import ENTRY, DeviceFunction

_SCALARS = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def gpu_architecture() -> str | None:
    """``"sm_NN"`` of this machine's GPU; None where torch finds none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def require_gpu() -> torch.device:
    """The GPU that potentials run on.

    Raises:
        DeviceError: if torch finds none.
    """
    if not torch.cuda.is_available():
        raise DeviceError(
            "these kernels are compiled for a GPU, and there is none that torch can use",
            where="target cuda",
            fix="run on a machine with an NVIDIA GPU and a torch build with CUDA, or leave out target='cuda'",
        )
    return torch.device("cuda", torch.cuda.current_device())


def launcher(function: DeviceFunction, cubin: Path) -> Callable[[tuple[int, int], Mapping[str, Any]], None]:
    """``launch(grid, arguments by name)``: the kernel on torch's current stream.

    Raises, when called:
        DeviceError: without a GPU, for tensors elsewhere, or if the driver refuses.
    """
    loaded: dict[int, ctypes.c_void_p] = {}

    def launch(grid: tuple[int, int], arguments: Mapping[str, Any]) -> None:
        device = require_gpu()
        values = [_value(p.type, p.name, arguments[p.name], device) for p in function.parameters]
        index = device.index or 0
        if index not in loaded:
            loaded[index] = _load(cubin)
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        size = (*grid, 1, function.threads, 1, 1)
        _call("cuLaunchKernel", loaded[index], *size, 0, stream, places, None)

    return launch


def _value(kind: str, name: str, argument: Any, device: torch.device) -> Any:
    if not isinstance(argument, Tensor):
        return _SCALARS[kind](argument)
    if argument.device != device:
        raise DeviceError(
            f"a kernel for {device} was given {name} on {argument.device}",
            where="target cuda",
            fix="move every tensor to the GPU first",
        )
    return ctypes.c_void_p(argument.data_ptr())


def _load(cubin: Path) -> ctypes.c_void_p:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), cubin.read_bytes())
    _call("cuModuleGetFunction", ctypes.byref(function), module, ENTRY.encode())
    return function


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        said = text.value.decode() if text.value else str(status)
        raise DeviceError(
            f"{name}: {said}", where="CUDA's driver", fix="check the GPU's architecture and its free memory"
        )


@lru_cache(maxsize=1)
def _driver() -> Any:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(
        "CUDA's driver library is not there", where="libcuda.so.1", fix="install the NVIDIA driver"
    )
