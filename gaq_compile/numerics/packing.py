"""4-bit integers, two to a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError


def pack_int4(codes: Tensor) -> Tensor:
    """Pack integers -8..7 two to a byte: the low nibble first, two's complement.

    Args:
        codes: (n,) int8.

    Returns:
        (ceil(n/2),) uint8; an odd n leaves the last high nibble 0.

    Raises:
        ConfigError: if a code does not fit 4 bits, or codes is not a flat int8 tensor.
    """
    if codes.ndim != 1 or codes.dtype != torch.int8:
        raise ConfigError(f"pack_int4 needs a flat int8 tensor, got {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ConfigError("a code outside -8..7 does not fit 4 bits", fix="quantize the weights to 4 bits")
    even = torch.cat([codes, codes.new_zeros(codes.numel() % 2)])
    nibbles = even.view(torch.uint8) & 0xF
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(packed: Tensor, n: int) -> Tensor:
    """The first ``n`` integers of :func:`pack_int4`'s bytes.

    Args:
        packed: (ceil(n/2),) uint8.
        n: how many integers were packed.

    Returns:
        (n,) int8.

    Raises:
        ConfigError: if the number of bytes does not fit n.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != ((n + 1) // 2,):
        raise ConfigError(
            f"{n} packed integers need ({(n + 1) // 2},) uint8, got {packed.dtype} {tuple(packed.shape)}"
        )
    nibbles = torch.stack([packed & 0xF, packed >> 4], 1).flatten()[:n].view(torch.int8)
    return (nibbles ^ 8) - 8  # sign extension of a nibble
