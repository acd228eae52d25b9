"""build: what kernels are compiled for, what names them, and how one is linked with and without threads."""

from __future__ import annotations

import json
import platform
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")

from gaq_compile.backends.tvm import build
from gaq_compile.backends.tvm.build import compile_both, compile_kernel, host_target
from gaq_compile.backends.tvm.emit import kernel_text, loop

# Who writes each element: threads of the pool take some of them each.
WHO = kernel_text(
    [("out", "n", "int32")], ["for i in T.parallel(n):", '    out[i] = T.call_extern("int32", "gettid")']
)
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no linker")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    host_target()  # this machine's facts need not be found again
    monkeypatch.setenv("GAQ_CACHE_DIR", str(tmp_path))
    for known in (compile_kernel, compile_both, build._alone):
        known.cache_clear()
    return tmp_path / "kernels"


def test_one_of_them_stays_on_the_calling_thread(own_cache: Path) -> None:
    shared, alone = compile_both(WHO, host_target())
    for n in (0, 1, 3, 1000):
        out = torch.full((n,), -1, dtype=torch.int32)
        alone(out)
        assert set(out.tolist()) <= {threading.get_native_id()}
        shared(out)
        assert -1 not in out


def test_a_kernel_is_compiled_once_and_then_found(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    true = build.build_executable
    monkeypatch.setattr(build, "build_executable", lambda *a: compiled.append(a[0]) or true(*a))
    first = compile_both(WHO, host_target())
    assert compiled == [WHO] and first[0] is not first[1]
    assert compile_both(WHO, host_target()) is first
    compile_both.cache_clear()
    compile_both(WHO, host_target())
    compile_kernel(WHO, host_target())  # the first of them is the kernel as it is
    assert compiled == [WHO]
    for library in own_cache.glob("*-alone-*.so"):
        library.unlink()
    compile_both.cache_clear()
    out = torch.zeros(7, dtype=torch.int32)
    compile_both(WHO, host_target())[1](out)
    assert compiled == [WHO, WHO] and set(out.tolist()) == {threading.get_native_id()}


def test_without_a_linker_both_are_the_kernel(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    for function in compile_both(WHO, host_target()):
        out: Any = torch.zeros(5, dtype=torch.int32)
        function(out)
        assert 0 not in out
    assert not list(own_cache.glob("*.so"))


_X86 = {"kind": "llvm", "mcpu": "znver4", "mtriple": "x86_64-linux-gnu"}


def test_no_gathers_and_scatters_on_x86() -> None:
    columns = [f"y[(b * 16 + r) * 44 + {c}] = x[{c} * 16 + r] + x[r * 44 + {c}]" for c in range(8)]
    body = loop("b in T.serial(n // 704)", loop("r in T.serial(16)", columns))
    text = kernel_text([("x", "m", "float32"), ("y", "n", "float32")], body)
    made = build.build_executable(text, json.dumps(_X86))
    code = made.mod.imports[0].inspect_source("asm") if made.mod.imports else made.mod.inspect_source("asm")
    assert "vmovss" in code or "vmovups" in code
    assert "vscatter" not in code and "vgather" not in code


def test_other_processors_are_not_asked() -> None:
    assert build._tuned_target(json.dumps(_X86))["mattr"] == build._TUNING
    own = json.dumps(_X86 | {"mattr": ["+avx512f"]})
    assert build._tuned_target(own)["mattr"] == ["+avx512f", *build._TUNING]
    for other in ({"kind": "llvm", "mtriple": "aarch64-linux-gnu"}, {"kind": "cuda", "arch": "sm_80"}):
        assert build._tuned_target(json.dumps(other)) == other


def test_what_llvm_is_asked_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    target = json.dumps({"kind": "llvm", "mcpu": "znver4"})
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    before = build.kernel_key("text", target)
    monkeypatch.setattr(build, "_TUNING", [])
    assert build.kernel_key("text", target) != before
