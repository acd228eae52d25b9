"""Generated CUDA kernels on the CPU, so that what they compute is tested where there is no GPU.

The CUDA C of a kernel is compiled with g++ behind ``cuda_emulator.h``, which gives the names that
kernels use their CUDA meaning, and runs over all blocks and threads of the grid that a GPU would be
launched with. :class:`EmulatedGpu` stands in for :class:`~gaq_compile.backends.tvm.cuda.device.Gpu`: all
else, from packed weights to grids and outputs, is what runs on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gaq_compile.backends.tvm.build import cache_dir
from gaq_compile.backends.tvm.cuda.device import Gpu, Kernel, checked
from gaq_compile.backends.tvm.cuda.source import DeviceFunction, device_function

HEADER = Path(__file__).with_name("cuda_emulator.h")
_SCALARS = {"int": ctypes.c_int32, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
_DTYPES = {
    "float*": (torch.float32,),
    "int*": (torch.int32,),
    "int64_t*": (torch.int64,),
    "signedchar*": (torch.int8,),
    "uchar*": (torch.uint8,),
    "short*": (torch.int16,),
}
_BARRIERS = ("__syncthreads", "__syncwarp", "__shfl")


@dataclass(frozen=True)
class EmulatedGpu(Gpu):
    """A GPU whose kernels take CPU tensors."""

    def kernel(self, text: str) -> Kernel:
        return checked(emulate(device_function(text, self.arch)))


@lru_cache(maxsize=1024)
def emulate(function: DeviceFunction) -> Kernel:
    """``launch(grid, arguments by name)`` on CPU tensors."""
    run = _library(_program(function))["run"]

    def launch(grid: tuple[int, int], arguments: Mapping[str, Any]) -> None:
        values = [_value(p.type, p.name, arguments[p.name]) for p in function.parameters]
        places = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        assert run(places, *grid) == 1, "a thread ended, or went another way, while others waited for it"

    return launch


def _value(kind: str, name: str, argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return _SCALARS[kind](argument)
    assert argument.is_contiguous() and argument.device.type == "cpu", name
    assert argument.dtype in _DTYPES[kind], (name, kind, argument.dtype)
    return ctypes.c_void_p(argument.data_ptr())


def _program(function: DeviceFunction) -> str:
    """The kernel, and a function that calls it with what an array of pointers points to."""
    source = function.source.replace("__shared__ alignas(64)", "alignas(64) __shared__")
    source = source.replace('extern "C" __global__', "__global__")
    arguments = ", ".join(
        f"*({p.type.replace('signedchar', 'signed char')}*)arguments[{k}]"
        for k, p in enumerate(function.parameters)
    )
    barriers = int(any(name in source for name in _BARRIERS))
    return f"""#include "{HEADER}"
{source}
static void** arguments;
static void call() {{ main_kernel({arguments}); }}
extern "C" int run(void** given, int blocks_x, int blocks_y) {{
  arguments = given;
  return emulated::run(call, blocks_x, blocks_y, {function.threads}, {barriers});
}}
"""


def _library(program: str) -> Any:
    key = hashlib.sha256((program + HEADER.read_text()).encode()).hexdigest()[:32]
    path = cache_dir() / f"{key}.emulated.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made, source = Path(folder) / "kernel.so", Path(folder) / "kernel.cpp"
            source.write_text(program)
            flags = [
                "-O1",
                "-w",
                "-std=c++17",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
            ]
            subprocess.run(["g++", *flags, "-o", str(made), str(source)], check=True)
            os.replace(made, path)
    return ctypes.CDLL(str(path))
