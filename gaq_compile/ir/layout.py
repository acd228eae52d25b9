"""Where the numbers of an irreps tensor lie in memory.

e3nn stores a block ``mul x l`` channel-major (``mul_ir``: for each channel its 2l+1 components).
Kernels want it **component-major** (``ir_mul``: for each component all channels, so that channels
are the contiguous axis that vectorises). Inside a gaq graph every tensor is component-major, and
its irreps are *simplified* (neighbouring equal irreps merged), so that one layout belongs to one
tensor. A :class:`Block` describes one entry of a possibly unsimplified irreps string as a view
into that storage: component ``c`` of channel ``u`` is element ``base + c * stride + u``.
Channels are counted through all blocks in order; ``channel`` is a block's first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from e3nn.o3 import Irreps
from torch import Tensor

from ..errors import IrrepsError


@dataclass(frozen=True)
class Block:
    """One ``mul x l p`` entry of an irreps string, as a view into component-major storage."""

    mul: int
    l: int
    p: int
    base: int
    stride: int
    channel: int = 0

    @property
    def components(self) -> int:
        """2l + 1."""
        return 2 * self.l + 1

    @property
    def ir(self) -> str:
        return f"{self.l}{'e' if self.p == 1 else 'o'}"


@lru_cache(maxsize=4096)
def blocks(irreps: str) -> tuple[Block, ...]:
    """The blocks of ``irreps`` (not simplified) inside the storage of its simplified form.

    >>> [(b.mul, b.l, b.base, b.stride) for b in blocks("2x0e+4x1e+3x1e")]
    [(2, 0, 0, 2), (4, 1, 2, 7), (3, 1, 6, 7)]
    """
    out: list[Block] = []
    entries = [(mul, ir) for mul, ir in Irreps(irreps) if mul > 0]
    base, first, i = 0, 0, 0
    while i < len(entries):
        j = i
        while j < len(entries) and entries[j][1] == entries[i][1]:
            j += 1
        ir = entries[i][1]
        total = sum(mul for mul, _ in entries[i:j])
        channel = 0
        for mul, _ in entries[i:j]:
            out.append(Block(mul, ir.l, ir.p, base + channel, total, first + channel))
            channel += mul
        base += total * ir.dim
        first += total
        i = j
    return tuple(out)


@lru_cache(maxsize=4096)
def dim(irreps: str) -> int:
    """The number of components of ``irreps``."""
    return int(Irreps(irreps).dim)


@lru_cache(maxsize=4096)
def channels(irreps: str) -> int:
    """The number of channels of ``irreps``: the sum of its multiplicities."""
    return sum(b.mul for b in blocks(irreps))


@lru_cache(maxsize=4096)
def simplified(irreps: str) -> str:
    """``irreps`` with neighbouring equal entries merged; the form that tags carry."""
    return str(Irreps(irreps).simplify())


def lmax(irreps: str) -> int:
    """The largest degree in ``irreps`` (0 for empty irreps)."""
    return max((b.l for b in blocks(irreps)), default=0)


@lru_cache(maxsize=4096)
def permutation(irreps: str, to: str) -> tuple[int, ...]:
    """Index list ``p`` with ``out[..., k] = x[..., p[k]]`` between ``mul_ir`` and ``ir_mul``.

    Args:
        irreps: the tensor's irreps.
        to: ``"ir_mul"`` (component-major) or ``"mul_ir"`` (e3nn's own).

    Raises:
        IrrepsError: for an unknown layout.
    """
    if to not in ("ir_mul", "mul_ir"):
        raise IrrepsError(f"unknown layout {to!r}", fix="use 'ir_mul' or 'mul_ir'")
    forward: list[int] = []  # forward[ir_mul position] = mul_ir position
    for b in blocks(simplified(irreps)):
        for c in range(b.components):
            forward += [b.base + u * b.components + c for u in range(b.mul)]
    if to == "ir_mul":
        return tuple(forward)
    inverse = [0] * len(forward)
    for here, there in enumerate(forward):
        inverse[there] = here
    return tuple(inverse)


def view(x: Tensor, block: Block) -> Tensor:
    """A block of a component-major tensor (n, dim) as (n, 2l+1, mul); a view."""
    # Slices and splits only: compilers that lay out tensors anew get as_strided and unfold wrong. The window
    # holds every component's whole stride, and the block from column ``ahead`` of it on.
    size = block.components * block.stride
    start = min(block.base, x.shape[1] - size)
    ahead = block.base - start
    return x.narrow(1, start, size).unflatten(1, (block.components, block.stride))[
        ..., ahead : ahead + block.mul
    ]
