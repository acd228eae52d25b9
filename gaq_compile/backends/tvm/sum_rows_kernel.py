"""Rows added up by index on CPUs: ``out[index[e]] += values[e]``, in the order of e.

In parallel over parts of the result: each thread looks at every index and adds what falls into its
part. So no two threads write to one place, nothing needs sorting, and every number of threads gives
the same bits. Looking costs little beside adding: the parts are as many as a row is wide.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ...operators.reference import sum_rows
from .build import compile_kernel
from .emit import block_lanes, kernel_text, loop, splat, vector
from .launch import Input, Launch, Output, always
from .row_kernel import LANES

_SERIAL_WORK = 16384  # floats added below which threads cost more than they bring
_WIDTH_PER_PART = 4
_MOST_PARTS = 64


def lower_sum_rows(width: int, target: str) -> Launch:
    """The compiled sum (values (E, ...), index (E,) int64, rows) -> (rows, ...), float32.

    Args:
        width: elements per row.
        target: a TVM target in JSON.

    Raises:
        LoweringError: if TVM rejects the kernel.
    """
    values, index = Input(0, (width,)), Input(1, dtype=torch.int64)
    kernel = compile_kernel(sum_rows_source(width), target)
    return Launch((values, index, Output(2, (width,), like=0)), always(kernel), longer=sum_rows)


@lru_cache(maxsize=256)
def sum_rows_source(width: int) -> str:
    """TVMScript of ``main(values, index, out)``."""
    lanes = block_lanes(width, LANES)
    tile = f"t * {lanes}"
    zero = f"{vector('out', tile, lanes, 'i')} = {splat('T.float32(0.0)', lanes)}"
    at = vector("out", tile, lanes, "to")
    add = [f"{at} = {at} + {vector('values', tile, lanes, 'e')}"]
    tiles = f"t in T.serial({width // lanes})"
    parts = max(2, min(_MOST_PARTS, width // _WIDTH_PER_PART))
    edge = ['to: T.let = T.Cast("int32", index[e])', "if low <= to:", "    if to < high:"]
    edge += ["        " + line for line in loop(tiles, add)]

    def part(low: str, high: str) -> list[str]:
        return [
            f"low: T.let = {low}",
            f"high: T.let = {high}",
            *loop("i in T.serial(low, high)", loop(tiles, [zero])),
            *loop("e in T.serial(m)", edge),
        ]

    shared = loop(f"p in T.parallel({parts})", part(f"p * n // {parts}", f"(p + 1) * n // {parts}"))
    body = [
        f"if m * {width} <= {_SERIAL_WORK}:",
        *("    " + line for line in loop("p in T.serial(1)", part("0", "n"))),
        "else:",
        *("    " + line for line in shared),
    ]
    buffers = [
        ("values", f"m, {width}", "float32"),
        ("index", "m", "int64"),
        ("out", f"n, {width}", "float32"),
    ]
    return kernel_text(buffers, body)
