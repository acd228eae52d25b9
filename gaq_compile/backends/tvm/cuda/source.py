"""Kernel text -> CUDA C -> machine code, each once per machine.

TVM turns TVMScript into one ``__global__`` function; ``nvcc`` turns that into a cubin for one
architecture. Both lie in the disk cache under the hash of what they were made from, so that a
saved potential needs neither TVM's compiler nor ``nvcc`` where its kernels have been compiled
before. The function's parameters are found by their names: TVM sorts them as it likes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ....errors import LoweringError, MissingPackageError
from ..build import build_executable, cache_dir, kernel_key

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""What every kernel is compiled for in tests; others that nvcc knows work too."""

ENTRY = "main_kernel"  # what TVM calls the device part of "main"
_SIGNATURE = re.compile(
    r'extern "C" __global__ void __launch_bounds__\((\d+)[^)]*\) ' + ENTRY + r"\(([^)]*)\) \{"
)
_PREAMBLE = """\
#define uint unsigned int
#define uchar unsigned char
#include <cstdint>
#include <cstring>

template <typename T, typename S>
static __device__ __forceinline__ T bits_as(S value) {
  T found;
  memcpy(&found, &value, sizeof(T));
  return found;
}

"""
_FLAGS = ("-w", "-Xptxas", "-v")
_THREADS_AT_ONCE = 512  # of a multiprocessor, at least: 128 registers for each


@dataclass(frozen=True)
class Parameter:
    """One parameter of a device function: ``"float*"`` or ``"int"``, and its name in the kernel text."""

    name: str
    type: str

    @property
    def is_pointer(self) -> bool:
        return self.type.endswith("*")


@dataclass(frozen=True)
class DeviceFunction:
    """A kernel as CUDA C.

    Attributes:
        source: a whole translation unit that defines ``main_kernel``.
        parameters: of ``main_kernel``, in order.
        threads: per block, along x.
    """

    source: str
    parameters: tuple[Parameter, ...]
    threads: int


def cuda_target(arch: str) -> str:
    """The TVM target (JSON) of an architecture such as ``"sm_80"``; the host part is not used."""
    return json.dumps({"arch": arch, "host": {"kind": "llvm"}, "kind": "cuda"}, sort_keys=True)


@lru_cache(maxsize=4096)
def device_function(text: str, arch: str) -> DeviceFunction:
    """The CUDA C of kernel text.

    Args:
        text: a TVMScript module of one kernel, with all its work in thread bindings.
        arch: what TVM generates for, e.g. ``"sm_80"``.

    Raises:
        LoweringError: if TVM rejects the kernel, or makes anything but one device function of it.
    """
    path = cache_dir() / f"{kernel_key(text, cuda_target(arch))}.cu"
    if not path.exists():
        # Common subexpressions would be moved to the host, and become parameters without a known name.
        executable = build_executable(text, cuda_target(arch), {"tirx.disable_cse_tir": True})
        _write(path, executable.mod.imports[0].inspect_source().encode())
    return parsed(_plain(path.read_text()))


def _plain(source: str) -> str:
    """The generated function without TVM's preamble, which needs half of CUDA's headers.

    TVM reads the bits of a value through its address, which only variables have. It also leaves open
    how many blocks should run at once: ptxas then stops at 48 registers in some kernels, and spills.
    """

    def bounds(found: re.Match[str]) -> str:
        threads = int(found.group(1))
        return f"__launch_bounds__({threads}, {max(1, _THREADS_AT_ONCE // threads)})"

    body = re.sub(r"__launch_bounds__\((\d+)[^)]*\)", bounds, source[source.index('extern "C"') :])
    return _PREAMBLE + re.sub(r"\(\*\((float|int) \*\)\(&\(", r"(bits_as<\1>((", body)


def parsed(source: str) -> DeviceFunction:
    """Read the signature of a generated kernel.

    Raises:
        LoweringError: if there is not exactly one device function.
    """
    found = _SIGNATURE.findall(source)
    if len(found) != 1:
        raise LoweringError(f"expected one device function, found {len(found)}", fix="report this kernel")
    threads, text = found[0]
    pieces = (piece.replace("__restrict__", "").split() for piece in text.split(",") if piece.strip())
    parameters = tuple(Parameter(words[-1].removesuffix("_ptr"), "".join(words[:-1])) for words in pieces)
    return DeviceFunction(source, parameters, int(threads))


@dataclass(frozen=True)
class Machine:
    """Machine code of one kernel, and what the assembler says that it uses."""

    cubin: Path
    resources: str

    @property
    def registers(self) -> int:
        return int(_number(r"Used (\d+) registers", self.resources))

    @property
    def spilled_bytes(self) -> int:
        """Bytes that did not fit into registers, stores and loads together."""
        return sum(_number(rf"(\d+) bytes spill {kind}", self.resources) for kind in ("stores", "loads"))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise LoweringError("nvcc did not say what a kernel uses", where=pattern, fix="use nvcc 12 or newer")
    return int(found.group(1))


def machine_code(source: str, arch: str) -> Machine:
    """Compile CUDA C with nvcc, or find it in the cache.

    Args:
        source: of a :class:`DeviceFunction`.
        arch: e.g. ``"sm_90"``.

    Raises:
        MissingPackageError: if it is not in the cache and there is no nvcc.
        LoweringError: if nvcc rejects it.
    """
    key = hashlib.sha256("\0".join((source, arch, *_FLAGS)).encode()).hexdigest()[:32]
    cubin, report = cache_dir() / f"{key}.cubin", cache_dir() / f"{key}.ptxas"
    if not (cubin.exists() and report.exists()):
        said, code = _nvcc(source, arch, "cubin")
        _write(report, said.encode())
        _write(cubin, code)
    return Machine(cubin, report.read_text())


def ptx(source: str, arch: str) -> str:
    """The PTX of CUDA C, cached; errors as :func:`machine_code`."""
    path = cache_dir() / f"{hashlib.sha256(f'{source}|{arch}'.encode()).hexdigest()[:32]}.ptx"
    if not path.exists():
        _write(path, _nvcc(source, arch, "ptx")[1])
    return path.read_text()


def _nvcc(source: str, arch: str, kind: str) -> tuple[str, bytes]:
    """What nvcc said, and the file it made."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise MissingPackageError(
            "nvcc is not on the PATH, and this kernel has not been compiled here before",
            where=f"target cuda, {arch}",
            fix="install NVIDIA's CUDA toolkit (12.8 or newer for sm_120)",
        )
    with tempfile.TemporaryDirectory() as folder:
        made, given = Path(folder) / f"kernel.{kind}", Path(folder) / "kernel.cu"
        given.write_text(source)
        command = [nvcc, f"-{kind}", f"-arch={arch}", *_FLAGS, "-o", str(made), str(given)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise LoweringError(
                f"nvcc rejected a generated kernel: {answer.stderr.strip()[-500:]}",
                where=f"target cuda, {arch}",
                fix="report this kernel; quantize(..., backend='reference') runs without it",
            )
        return answer.stderr + answer.stdout, made.read_bytes()


def _write(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
