"""Kernel text -> machine code: compile TVMScript with TVM's LLVM, once per machine.

Kernels are generated as readable TVMScript text. The text, the target and TVM's version are the
whole identity of a kernel, so their hash names its compiled library in the disk cache
(``$GAQ_CACHE_DIR``, by default ``~/.cache/gaq_compile``); a second call, in this process or in a
later one, compiles nothing. A cached kernel needs only TVM's small runtime library, not the
compiler: it is loaded through ``tvm_ffi``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...errors import LoweringError, MissingPackageError
from .reader import read_kernel

ENTRY = "main"  # the name of every generated kernel function
_IDLE_PASSES = ["s_tir.CompactBufferAllocation"]  # our buffers are as small as can be; two thirds of a build
# Of loops that read or write every n-th element LLVM makes gathers and scatters, microcode that takes several
# times as long as so many scalar loads and stores (a group that packs 44 columns: 1.6 ms, not 0.6).
_TUNING = ["+prefer-no-gather", "+prefer-no-scatter"]


def cache_dir() -> Path:
    """Where compiled kernels are kept (created on first use)."""
    root = os.environ.get("GAQ_CACHE_DIR") or Path.home() / ".cache" / "gaq_compile"
    path = Path(root) / "kernels"
    path.mkdir(parents=True, exist_ok=True)
    return path


@lru_cache(maxsize=1)
def tvm_version() -> str:
    """The installed TVM's version.

    Raises:
        MissingPackageError: if TVM is not installed.
    """
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackageError("TVM is not installed", fix="pip install 'gaq-compile[tvm]'") from None


@lru_cache(maxsize=1)
def host_target() -> str:
    """This machine's CPU as a TVM target in JSON (kind, mcpu)."""
    cached = cache_dir() / f"host-{_host_key()}.json"
    if cached.exists():
        return cached.read_text()
    tvm = import_tvm()
    cpu = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    text = json.dumps({"kind": "llvm", "mcpu": cpu}, sort_keys=True)
    _write_atomically(cached, text.encode())
    return text


def import_tvm() -> Any:
    """The ``tvm`` package, imported only when something has to be compiled."""
    tvm_version()
    _load_runtime()
    import tvm

    return tvm


@lru_cache(maxsize=4096)
def compile_kernel(source: str, target: str) -> Any:
    """Compile kernel text and return the callable ``main`` function.

    Args:
        source: a TVMScript module defining ``main`` (see :func:`module_text`).
        target: a TVM target in JSON, e.g. from :func:`host_target`.

    Returns:
        A function that takes torch tensors (zero-copy) and Python ints.

    Raises:
        LoweringError: if TVM rejects the kernel.
    """
    path = cache_dir() / f"{kernel_key(source, target)}.so"
    if not path.exists():
        made = _compiled(source, target, {path: ()})
        if made is not None:
            return made
    return _load_library(path)


@lru_cache(maxsize=4096)
def compile_both(source: str, target: str) -> tuple[Any, Any]:
    """A kernel with parallel loops, compiled once: as it is, and with all loops on the calling thread.

    Arguments, errors and the two functions are :func:`compile_kernel`'s.
    """
    path = cache_dir() / f"{kernel_key(source, target)}.so"
    alone = path.with_name(f"{path.stem}-alone-{_identity(_ALONE)[:8]}.so")
    if not (path.exists() and alone.exists()):
        made = _compiled(source, target, {path: (), alone: (_alone(),)})
        if made is not None:  # threads for few rows are slower, but right
            return made, made
    return _load_library(path), _load_library(alone)


# A kernel starts its parallel loops through this pointer, which is set to TVM's thread pool where a library
# shows it. One that is hidden stays as it is here: the body is called once, with all that there is to do.
_ALONE = """
struct Pool { void* barrier; int tasks; };
extern "C" {
static int alone(int (*body)(int, Pool*, void*), void* data, int) {
    Pool pool = {nullptr, 1};
    return body(0, &pool, data);
}
__attribute__((visibility("hidden"))) void* __TVMBackendParallelLaunch = reinterpret_cast<void*>(&alone);
}
"""


@lru_cache(maxsize=1)
def _alone() -> Path:
    """What kernels that stay on the calling thread are linked with."""
    path = cache_dir() / f"alone-{_identity(_ALONE)[:8]}.o"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            compiler = ["g++", "-x", "c++", "-O2", "-fPIC", "-c", "-", "-o", str(made)]
            subprocess.run(compiler, input=_ALONE, text=True, check=True, capture_output=True)
            os.replace(made, path)
    return path


