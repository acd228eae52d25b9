"""Where numbers lie: permutations against e3nn's own slices, views against simplified storage."""

from __future__ import annotations

import pytest
import torch
from e3nn.o3 import Irreps
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.errors import IrrepsError
from gaq_compile.ir.layout import blocks, channels, dim, lmax, permutation, simplified
from gaq_compile.operators.reference import relayout, view

ENTRY = st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from("eo"))
IRREPS = st.lists(ENTRY, min_size=1, max_size=6).map(lambda e: "+".join(f"{m}x{l}{p}" for m, l, p in e))


@given(IRREPS)
@settings(max_examples=60, deadline=None)
def test_permutations_undo_each_other(irreps):
    there, back = permutation(irreps, "ir_mul"), permutation(irreps, "mul_ir")
    assert sorted(there) == list(range(dim(irreps)))
    assert [there[i] for i in back] == [back[i] for i in there] == list(range(dim(irreps)))
    x = torch.randn(3, dim(irreps))
    assert torch.equal(relayout(relayout(x, irreps, "ir_mul"), irreps, "mul_ir"), x)


@given(IRREPS)
@settings(max_examples=60, deadline=None)
def test_component_major_is_each_slice_transposed(irreps):
    """Against e3nn's own slices, not against our own index arithmetic."""
    merged = Irreps(simplified(irreps))
    x = torch.randn(2, merged.dim)
    expected = [
        x[:, s].reshape(2, mul, ir.dim).transpose(1, 2).flatten(1)
        for s, (mul, ir) in zip(merged.slices(), merged, strict=True)
    ]
    assert torch.equal(relayout(x, irreps, "ir_mul"), torch.cat([x[:, :0], *expected], 1))


@given(IRREPS)
@settings(max_examples=60, deadline=None)
def test_blocks_of_unsimplified_irreps_are_views_of_the_merged_storage(irreps):
    """Every entry of the unsimplified string finds its own numbers; together they cover all, once."""
    full = Irreps(irreps)
    x = torch.randn(3, full.dim)
    stored = relayout(x, irreps, "ir_mul")
    entries = [(s, mul, ir) for s, (mul, ir) in zip(full.slices(), full, strict=True) if mul > 0]
    seen: list[int] = []
    for block, (s, mul, ir) in zip(blocks(irreps), entries, strict=True):
        assert (block.mul, block.l, block.p, block.ir) == (mul, ir.l, ir.p, str(ir))
        assert torch.equal(view(stored, block), x[:, s].reshape(3, mul, ir.dim).transpose(1, 2))
        seen += [block.base + c * block.stride + u for c in range(block.components) for u in range(mul)]
    assert sorted(seen) == list(range(full.dim))


@given(IRREPS)
@settings(max_examples=60, deadline=None)
def test_channels_are_counted_through_all_blocks(irreps):
    """A channel has one number, whether its irreps are merged with their neighbours' or not."""
    count = sum(mul for mul, _ in Irreps(irreps))
    assert channels(irreps) == channels(simplified(irreps)) == count
    numbers = [b.channel + u for b in blocks(irreps) for u in range(b.mul)]
    assert numbers == list(range(count))
    merged = blocks(simplified(irreps))
    for block in blocks(irreps):
        (owner,) = (m for m in merged if m.channel <= block.channel < m.channel + m.mul)
        assert (owner.ir, owner.stride) == (block.ir, block.stride)
        assert block.channel - owner.channel == block.base - owner.base


def test_view_follows_strides_and_offsets():
    irreps = "2x0e+3x1o"
    block = blocks(irreps)[1]
    x = torch.randn(4, dim(irreps))
    padded = torch.zeros(8, 2 * dim(irreps))
    strided = padded[1::2, 3 : 3 + dim(irreps)]
    strided.copy_(x)
    assert torch.equal(view(strided, block), view(x, block))
    assert torch.equal(view(x.t().contiguous().t(), block), view(x, block))
    view(x, block).zero_()
    assert x[:, 2:].abs().max() == 0 and x[:, :2].abs().min() > 0


def test_known_places():
    places = [(b.mul, b.l, b.base, b.stride) for b in blocks("2x0e+4x1e+3x1e")]
    assert places == [(2, 0, 0, 2), (4, 1, 2, 7), (3, 1, 6, 7)]
    places = [(b.mul, b.ir, b.base) for b in blocks("2x1o+3x1e+1x1o")]
    assert places == [(2, "1o", 0), (3, "1e", 6), (1, "1o", 15)]
    assert [b.channel for b in blocks("2x0e+4x1e+0x2e+3x1e+1x0e")] == [0, 2, 6, 9]
    assert channels("2x0e+4x1e+3x1e") == 9 and channels("") == channels("0x0e") == 0
    assert permutation("2x1o", "ir_mul") == (0, 3, 1, 4, 2, 5)
    assert simplified("2x0e+0x1o+3x0e") == "5x0e"
    assert lmax("4x0e+0x3o+2x1o") == 1 and lmax("") == 0 and dim("") == 0


def test_unknown_layout_is_refused():
    with pytest.raises(IrrepsError, match="channels_last"):
        permutation("2x1o", "channels_last")
