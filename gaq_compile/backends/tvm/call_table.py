"""Kernel calls as the structures that TVM's calling convention reads, and the loop that makes them.

A call is a function and an array of ``TVMFFIAny``: numbers, and pointers to a ``DLTensor`` for each
tensor, which in turn points to its sizes. All of it lies in numpy arrays, where sizes and addresses are
changed in place, many at once. The loop over the calls is itself a generated kernel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .build import compile_kernel, host_target, kernel_argument
from .emit import kernel_text

_ANY = np.dtype([("type", "<i4"), ("padding", "<i4"), ("value", "<u8")])
_TENSOR = np.dtype(
    [
        ("data", "<u8"),
        ("device", "<i4", 2),
        ("axes", "<i4"),
        ("code", "u1"),
        ("bits", "u1"),
        ("lanes", "<u2"),
        ("shape", "<u8"),
        ("strides", "<u8"),  # none: rows without gaps
        ("offset", "<u8"),
    ]
)
_NUMBER, _POINTER = 1, 7  # TVMFFIAny's types: an int64, a pointer to a DLTensor
_CPU = (1, 0)

Shape = tuple[int, ...]


class CallTable:
    """Calls, to be made one after another.

    A *value* is a tensor, by its number; a value has a *slot* for every shape that it is seen in.

    Attributes:
        values: how many values there are.
    """

    def __init__(self) -> None:
        self.values = 0
        self._kept: list[Any] = []  # what addresses point to
        self._constants: dict[int, int] = {}
        self._slots: dict[tuple[int, Shape, int | None], int] = {}
        self._shapes: list[Shape] = []
        self._types: list[torch.dtype] = []
        self._value_of: list[int] = []
        self._size_of: list[int] = []
        self._calls: list[list[tuple[int, int]]] = []  # (slot, 0), (-1, address) or (-2, number)

    # --- writing --------------------------------------------------------------------------------

    def value(self) -> int:
        """A new value."""
        self.values += 1
        return self.values - 1

    def slot(self, value: int, row: Shape, dtype: torch.dtype, size: int | None) -> tuple[int, int]:
        """A value as an argument.

        Args:
            value: its number.
            row: the sizes of all axes but the first; of all, without ``size``.
            dtype: of its elements.
            size: which of the sizes says how long the first axis is; None for a tensor without rows.
        """
        key = (value, row, size)
        if key not in self._slots:
            self._slots[key] = len(self._shapes)
            self._shapes.append(row if size is None else (0, *row))
            self._types.append(dtype)
            self._value_of.append(value)
            self._size_of.append(-1 if size is None else size)
        return self._slots[key], 0

    def constant(self, tensor: Tensor) -> tuple[int, int]:
        """A tensor that stays the same, as an argument."""
        if id(tensor) not in self._constants:
            sizes, held, rows = np.array(tensor.shape, np.int64), np.zeros(1, _TENSOR), tensor.contiguous()
            held["data"], held["axes"], held["shape"] = rows.data_ptr(), rows.ndim, sizes.ctypes.data
            _describe(held[0], rows.dtype)
            self._kept += [tensor, rows, sizes, held]
            self._constants[id(tensor)] = held.ctypes.data
        return -1, self._constants[id(tensor)]

    def call(self, arguments: Sequence[tuple[int, int]]) -> int:
        """Add a call; its function is set later. Returns its number."""
        self._calls.append(list(arguments))
        return len(self._calls) - 1

    def finish(self) -> None:
        """Lay everything out; nothing can be added any more."""
        starts = np.cumsum([0, *map(len, self._calls)])
        self._starts, self._functions = starts.astype(np.int32), np.zeros(len(self._calls), np.int64)
        self._tensors, self._state = np.zeros(len(self._shapes), _TENSOR), np.zeros(3, np.int64)
        first = np.cumsum([0, *map(len, self._shapes)])
        self._sizes = np.array([n for shape in self._shapes for n in shape], np.int64)
        self._tensors["axes"] = [len(shape) for shape in self._shapes]
        self._tensors["shape"] = self._sizes.ctypes.data + 8 * first[:-1]
        for slot, dtype in enumerate(self._types):
            _describe(self._tensors[slot], dtype)
        sized = np.array(self._size_of, np.int64) >= 0
        self._leading, self._from = first[:-1][sized], np.array(self._size_of, np.int64)[sized]
        self._slot_value = np.array(self._value_of, np.int64)
        self._addresses = np.zeros(self.values, np.uint64)
        self._arguments = np.zeros(max(1, starts[-1]), _ANY)
        for k, found in enumerate(self._calls):
            self.set_arguments(k, 0, found)
        arrays = (self._functions, self._starts, self._arguments.view(np.int64), self._state)
        self._held = _held(*arrays)
        self._each: list[list[Any]] = []
        self._loop = _loop()

    # --- changing -------------------------------------------------------------------------------

    def set_function(self, call: int, function: Any) -> None:
        """What a call calls; the caller keeps it alive."""
        self._functions[call] = function.__chandle__()

    def set_arguments(self, call: int, start: int, arguments: Sequence[tuple[int, int]]) -> None:
        """Change a call's arguments from the ``start``-th on."""
        first = int(self._starts[call]) + start
        for k, (slot, what) in enumerate(arguments, start=first):
            if slot == -2:
                self._arguments[k] = (_NUMBER, 0, what)
            else:
                at = what if slot < 0 else self._tensors.ctypes.data + slot * _TENSOR.itemsize
                self._arguments[k] = (_POINTER, 0, at)

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """How many rows tensors have."""
        self._sizes[self._leading] = np.array(sizes, np.int64)[self._from]

    def set_addresses(self, values: np.ndarray, addresses: Any) -> None:
        """Where values lie."""
        self._addresses[values] = addresses

    def run(self) -> bool:
        """Make all calls; False as soon as one of them has failed."""
        self._tensors["data"] = self._addresses[self._slot_value]
        self._state[2] = 0
        self._loop(*self._held)
        return bool(self._state[2] == 0)

    def run_timed(self, times: Sequence[list[int]]) -> bool:
        """The same, with a clock around every call: each adds its nanoseconds to its list."""
        self._tensors["data"] = self._addresses[self._slot_value]
        self._state[2] = 0
        for held, one in zip(self._one_by_one(), times, strict=True):
            start = time.perf_counter_ns()
            self._loop(*held)
            one.append(time.perf_counter_ns() - start)
        return bool(self._state[2] == 0)

    def _one_by_one(self) -> list[list[Any]]:
        """What the loop is given to make one call only, for each of them."""
        if not self._each:
            words = self._arguments.view(np.int64)
            calls = range(len(self._calls))
            parts = ((self._functions[k : k + 1], self._starts[k : k + 2]) for k in calls)
            self._each = [_held(function, ends, words, self._state) for function, ends in parts]
        return self._each


