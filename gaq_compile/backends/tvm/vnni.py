"""What a processor multiplies integers with: vector lanes and the dot-product instruction of a target.

Four ways to form ``s32 += a * w``, the best that the target has:

``vnni``   ``vpdpbusd`` (u8 x s8, four products per lane) and ``vpdpwssd`` (s16 x s16, two per lane);
``madd``   ``pmaddwd`` (s16 x s16, two products per lane) and an addition;
``plain``  widening multiplications in s32, any processor;
``dp4a``   a GPU's s8 x s8, four products per thread; an s16 is taken as its high and its low byte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from .build import import_tvm

# Processors known by name, so that a cached kernel is found without importing the compiler.
_INTEL_VNNI = "cascadelake cooperlake icelake-client icelake-server rocketlake tigerlake sapphirerapids"
_AVX512_VNNI = ("znver4", "znver5", "emeraldrapids", "graniterapids", *_INTEL_VNNI.split())
_AVX512 = ("skylake-avx512", "cannonlake", "x86-64-v4")
_AVX_VNNI = ("alderlake", "raptorlake", "meteorlake", "arrowlake", "lunarlake", "sierraforest")
_AVX2 = ("haswell", "broadwell", "skylake", "znver1", "znver2", "znver3", "x86-64-v3")
_PLAIN = ("core2", "nehalem", "x86-64", "x86-64-v2", "generic")


@dataclass(frozen=True)
class VectorUnit:
    """A target's vector arithmetic.

    Attributes:
        lanes: 32-bit elements per vector register.
        registers: vector registers.
        dot: ``"vnni"``, ``"madd"``, ``"plain"`` or ``"dp4a"``, the integer dot product (module docstring).
    """

    lanes: int
    registers: int
    dot: str

    def step(self, operand: str) -> int:
        """Neighbouring input channels in one 32-bit lane, for operand ``f32``, ``s8`` or ``s16``."""
        if operand == "f32" or self.dot == "plain":
            return 1
        if self.dot == "dp4a":
            return 4
        return 4 if self.dot == "vnni" and operand == "s8" else 2

    def storage(self, operand: str) -> str:
        """The dtype that the quantized operand has in the tile buffer."""
        if operand == "f32":
            return "float32"
        if operand == "s16" or self.dot == "madd":
            return "int16"
        return "uint8" if self.dot == "vnni" else "int8"

    def offset(self, operand: str) -> int:
        """What is added to the integers in the tile buffer: vpdpbusd takes them unsigned.

        dp4a takes the low byte of an s16, 0 to 255, signed: 128 less.
        """
        if self.dot == "dp4a":
            return -128 if operand == "s16" else 0
        return 128 if operand == "s8" and self.dot == "vnni" else 0

    def accumulate(self, operand: str, acc: str, a: str, w: str) -> str:
        """TVMScript of ``acc + a . w``, one vector of s32 (or f32) sums."""
        if operand == "f32" or self.dot == "plain":
            return f"{acc} + {a} * {w}"
        bits, dtype = 32 * self.lanes, f'dtype="int32x{self.lanes}"'
        if self.dot == "madd":
            name = {512: "avx512.pmaddw.d.512", 256: "avx2.pmadd.wd", 128: "sse2.pmadd.wd"}[bits]
            return f"{acc} + {_intrinsic(name)}, {a}, {w}, {dtype})"
        name = f"avx512.{'vpdpbusd' if operand == 's8' else 'vpdpwssd'}.{bits}"
        return f"{_intrinsic(name)}, {acc}, {a}, {w}, {dtype})"


def _intrinsic(name: str) -> str:
    return f'T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id("llvm.x86.{name}")'


@lru_cache(maxsize=64)
def vector_unit(target: str) -> VectorUnit:
    """The vector unit of a TVM target in JSON (unknown processors are asked of TVM's LLVM)."""
    description = json.loads(target)
    if description.get("kind") == "cuda":
        return WARP
    cpu, extra = description.get("mcpu", ""), tuple(description.get("mattr", ()))
    if any(arm in description.get("mtriple", "") for arm in ("aarch64", "arm64")):
        return VectorUnit(4, 32, "plain")
    if not extra:
        for names, unit in _KNOWN:
            if cpu in names:
                return unit
    return _ask_llvm(target)


WARP = VectorUnit(32, 255, "dp4a")
"""A GPU's warp: one output channel per thread."""

_KNOWN = (
    (_AVX512_VNNI, VectorUnit(16, 32, "vnni")),
    (_AVX512, VectorUnit(16, 32, "madd")),
    (_AVX_VNNI, VectorUnit(8, 16, "vnni")),
    (_AVX2, VectorUnit(8, 16, "madd")),
    (_PLAIN, VectorUnit(4, 16, "plain")),
)


def _ask_llvm(target: str) -> VectorUnit:
    tvm = import_tvm()
    described = tvm.target.Target(json.loads(target))
    has = tvm.get_global_func("target.target_has_feature")

    def every(*features: str) -> bool:
        return all(bool(has(feature, described)) for feature in features)

    if every("avx512vnni", "avx512bw", "avx512vl"):
        return VectorUnit(16, 32, "vnni")
    if every("avx512bw"):
        return VectorUnit(16, 32, "madd")
    if every("avx2"):
        return VectorUnit(8, 16, "vnni" if every("avxvnni") else "madd")
    return VectorUnit(4, 16, "plain")


def has_vnni(target: str) -> bool:
    """Whether ``target`` has s8 and s16 dot-product instructions (AVX512-VNNI or AVX-VNNI)."""
    return vector_unit(target).dot == "vnni"
