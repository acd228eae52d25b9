"""What the small kernels share: a loop over rows, and functions that vectorise.

A parallel region costs some 7 microseconds while the threads are awake and 40 when they sleep
(measured), more than a small molecule's whole gate. So a kernel with little to do runs on the
calling thread, and a larger one in parallel over blocks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .emit import literal, loop, many, splat
from .schedule import integers_from

LANES = 16  # channels handled at once; LLVM splits them on targets with narrower registers


@dataclass(frozen=True)
class RowSchedule:
    """The constants of a small kernel that tuning may change.

    Attributes:
        lanes: channels handled at once, at most.
        serial_work: floats touched below which threads cost more than they bring.
        block_work: floats touched per block of rows.
    """

    lanes: int = LANES
    serial_work: int = 16384
    block_work: int = 4096


UNTUNED = RowSchedule()


def row_schedule_from(fields: Mapping[str, Any]) -> RowSchedule:
    """A schedule from its fields in JSON.

    Raises:
        ValueError, TypeError, KeyError: if they make no schedule.
    """
    return integers_from(RowSchedule, fields, _is_sound)


def _is_sound(schedule: RowSchedule) -> bool:
    lanes = schedule.lanes in (1, 2, 4, 8, 16, 32, 64)
    return lanes and schedule.serial_work >= 0 and schedule.block_work >= 1


def row_loop(
    body: Sequence[str],
    work: int,
    *,
    step: int = 1,
    setup: Sequence[str] = (),
    once: bool = False,
    schedule: RowSchedule = UNTUNED,
) -> list[str]:
    """Run ``body`` for every row, or for every tile of ``step`` rows.

    Args:
        body: statements on row ``i``; for tiles on rows ``i`` to ``i + step - 1``, of which those
            from ``n`` on do not exist.
        work: floats read and written per row, which decides about threads and block sizes.
        step: rows per tile.
        setup: statements that come once for each block of rows: memory of the thread is not free.
        once: write the body once, for blocks in parallel, however few: a long one takes long to compile.
        schedule: when there are threads, and what one of them takes at a time.

    Returns:
        Statements that use the number of rows, ``n``.
    """
    serial = max(1, schedule.serial_work // max(1, work * step))
    block = max(1, schedule.block_work // max(1, work * step))
    tiles = "n" if step == 1 else f"((n + {step - 1}) // {step})"
    place = f" * {step}" if step > 1 else ""
    alone = loop(f"r in T.serial({tiles})", [f"i: T.let = r{place}", *body])
    inner = loop(
        f"r in T.serial(T.min({block}, {tiles} - b * {block}))",
        [f"i: T.let = (b * {block} + r){place}", *body],
    )
    shared = loop(f"b in T.parallel(({tiles} + {block - 1}) // {block})", [*setup, *inner])
    if once:
        return shared
    return [
        f"if {tiles} <= {serial}:",
        *("    " + line for line in (*setup, *alone)),
        "else:",
        *("    " + line for line in shared),
    ]


def tiled(count: int, lanes: int, body: Sequence[str]) -> list[str]:
    """``body`` for each tile ``t`` of ``lanes`` channels out of ``count``."""
    return loop(f"t in T.serial({count // lanes})", body)


def at(base: int, lanes: int) -> str:
    """The first element of channel tile ``t`` of what begins at ``base``."""
    return f"{base} + t * {lanes}"


# --- functions as polynomials -------------------------------------------------------------------
# LLVM turns a vector's exp into one library call per lane, which is some ten times slower.

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
_ROUND_BITS = 0x4B400000  # its float32 bits
_EXP_RANGE = (-87.3, 89.0)  # below: the smallest normal number; above: infinity
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_SIGMOID_RANGE = (-86.9, 87.0)  # where e^-x is a normal number
_EXP2 = (  # 2^f for |f| <= 1/2, to 2e-8
    1.534580224e-4, 1.339993090e-3, 9.618489072e-3, 5.550328642e-2, 2.402264625e-1, 6.931471825e-1, 1.0,
)  # fmt: skip
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_SMALL = 0.625
_TINY, _LARGEST, _SQRT_HALF = 1.1754943508222875e-38, 3.4028234663852886e38, 0.70710678118654752
_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_TWO_OVER_PI = 0.63661977236758134
_HALF_PI = (1.5703125, 4.837512969970703125e-4, 7.54978995489188216e-8)  # in parts, of which sums are exact
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_ERF_P = 0.3275911
_ERF_FAR = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_NEAR = tuple(
    1.1283791670955126 * (-1.0) ** k / (math.factorial(k) * (2 * k + 1)) for k in range(6, -1, -1)
)
_ATANH = tuple(1.0 / k for k in (15, 13, 11, 9, 7, 5, 3))


class Emitter:
    """Collects ``let`` statements on vectors of ``lanes`` floats.

    Args:
        lanes: floats per vector.
        prefix: begins every name, so that several emitters can share a scope.
        memory: gives a place in memory for a value that is used often. TVM's simplifier puts what
            names stand for into what uses them, which grows without bound along a chain; it
            does not do that with what is read from memory.
    """

    def __init__(self, lanes: int, prefix: str = "v", memory: Callable[[], str] | None = None) -> None:
        self.lanes, self.prefix, self.memory = lanes, prefix, memory
        self.lines: list[str] = []

    def let(self, expression: str) -> str:
        """Name an expression; returns the name."""
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name}: T.let = {expression}")
        return name

    def keep(self, expression: str) -> str:
        """Name an expression that is used often; in memory, if there is some."""
        if self.memory is None:
            return self.let(expression)
        place = self.memory()
        self.lines.append(f"{place} = {expression}")
        return place

    def number(self, value: float) -> str:
        """A constant in every lane."""
        return splat(literal(value), self.lanes)

    def at_least(self, bound: str, x: str) -> str:
        """The larger of both; the bound comes first: TVM's max returns its second operand for NaN."""
        return f"T.max({bound}, {x})"

    def at_most(self, bound: str, x: str) -> str:
        """The smaller of both; NaN where x is."""
        return f"T.min({bound}, {x})"

    def polynomial(self, x: str, coefficients: Sequence[float]) -> str:
        """Horner's rule, highest power first."""
        value = self.number(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.let(f"{value} * {x} + {self.number(coefficient)}")
        return value

    def exp(self, x: str) -> str:
        """e^x to 2e-7; 1e-38 far below, infinity from 88.37 on, NaN for NaN."""
        low, high = (self.number(bound) for bound in _EXP_RANGE)
        clamped = self.keep(self.at_most(high, self.at_least(low, x)))
        shifted = self.let(f"{clamped} * {self.number(_LOG2E)} + {self.number(_ROUND)}")
        # Read back from the bits: TVM would simplify the float (a + c) - c to a.
        bits = f'T.reinterpret("{self._type("int32")}", {shifted})'
        n = self.let(f"{bits} - {self._int(_ROUND_BITS)}")
        k = self.let(f'T.Cast("{self._type("float32")}", {n})')
        part = self.let(f"{clamped} - {k} * {self.number(_LN2_HIGH)}")
        r = self.keep(f"{part} - {k} * {self.number(_LN2_LOW)}")
        p = self.polynomial(r, _EXP)
        mantissa = self.let(f"{p} * {r} * {r} + {r} + {self.number(1.0)}")
        exponent = f"T.shift_left({n} + {self._int(127)}, {self._int(23)})"
        return self.let(f'{mantissa} * T.reinterpret("{self._type("float32")}", {exponent})')

    def _type(self, scalar: str) -> str:
        return many(scalar, self.lanes)

    def _int(self, value: int) -> str:
        return splat(f"T.int32({value})", self.lanes)

    def sigmoid(self, x: str) -> str:
        """1 / (1 + e^-x) to 3e-7 of 1; 0 far below, NaN for NaN."""
        return self.let(f"{self.number(1.0)} / {self.one_and_exp(x)}")

    def silu(self, x: str) -> str:
        """x / (1 + e^-x)."""
        return self.let(f"{x} / {self.one_and_exp(x)}")

    def one_and_exp(self, x: str) -> str:
        """1 + e^-x, infinity far below, in two thirds of the time of :meth:`exp`, which is for any purpose.

        The exponent is that of one product, x * log2(e): its error, |x| / 10^7, is small beside 1, or the
        sum is large.
        """
        least, most = (self.number(bound) for bound in _SIGMOID_RANGE)
        scaled = f"{self.keep(self.at_most(most, x))} * {self.number(-_LOG2E)}"
        n = self.keep(f"T.nearbyint({scaled})")
        p = self.keep(self.polynomial(self.keep(f"{scaled} - {n}"), _EXP2))
        exponent = f'T.shift_left(T.Cast("{self._type("int32")}", {n}), {self._int(23)})'
        bits = f'T.reinterpret("{self._type("int32")}", {p}) + {exponent}'
        total = self.keep(f'{self.number(1.0)} + T.reinterpret("{self._type("float32")}", {bits})')
        return self.let(f"T.Select({x} < {least}, {self.number(math.inf)}, {total})")

    def softplus(self, x: str) -> str:
        """log(1 + e^x) = max(x, 0) + 2 atanh(t / (2 + t)), t = e^-|x|."""
        zero = self.number(0.0)
        t = self.exp(self.let(f"{zero} - T.fabs({x})"))
        t = t if self.memory is None else self.keep(t)
        z = self.keep(f"{t} / ({t} + {self.number(2.0)})")
        p = self.polynomial(self.keep(f"{z} * {z}"), (*_ATANH, 1.0))
        return self.let(f"{self.at_least(zero, x)} + {self.number(2.0)} * {z} * {p}")

    def log(self, x: str) -> str:
        """Natural logarithm to 1e-7; -infinity of 0, NaN below. Subnormal numbers count as 1.2e-38."""
        x = self.keep(x)
        bits = self.let(f'T.reinterpret("{self._type("int32")}", T.max({self.number(_TINY)}, {x}))')
        exponent = self.let(f"T.shift_right({bits}, {self._int(23)}) - {self._int(126)}")
        low = f"T.bitwise_or(T.bitwise_and({bits}, {self._int(0x007FFFFF)}), {self._int(0x3F000000)})"
        half = self.keep(f'T.reinterpret("{self._type("float32")}", {low})')  # in [1/2, 1)
        one, zero = self.number(1.0), self.number(0.0)
        small = self.keep(f"T.Select({half} < {self.number(_SQRT_HALF)}, {one}, {zero})")
        e = self.keep(f'T.Cast("{self._type("float32")}", {exponent}) - {small}')
        m = self.keep(f"{half} - {one} + {small} * {half}")
        z = self.keep(f"{m} * {m}")
        y = self.let(f"{self.polynomial(m, _LOG)} * {m} * {z} + {e} * {self.number(_LN2_LOW)}")
        value = self.keep(f"{m} + ({y} - {self.number(0.5)} * {z}) + {e} * {self.number(_LN2_HIGH)}")
        least, most = self.number(-math.inf), self.number(_LARGEST)
        below = f"T.Select({x} == {zero}, {least}, T.Select({x} < {zero}, {self.number(math.nan)}, {x}))"
        return self.let(f"T.Select({x} > {zero}, T.Select({x} <= {most}, {value}, {x}), {below})")

    def sine(self, x: str, quarter: int = 0) -> str:
        """sin(x + quarter * pi / 2) to 2e-7 for |x| < 1000: quarter 1 is the cosine."""
        shifted = self.let(f"{x} * {self.number(_TWO_OVER_PI)} + {self.number(_ROUND)}")
        n = self.let(f'T.reinterpret("{self._type("int32")}", {shifted}) - {self._int(_ROUND_BITS)}')
        k = self.keep(f'T.Cast("{self._type("float32")}", {n})')
        r = x
        for part in _HALF_PI:
            r = self.let(f"{r} - {k} * {self.number(part)}")
        r = self.keep(r)
        z = self.keep(f"{r} * {r}")
        odd = self.let(f"{r} + {r} * {z} * {self.polynomial(z, _SIN)}")
        half = f"{self.number(1.0)} - {self.number(0.5)} * {z}"
        even = self.let(f"{half} + {z} * {z} * {self.polynomial(z, _COS)}")
        turn = self.let(f"{n} + {self._int(quarter)}")
        pick = f"T.bitwise_and({turn}, {self._int(1)}) == {self._int(0)}"
        value = self.keep(f"T.Select({pick}, {odd}, {even})")
        positive = f"T.bitwise_and({turn}, {self._int(2)}) == {self._int(0)}"
        return self.let(f"T.Select({positive}, {value}, {self.number(0.0)} - {value})")

    def half(self, x: str) -> str:
        """The nearest float16, by the bits of a float32, of which it keeps ten; whole steps below 2^-14."""
        bits = self.let(f'T.reinterpret("{self._type("int32")}", {x})')
        tie = f"T.bitwise_and(T.shift_right({bits}, {self._int(13)}), {self._int(1)})"
        kept = self.let(f"T.bitwise_and({bits} + {self._int(0xFFF)} + {tie}, {self._int(-0x2000)})")
        normal = f'T.reinterpret("{self._type("float32")}", {kept})'
        small = f"T.nearbyint({x} * {self.number(2.0**24)}) * {self.number(2.0**-24)}"
        size = self.let(f"T.fabs({x})")
        beyond = f"T.Select({size} < {self.number(65520.0)}, {normal}, {x} * {self.number(math.inf)})"
        return self.let(f"T.Select({size} < {self.number(2.0**-14)}, {small}, {beyond})")

    def erf(self, x: str) -> str:
        """Error function to 3e-7 (8e-7, relative); Abramowitz and Stegun 7.1.26, and its series near 0."""
        square, size = self.keep(f"{x} * {x}"), self.keep(f"T.fabs({x})")
        near = self.let(f"{x} * {self.polynomial(square, _ERF_NEAR)}")
        one = self.number(1.0)
        t = self.keep(f"{one} / ({one} + {self.number(_ERF_P)} * {size})")
        e = self.exp(self.let(f"{self.number(0.0)} - {square}"))
        far = self.keep(f"{one} - {t} * {self.polynomial(t, _ERF_FAR)} * {e}")
        signed = self.let(f"T.Select({x} < {self.number(0.0)}, {self.number(0.0)} - {far}, {far})")
        return self.let(f"T.Select({size} < {self.number(0.5)}, {near}, {signed})")

    def tanh(self, x: str) -> str:
        """tanh(x), accurate near zero too."""
        one, two = self.number(1.0), self.number(2.0)
        square = self.let(f"{x} * {x}")
        near = self.let(f"{x} + {x} * {square} * {self.polynomial(square, _TANH)}")
        size = self.let(f"T.fabs({x})")
        e = self.exp(self.let(f"{self.number(-2.0)} * {size}"))
        far = self.let(f"{two} / ({one} + {e}) - {one}")
        signed = self.let(f"T.Select({x} < {self.number(0.0)}, {self.number(0.0)} - {far}, {far})")
        return self.let(f"T.Select({size} < {self.number(_TANH_SMALL)}, {near}, {signed})")