def _held(*arrays: np.ndarray) -> list[Any]:
    """Arrays as arguments of the loop."""
    return [kernel_argument(torch.from_numpy(array)) for array in arrays]


def number(value: int) -> tuple[int, int]:
    """A number as an argument."""
    return -2, value


def _describe(tensor: Any, dtype: torch.dtype) -> None:
    """Device and element type; booleans are bytes to a kernel."""
    dtype = torch.int8 if dtype is torch.bool else dtype
    code = 2 if dtype.is_floating_point else 0 if dtype.is_signed else 1
    tensor["device"], tensor["lanes"] = _CPU, 1
    tensor["code"], tensor["bits"] = code, 8 * dtype.itemsize


@lru_cache(maxsize=1)
def _loop() -> Any:
    """The kernel that makes the calls: ``main(functions, starts, arguments, state)``.

    ``state`` is the value that a call returns (two words), and the first code that was not 0.
    """
    arguments = "T.address_of(arguments[2 * starts[i]]), starts[i + 1] - starts[i], T.address_of(state[0])"
    call = f'T.call_extern("int32", "TVMFFIFunctionCall", functions[i], {arguments})'
    body = [
        "for i in T.serial(calls):",
        "    if state[2] == T.int64(0):",
        "        state[0] = T.int64(0)",
        "        state[1] = T.int64(0)",
        f'        state[2] = T.Cast("int64", {call})',
    ]
    buffers = [
        ("functions", "calls", "int64"),
        ("starts", "ends", "int32"),
        ("arguments", "words", "int64"),
        ("state", "3", "int64"),
    ]
    return compile_kernel(kernel_text(buffers, body), host_target())
