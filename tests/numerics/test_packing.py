"""4-bit packing is lossless and has the order that kernels rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaq_compile.errors import ConfigError
from gaq_compile.numerics.packing import pack_int4, unpack_int4


@given(st.lists(st.integers(-8, 7), max_size=65))
def test_round_trip(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (len(values) + 1) // 2
    assert torch.equal(unpack_int4(packed, len(values)), codes)


def test_low_nibble_first_and_twos_complement() -> None:
    packed = pack_int4(torch.tensor([1, -1, -8, 7, -2], dtype=torch.int8))
    assert packed.tolist() == [0xF1, 0x78, 0x0E]


def test_every_byte_decodes() -> None:
    got = unpack_int4(torch.arange(256, dtype=torch.uint8), 512).view(256, 2)
    nibble = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1], dtype=torch.int8)
    assert torch.equal(got[:, 0], nibble.repeat(16))
    assert torch.equal(got[:, 1], nibble.repeat_interleave(16))


@pytest.mark.parametrize("codes", [torch.tensor([8], dtype=torch.int8), torch.tensor([1]), torch.zeros(2, 2)])
def test_what_is_no_four_bit_code_is_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ConfigError):
        pack_int4(codes)


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(ConfigError):
        unpack_int4(torch.zeros(3, dtype=torch.uint8), 4)
