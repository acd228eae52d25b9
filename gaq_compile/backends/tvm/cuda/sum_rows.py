"""Rows added up by index on GPUs: ``out[index[e]] += values[e]``, in an order that is always the same.

No two threads may add to one place, so the entries of each row are found first: torch sorts the index,
stably, and the order is kept as long as the index tensor lives, since many sums of a step share one. Then
a block adds up a row: as many threads as there are columns side by side, and the others on further
entries; their parts are added in shared memory, as in a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..emit import literal, loop
from .device import Gpu, empty
from .emit import SYNC, branch, grid_text, shared

_THREADS = 128
_ORDERS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # index tensor -> (version, rows, order, pointer)


def lower_sum_rows(width: int, gpu: Gpu) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The compiled sum (values (E, ...), index (E,) int64, rows) -> (rows, ...), float32.

    Args:
        width: elements per row.
        gpu: what to compile for.

    Raises:
        LoweringError: if TVM or nvcc rejects the kernel.
    """
    kernel = gpu.kernel(sum_rows_text(width))
    parts = -(-width // _columns(width))

    def run(values: Tensor, index: Tensor, rows: int) -> Tensor:
        out = empty(values, rows, *values.shape[1:])
        order, pointer = sorted_rows(index, rows)
        arguments = {"values": values, "order": order, "ptr": pointer, "out": out}
        kernel((rows, parts), {**arguments, "m": len(index), "n": rows})
        return out

    return run


def sorted_rows(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The entries of each row: ``order[pointer[n] : pointer[n + 1]]``, int32, in the index's own order."""
    known = _ORDERS.get(index)
    if known is None or known[:2] != (index._version, rows):
        order = torch.argsort(index, stable=True)
        bounds = torch.arange(rows + 1, device=index.device, dtype=index.dtype)
        pointer = torch.searchsorted(index[order], bounds)
        known = (index._version, rows, order.to(torch.int32), pointer.to(torch.int32))
        _ORDERS[index] = known
    return known[2], known[3]


def _columns(width: int) -> int:
    """Columns that a block adds up side by side: a power of two."""
    return min(_THREADS, 1 << max(0, width - 1).bit_length())


@lru_cache(maxsize=256)
def sum_rows_text(width: int) -> str:
    """TVMScript of ``main(values, order, ptr, out)``."""
    columns = _columns(width)
    strands, parts = _THREADS // columns, -(-width // columns)
    column = f"by * {columns} + tx % {columns}" if parts > 1 else f"tx % {columns}"
    body = [
        shared("sums", _THREADS),
        f"column: T.let = T.min({column}, {width - 1})",
        f"strand: T.let = tx // {columns}",
        "low: T.let = ptr[bx]",
        "high: T.let = ptr[bx + 1]",
        f"total = {literal(0.0)}",
        *loop(
            f"k in T.serial((high - low - strand + {strands - 1}) // {strands})",
            [f"total = total + values[order[low + strand + k * {strands}], column]"],
        ),
        "sums[tx] = total",
    ]
    half = _THREADS // 2
    while half >= columns:
        body += [SYNC, *branch(f"tx < {half}", [f"sums[tx] = sums[tx] + sums[tx + {half}]"])]
        half //= 2
    store = branch(f"{column} < {width}", ["out[bx, column] = sums[tx]"])
    body += branch(f"tx < {columns}", store)
    buffers = [
        ("values", f"m, {width}", "float32"),
        ("order", "m", "int32"),
        ("ptr", "ends", "int32"),
        ("out", f"n, {width}", "float32"),
    ]
    return grid_text(buffers, body, blocks="n", threads=_THREADS, parts=parts)
