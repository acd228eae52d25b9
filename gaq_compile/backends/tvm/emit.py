"""Small pieces of TVMScript text that the kernel generators share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence

from .build import module_text

# fmt: off
_AVX512 = (
    "znver4", "znver5", "skylake-avx512", "skx", "cascadelake", "cooperlake", "cannonlake", "icelake",
    "rocketlake", "tigerlake", "sapphirerapids", "emeraldrapids", "graniterapids", "diamondrapids",
    "x86-64-v4", "knl", "knm",
)
_AVX2 = (
    "znver", "haswell", "broadwell", "skylake", "alderlake", "raptorlake", "meteorlake", "arrowlake",
    "lunarlake", "sierraforest", "gracemont", "core-avx2", "bdver4", "x86-64-v3",
)
# fmt: on


def vector_lanes(target: str) -> int:
    """How many float32 one vector register of ``target`` (JSON) holds: 16, 8 or 4.

    Read off the CPU's name, not asked of LLVM, so that a cached kernel runs without the compiler.
    A wrong guess costs speed only: every lane count compiles everywhere.
    """
    described = json.loads(target)
    cpu = str(described.get("mcpu", ""))
    features = " ".join(described.get("mattr", ()))
    if cpu.startswith(_AVX512) or "+avx512f" in features:
        return 16
    if cpu.startswith(_AVX2) or "+avx2" in features:
        return 8
    return 4


def block_lanes(channels: int, lanes: int) -> int:
    """The largest power of two that divides ``channels`` and is at most ``lanes``."""
    return min(lanes, channels & -channels)


def vector(buffer: str, index: str, lanes: int, row: str = "") -> str:
    """``lanes`` consecutive elements of ``buffer`` (of row ``row`` where it has rows)."""
    place = index if lanes == 1 else f"T.ramp({index}, 1, {lanes})"
    return f"{buffer}[{row}, {place}]" if row else f"{buffer}[{place}]"


def prefetch(buffer: str, index: str, row: str) -> str:
    """Ask for the cache line of one element, into the second-level cache."""
    return _asked(f"{buffer}[{row}, {index}]", write=0, level=2)


def ask_to_write(place: str) -> str:
    """Ask for the cache line of an element that will be written, into the nearest cache.

    The element need not exist: asking never fails.
    """
    return _asked(place, write=1, level=3)


def _asked(place: str, write: int, level: int) -> str:
    return f'T.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of({place}), {write}, {level}, 1))'


def splat(scalar: str, lanes: int) -> str:
    """A scalar expression in every lane."""
    return scalar if lanes == 1 else f"T.broadcast({scalar}, {lanes})"


def many(dtype: str, lanes: int) -> str:
    """The type of so many values side by side."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def literal(value: float) -> str:
    """A float32 constant; infinities and NaN by their bits, which have no other text."""
    if math.isfinite(value):
        return f"T.float32({value!r})"
    bits = 0x7FC00000 if math.isnan(value) else 0x7F800000 if value > 0 else -0x800000
    return f'T.reinterpret("float32", T.int32({bits}))'


def signed_sum(terms: Sequence[tuple[int, str]], start: str = "") -> str:
    """``start + t0 - t1 ...``, left to right, so that LLVM fuses each product into its sum."""
    text = start
    for sign, term in terms:
        if text:
            text += f" {'+' if sign > 0 else '-'} {term}"
        else:
            text = term if sign > 0 else f"{literal(0.0)} - {term}"
    return text


def loop(header: str, lines: Iterable[str]) -> list[str]:
    """A ``for`` statement with its body indented."""
    return [f"for {header}:", *("    " + line for line in lines)]


def local(name: str, size: int, dtype: str = "float32") -> str:
    """A small array of a kernel's own, on the stack: on CPUs only scope "global" and less than 1 KB are."""
    return f'{name} = T.alloc_buffer(({size},), "{dtype}", scope="global")'


def kernel_text(buffers: Sequence[tuple[str, str, str]], body: Sequence[str]) -> str:
    """A module whose ``main`` takes ``buffers`` (name, shape, dtype) and runs ``body``.

    Names in a shape that are not numbers are sizes that the call decides. Buffers are taken at
    their element's alignment: a view of a torch tensor may start anywhere.
    """
    symbols: dict[str, None] = {}
    matches = []
    for name, shape, dtype in buffers:
        symbols.update({s: None for s in shape.split(", ") if not s.isdigit()})
        align = 2 if dtype == "float16" else 4
        matches.append(f'{name} = T.match_buffer({name}_h, ({shape},), "{dtype}", align={align})')
    preamble = [*(f"{symbol} = T.int32()" for symbol in symbols), *matches]
    text = ["".join(("        ", line, "\n")) for line in (*preamble, *body)]
    signature = ", ".join(f"{name}_h: T.handle" for name, _, _ in buffers)
    return module_text(signature, "".join(text))
