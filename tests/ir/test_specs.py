"""The written form of operators: what is printed is read back as the same, nonsense is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaq_compile.errors import IrrepsError
from gaq_compile.ir.layout import blocks
from gaq_compile.ir.specs import (
    GateSpec,
    LinearSpec,
    TensorProductSpec,
    gate_spec,
    in_half,
    linear_spec,
    tensor_product_spec,
)

ENTRY = st.tuples(st.integers(1, 4), st.sampled_from(["0e", "0o", "1o", "2e"]))
ENTRIES = st.lists(ENTRY, min_size=1, max_size=5)
IRREPS = ENTRIES.map(lambda e: "+".join(f"{m}x{ir}" for m, ir in e))


@given(IRREPS, IRREPS, st.data())
@settings(max_examples=80, deadline=None)
def test_linear_round_trip(irreps_in, irreps_out, data):
    """Any subset of the possible pairs, in any order, survives printing and parsing."""
    possible = linear_spec(f"{irreps_in} -> {irreps_out}").pairs
    pairs = tuple(data.draw(st.permutations(possible)))
    pairs = pairs[: data.draw(st.integers(1, len(pairs)))] if pairs else pairs
    spec = LinearSpec(irreps_in, irreps_out, pairs)
    assert linear_spec(str(spec)) == spec


def test_linear_without_paths_round_trip():
    spec = LinearSpec("2x0e", "3x0e", ())
    assert linear_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (linear_spec, "2x0e+1x1o -> 3x0e"),
        (linear_spec, "2x0e+1x0e -> 3x0e | 1:0"),
        (tensor_product_spec, "4x0e * 1x1o -> 4x1o | 0.0.0*0.5"),
    ],
)
def test_half_precision_is_part_of_the_text(parse, text):
    plain, half = parse(text), parse(in_half(text))
    assert not plain.half and half.half and replace(half, half=False) == plain
    assert str(half) == in_half(text) and parse(str(half)) == half
    with pytest.raises(IrrepsError, match="cannot be stored as 'f8'"):
        parse(f"{text} ; f8")


def test_linear_places():
    spec = linear_spec("2x0e+3x1o+4x0e -> 5x0e+1x0o+2x1o+3x0e")
    assert spec.pairs == ((0, 0), (0, 3), (1, 2), (2, 0), (2, 3))
    assert [p.offset for p in spec.paths] == [0, 10, 16, 22, 42]
    assert [p.scale_offset for p in spec.paths] == [0, 5, 8, 10, 15]
    assert spec.weight_numel == 54 and spec.scale_numel == 18
    assert [b.mul for b in spec.bias_blocks] == [5, 3]


def test_linear_cannot_mix_irreps():
    for text in ("2x0e -> 2x0o | 0:0", "2x0e+1x1o -> 1x1e | 1:0", "4x0e+1x1o -> 4x0e | 1:0"):
        with pytest.raises(IrrepsError, match="cannot join"):
            linear_spec(text)


COEFFICIENTS = st.floats(-1e3, 1e3, allow_nan=False).filter(lambda c: c != 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), COEFFICIENTS), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_product_round_trip(items):
    """Coefficients come back to the last bit, also tiny and negative ones."""
    x, sh = "4x0e+3x1o+2x2e", "1x0e+1x1o+1x2e"
    muls, degrees = (4, 3, 2), (0, 1, 2)
    out, instructions = [], []
    for i, j, c in items:
        l = abs(degrees[i] - degrees[j])
        out.append(f"{muls[i]}x{l}{'e' if (degrees[i] + degrees[j]) % 2 == 0 else 'o'}")
        instructions.append((i, j, len(out) - 1, c))
    spec = TensorProductSpec(x, sh, "+".join(out), tuple(instructions))
    parsed = tensor_product_spec(str(spec))
    assert parsed == spec
    offsets = [sum(muls[i] for i, _, _ in items[:k]) for k in range(len(items))]
    assert [p.offset for p in parsed.paths] == offsets
    assert parsed.weight_numel == sum(muls[i] for i, _, _ in items)


@pytest.mark.parametrize(
    "text",
    [
        "4x0e * 1x1o -> 4x0e | 0.0.0",  # triangle rule
        "4x1o * 1x1o -> 4x1o | 0.0.0",  # parity
        "4x1o * 1x1o -> 3x0e | 0.0.0",  # multiplicities
        "4x1o * 2x1o -> 4x0e | 0.0.0",  # second operand
    ],
)
def test_impossible_products_are_refused(text):
    with pytest.raises(IrrepsError, match="no uvu path"):
        tensor_product_spec(text)


@pytest.mark.parametrize(
    "spec",
    [
        GateSpec("4x0e", "3x0e", "2x1o+1x2e", ("silu*1.6791767923989418",), ("sigmoid",)),
        GateSpec("4x0e+2x0e", "2x0e+1x0e", "2x1o+1x2e", ("silu", "tanh*1.5"), ("sigmoid", "identity")),
        GateSpec("4x0e", "", "", ("ssp",), ()),
        GateSpec("", "2x0e", "2x1o", (), ("tanh",)),
    ],
)
def test_gate_round_trip(spec):
    assert gate_spec(str(spec)) == spec


def test_gate_irreps():
    spec = gate_spec("4x0e ; 3x0e ; 2x1o+1x1o ; silu ; sigmoid")
    assert (spec.irreps_in, spec.irreps_out) == ("7x0e+3x1o", "4x0e+3x1o")


def test_gate_without_enough_gates_is_refused():
    with pytest.raises(IrrepsError):
        gate_spec("1x0e ; 1x0e ; 3x1o ; silu ; sigmoid")


def test_blocks_of_a_spec_see_the_simplified_storage():
    path = tensor_product_spec("2x1o * 1x0e+1x1o -> 2x1o+2x0e+2x1o | 0.0.0 0.1.1 0.0.2").paths
    assert [p.block_out.base for p in path] == [b.base for b in blocks("2x1o+2x0e+2x1o")] == [0, 6, 8]
