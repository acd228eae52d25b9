"""The machine's peaks: plausible among themselves, and how limits follow from them."""

from __future__ import annotations

import json

import pytest

from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.vnni import VectorUnit, vector_unit
from gaq_compile.tools.machine import SIZES, Machine, best, measure_machine, peak_source

MACHINE = Machine(2, {"f32": 100.0, "s16": 200.0, "s8": 400.0}, {10: 8.0, 100: 4.0}, {10: 2.0, 100: 1.0})


@pytest.fixture(scope="module")
def measured() -> Machine:
    return measure_machine(seconds=0.004, tries=3)


def test_narrow_integers_are_faster_where_there_are_instructions_for_them(measured):
    """Twice and four times as many in a register; a busy machine hides most of it, now and then all."""
    if vector_unit(host_target()).dot != "vnni":
        pytest.skip("no dot-product instructions")
    found = measured.operations
    for _ in range(3):
        if 1.1 * found["f32"] < found["s16"] and 1.4 * found["f32"] < found["s8"]:
            break
        found = measure_machine(seconds=0.01, tries=5).operations
    assert 1.1 * found["f32"] < found["s16"] and 1.4 * found["f32"] < found["s8"]
    assert 1e9 < measured.operations["f32"] / measured.threads < 1e12


def test_bandwidth_is_known_at_every_size(measured):
    assert tuple(measured.read) == tuple(measured.write) == SIZES
    assert all(1e8 < speed < 1e13 for speed in (*measured.read.values(), *measured.write.values()))


def test_it_survives_json(measured):
    assert Machine.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


@pytest.mark.parametrize(("size", "speed"), [(1, 8.0), (10, 8.0), (11, 4.0), (100, 4.0), (101, 4.0)])
def test_bytes_move_as_fast_as_any_buffer_of_their_size_or_larger(size, speed):
    assert best(MACHINE.read, size) == speed
    assert best({10: 1.0, 100: 3.0}, size) == 3.0


def test_limits_add_up_operations_and_bytes():
    computing, moving = MACHINE.seconds({"f32": 100.0, "s8": 200.0}, 6, 4)
    assert computing == pytest.approx(1.0 + 0.5) and moving == pytest.approx(6 / 8 + 4 / 2)
    assert MACHINE.seconds({}, 0, 0) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("dot", "kind", "dtype"),
    [("vnni", "s8", "int8"), ("vnni", "s16", "int16"), ("madd", "s8", "int16"), ("plain", "s8", "int32")],
)
def test_the_peak_uses_the_targets_own_instruction(dot, kind, dtype):
    text = peak_source(kind, VectorUnit(8, 16, dot))
    assert f'"{dtype}"' in text
    assert ("llvm.x86" in text) == (dot != "plain")
