"""build: what kernels are compiled for, and what names them."""

from __future__ import annotations

import json
import platform

import pytest

pytest.importorskip("tvm")

from gaq_compile.backends.tvm import build
from gaq_compile.backends.tvm.emit import kernel_text, loop

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
