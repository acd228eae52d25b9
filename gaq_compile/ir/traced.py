"""What tracing recorded of a node's value, as plain data that a file can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TracedTensor:
    """The type and shape of a tensor; in place of the tensor without data that tracing leaves behind.

    Attributes:
        dtype: of its elements.
        shape: sizes, and for those that are free their symbols, e.g. ``("s0", 128)``.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def dim(self) -> int:
        """The number of axes."""
        return len(self.shape)


def traced_to_json(value: Any) -> Any:
    """``node.meta["val"]`` as JSON: tensors, numbers and sizes, and lists of these."""
    if isinstance(value, Tensor | TracedTensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": [_size(n) for n in value.shape]}
    if isinstance(value, list | tuple):
        return [traced_to_json(item) for item in value]
    return None if value is None else {"number": str(value)}


def traced_from_json(data: Any) -> Any:
    """The inverse of :func:`traced_to_json`; a number or size comes back as its text.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(data, list):
        return [traced_from_json(item) for item in data]
    if data is None:
        return None
    if "number" in data:
        return str(data["number"])
    dtype, shape = getattr(torch, data["dtype"]), tuple(data["shape"])
    if not isinstance(dtype, torch.dtype) or not all(type(n) in (int, str) for n in shape):
        raise ValueError(f"{data} is no tensor's type and shape")
    return TracedTensor(dtype, shape)


def _size(size: Any) -> int | str:
    known = size if isinstance(size, int | str) else size.node.maybe_as_int()
    return str(size) if known is None else known
