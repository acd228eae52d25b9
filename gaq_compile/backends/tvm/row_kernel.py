"""What the small kernels share: a loop over rows, and nonlinearities that vectorise.

A parallel region costs some 7 microseconds while the threads are awake and 40 when they sleep
(measured), more than a small molecule's whole gate. So a kernel with little to do runs on the
calling thread, and a larger one in parallel over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from .emit import literal, loop, splat

LANES = 16  # channels handled at once; LLVM splits them on targets with narrower registers
_SERIAL_WORK = 16384  # floats touched below which threads cost more than they bring
_BLOCK_WORK = 4096  # floats touched per block of rows


def row_loop(body: Sequence[str], work: int, *, step: int = 1) -> list[str]:
    """Run ``body`` for every row, or for every tile of ``step`` rows.

    Args:
        body: statements on row ``i``; for tiles on rows ``i`` to ``i + step - 1``, of which those
            from ``n`` on do not exist.
        work: floats read and written per row, which decides about threads and block sizes.
        step: rows per tile.

    Returns:
        Statements that use the number of rows, ``n``.
    """
    serial = max(1, _SERIAL_WORK // max(1, work * step))
    block = max(1, _BLOCK_WORK // max(1, work * step))
    tiles = "n" if step == 1 else f"((n + {step - 1}) // {step})"
    place = f" * {step}" if step > 1 else ""
    alone = loop(f"r in T.serial({tiles})", [f"i: T.let = r{place}", *body])
    inner = loop(
        f"r in T.serial(T.min({block}, {tiles} - b * {block}))",
        [f"i: T.let = (b * {block} + r){place}", *body],
    )
    shared = loop(f"b in T.parallel(({tiles} + {block - 1}) // {block})", inner)
    return [
        f"if {tiles} <= {serial}:",
        *("    " + line for line in alone),
        "else:",
        *("    " + line for line in shared),
    ]


def tiled(count: int, lanes: int, body: Sequence[str]) -> list[str]:
    """``body`` for each tile ``t`` of ``lanes`` channels out of ``count``."""
    return loop(f"t in T.serial({count // lanes})", body)


def at(base: int, lanes: int) -> str:
    """The first element of channel tile ``t`` of what begins at ``base``."""
    return f"{base} + t * {lanes}"


# --- exp, log1p and tanh as polynomials ---------------------------------------------------------
# LLVM turns a vector's exp into one library call per lane, which is some ten times slower.

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
_ROUND_BITS = 0x4B400000  # its float32 bits
_EXP_RANGE = (-87.3, 89.0)  # below: the smallest normal number; above: infinity
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_TANH_SMALL = 0.625
_ATANH = tuple(1.0 / k for k in (15, 13, 11, 9, 7, 5, 3))


class Emitter:
    """Collects ``let`` statements on vectors of ``lanes`` floats.

    Args:
        lanes: floats per vector.
        prefix: begins every name, so that several emitters can share a scope.
    """

    def __init__(self, lanes: int, prefix: str = "v") -> None:
        self.lanes, self.prefix = lanes, prefix
        self.lines: list[str] = []

    def let(self, expression: str) -> str:
        """Name an expression; returns the name."""
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name}: T.let = {expression}")
        return name

    def number(self, value: float) -> str:
        """A constant in every lane."""
        return splat(literal(value), self.lanes)

    def polynomial(self, x: str, coefficients: Sequence[float]) -> str:
        """Horner's rule, highest power first."""
        value = self.number(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.let(f"{value} * {x} + {self.number(coefficient)}")
        return value

    def exp(self, x: str) -> str:
        """e^x to 2e-7; 1e-38 far below, infinity far above, NaN for NaN."""
        low, high = (self.number(bound) for bound in _EXP_RANGE)
        # The constant comes first: TVM's min and max return their second operand for NaN.
        clamped = self.let(f"T.min({high}, T.max({low}, {x}))")
        shifted = self.let(f"{clamped} * {self.number(_LOG2E)} + {self.number(_ROUND)}")
        # Read back from the bits: TVM would simplify the float (a + c) - c to a.
        bits = f'T.reinterpret("{self._type("int32")}", {shifted})'
        n = self.let(f"{bits} - {self._int(_ROUND_BITS)}")
        k = self.let(f'T.Cast("{self._type("float32")}", {n})')
        part = self.let(f"{clamped} - {k} * {self.number(_LN2_HIGH)}")
        r = self.let(f"{part} - {k} * {self.number(_LN2_LOW)}")
        p = self.polynomial(r, _EXP)
        mantissa = self.let(f"{p} * {r} * {r} + {r} + {self.number(1.0)}")
        exponent = f"T.shift_left({n} + {self._int(127)}, {self._int(23)})"
        return self.let(f'{mantissa} * T.reinterpret("{self._type("float32")}", {exponent})')

    def _type(self, scalar: str) -> str:
        return scalar if self.lanes == 1 else f"{scalar}x{self.lanes}"

    def _int(self, value: int) -> str:
        return splat(f"T.int32({value})", self.lanes)

    def sigmoid(self, x: str) -> str:
        """1 / (1 + e^-x)."""
        one = self.number(1.0)
        e = self.exp(self.let(f"{self.number(0.0)} - {x}"))
        return self.let(f"{one} / ({one} + {e})")

    def softplus(self, x: str) -> str:
        """log(1 + e^x) = max(x, 0) + 2 atanh(t / (2 + t)), t = e^-|x|."""
        zero = self.number(0.0)
        t = self.exp(self.let(f"{zero} - T.fabs({x})"))
        z = self.let(f"{t} / ({t} + {self.number(2.0)})")
        p = self.polynomial(self.let(f"{z} * {z}"), (*_ATANH, 1.0))
        return self.let(f"T.max({zero}, {x}) + {self.number(2.0)} * {z} * {p}")

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