def _compiled(source: str, target: str, libraries: Mapping[Path, tuple[Path, ...]]) -> Any | None:
    """Compile a kernel once and link it to libraries, each with other objects.

    Returns:
        The kernel's function, where there is no linker and it can only be kept in memory.
    """
    executable = build_executable(source, target)
    if shutil.which("g++") is None:
        return executable.jit()[ENTRY]

    def link(_: str, objects: list[str], **__: Any) -> None:
        for path, more in libraries.items():
            made = Path(scratch) / path.name
            # The process has the C library; looking it up would take most of the linker's time.
            create_shared(str(made), [*objects, *map(str, more)], options=["-nostdlib"])
            os.replace(made, path)

    from tvm.support.cc import create_shared

    with tempfile.TemporaryDirectory(dir=next(iter(libraries)).parent) as scratch:
        executable.export_library(str(Path(scratch) / "kernel.so"), fcompile=link)
    return None


def kernel_argument(value: torch.Tensor) -> Any:
    """A constant in the form that kernels take fastest: a torch tensor costs five times as much per call."""
    _load_runtime()
    import tvm_ffi

    return tvm_ffi.from_dlpack(value)


def kernel_key(source: str, target: str) -> str:
    """The hash that names a compiled kernel: text, target, TVM's version and how it is used."""
    return _identity("\0".join((source, target, tvm_version(), *_IDLE_PASSES, *_tuning(target))))


def _identity(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def build_executable(source: str, target: str, config: dict[str, Any] | None = None) -> Any:
    """Read and compile kernel text to a TVM executable, for any target TVM can generate.

    Args:
        source: kernel text.
        target: a TVM target in JSON.
        config: of TVM's passes; by default, and without the passes that do nothing for ours, a CPU's.
    """
    tvm = import_tvm()
    disabled = _IDLE_PASSES if config is None else None
    try:
        with tvm.transform.PassContext(config=config, disabled_pass=disabled):
            return tvm.compile(_module(source), target=tvm.target.Target(_tuned_target(target)))
    except (tvm.error.InternalError, tvm.error.DiagnosticError, ValueError, TypeError, RuntimeError) as error:
        raise LoweringError(
            f"TVM rejected a generated kernel: {error}",
            where=f"target {target}",
            fix="report this kernel; quantize(..., backend='reference') runs without it",
        ) from error


def _tuned_target(target: str) -> dict[str, Any]:
    """A target with what LLVM is to avoid on it; what the target is called by stays as it is."""
    described: dict[str, Any] = json.loads(target)
    tuning = _tuning(target)
    return described | {"mattr": [*described.get("mattr", ()), *tuning]} if tuning else described


def _tuning(target: str) -> list[str]:
    """``_TUNING`` for x86 processors; other compilers do not know the names."""
    described = json.loads(target)
    machine = described.get("mtriple") or platform.machine()
    x86 = machine.lower().startswith(("x86", "amd64", "i386", "i686"))
    return _TUNING if described.get("kind") == "llvm" and x86 else []


def _module(source: str) -> Any:
    """The IR of kernel text, by the fast reader if it can be."""
    import tvm
    from tvm.script import ir as I  # noqa: N812 - TVMScript's own names
    from tvm.script import tirx as T  # noqa: N812

    try:
        return read_kernel(source)
    except Exception:  # noqa: BLE001 - whatever it is: the parser takes the text or says which line is wrong
        return tvm.script.from_source(source, extra_vars={"I": I, "T": T})


def module_text(signature: str, body: str, *, preamble: str = "") -> str:
    """Wrap a kernel body (already indented by 8 spaces) into a TVMScript module.

    Args:
        signature: the parameters of ``main``, e.g. ``"x: T.handle, n: T.int32"``.
        body: the statements of ``main``.
        preamble: statements before the body, e.g. ``match_buffer`` lines.
    """
    return (
        "@I.ir_module\n"
        "class Kernel:\n"
        "    @T.prim_func(s_tir=True)\n"
        f"    def {ENTRY}({signature}):\n"
        '        T.func_attr({"tirx.noalias": True})\n'
        f"{preamble}{body}"
    )


@lru_cache(maxsize=1)
def _load_runtime() -> None:
    """Make the symbols of TVM's runtime (thread pool) visible to cached kernels."""
    # By itself TVM's pool takes half of an x86 machine's cores; it should use what torch uses.
    os.environ.setdefault("TVM_NUM_THREADS", str(torch.get_num_threads()))
    import tvm_ffi  # noqa: F401 - its library must be loaded before the runtime that links to it

    spec = importlib.util.find_spec("tvm")  # locates the package without importing it
    if spec is None or spec.origin is None:
        tvm_version()
        raise MissingPackageError("TVM's package cannot be located", fix="reinstall apache-tvm")
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)


def _load_library(path: Path) -> Any:
    import tvm_ffi

    _load_runtime()
    return tvm_ffi.load_module(str(path))[ENTRY]


def _host_key() -> str:
    """A short key of this machine's CPU, so that a shared cache never mixes machines."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        facts = [line for line in text.splitlines() if line.startswith(("model", "flags", "vendor"))]
    except OSError:
        facts = [platform.processor(), platform.machine()]
    return hashlib.sha256("\n".join([*facts, tvm_version()]).encode()).hexdigest()[:16]


def _write_atomically(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
