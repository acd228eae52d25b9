"""The fast reader of kernel text against TVM's own parser."""

from __future__ import annotations

import pytest

from gaq_compile.backends.tvm import build, pointwise
from gaq_compile.backends.tvm.build import build_executable, host_target, import_tvm, module_text
from gaq_compile.backends.tvm.conv import backward_source, forward_source
from gaq_compile.backends.tvm.dense_kernel import dense_text
from gaq_compile.backends.tvm.dense_plan import LinearProblem, make_plan
from gaq_compile.backends.tvm.reader import Unreadable, read_kernel
from gaq_compile.errors import LoweringError

CONV = "4x0e+4x1o * 1x0e+1x1o -> 4x0e+4x1o+4x1o | 0.0.0*1.0 0.1.1*0.5 1.0.2*1.0"
PRODUCT = "4x0e+4x1o * 1x0e+1x1o -> 4x0e+4x1o | 0.0.0*1.0 0.1.1*0.5"
LINEAR = "16x0e+16x1o -> 16x0e+16x1o"
PROBLEMS = [
    LinearProblem(LINEAR, "f32", "f32", False, True),
    LinearProblem(LINEAR, "s8 m8d8", "s8", False, True),
    LinearProblem(LINEAR, "s8 m8d8 common", "s4", False, False),
    LinearProblem(LINEAR, "s16 m16d16", "s8", False, False),
    LinearProblem(LINEAR, "f32", "s16", False, False),
    LinearProblem(LINEAR, "g16", "s8", True, False),
    LinearProblem(LINEAR, "f32", "s4", True, False),
]


def _sources() -> dict[str, str]:
    target = host_target()
    found = {
        "conv": forward_source(CONV, 4),
        "conv_backward": backward_source(CONV, 4),
        "product": pointwise.product_source(PRODUCT),
        "product_backward": pointwise.product_backward_source(PRODUCT),
        "gate": pointwise.gate_source("4x0e ; 4x0e ; 4x1o ; silu ; tanh"),
        "gate_backward": pointwise.gate_backward_source("4x0e ; 4x0e ; 4x1o ; silu ; tanh"),
        "harmonics": pointwise.harmonics_source("0e+1o+2e", True, "component"),
        "harmonics_backward": pointwise.harmonics_backward_source("0e+1o+2e", True, "component"),
        "mddq": pointwise.mddq_source("8x0e+4x1o", "s8 m8d8"),
        "mddq_backward": pointwise.mddq_backward_source("8x0e+4x1o", "s8 m8d8"),
    }
    for problem in PROBLEMS:
        name = f"linear {problem.activation} {problem.weight}"
        for parallel, decoded in ((False, False), (True, False), (True, True)):
            text = dense_text(make_plan(problem, target), parallel=parallel, decoded=decoded)
            found[f"{name} {parallel} {decoded}"] = text
    return found


def _parsed(source: str):
    tvm = import_tvm()
    from tvm.script import ir as I  # noqa: N812
    from tvm.script import tirx as T  # noqa: N812

    return tvm.script.from_source(source, extra_vars={"I": I, "T": T})


def _same(source: str) -> bool:
    import_tvm().ir.assert_structural_equal(read_kernel(source), _parsed(source))
    return str(read_kernel(source)) == str(_parsed(source))  # names too


@pytest.mark.parametrize("name", list(_sources()))
def test_every_generator_is_read_as_the_parser_reads_it(name):
    assert _same(_sources()[name])


BODY = """\
        n = T.int32()
        x = T.match_buffer(x_h, (n, 4,), "float32", align=4)
"""


def _kernel(lines: list[str]) -> str:
    return module_text(
        "x_h: T.handle, k: T.int32", "".join(f"        {line}\n" for line in lines), preamble=BODY
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["s = k + 1", "s = s * 2", "x[0, s] = 2"],
        [
            "for i in T.serial(n):",
            "    s = i",
            "    x[i, s] = x[i, s] + T.float32(1)",
            "s = k",
            "x[0, s] = -s",
        ],
        ["v: T.let = k", "for i in T.serial(n):", "    v: T.let = i + v", "    x[v, 0] = 1", "x[v, 1] = 2"],
        [
            "s = 0",
            "for i in T.parallel(n):",
            "    if 3 < i:",
            "        s = s + i",
            "    else:",
            "        s = 5",
        ],
        ["if k == n:", "    x[0, 0] = 1", "elif k != 3:", "    x[0, 1] = k", "else:", "    x[0, 2] = 7"],
        ["a = T.alloc_buffer((1,), 'int32', scope='local')", "a[0] = k", "x[0, a[0]] = 1"],
    ],
    ids=["scalar", "scopes", "shadowed let", "set inside", "branches", "buffer"],
)
def test_names_mean_what_they_mean_to_the_parser(lines):
    assert _same(_kernel(lines))


@pytest.mark.parametrize(
    "lines",
    [
        ["while k < 3:", "    x[0, 0] = 1"],
        ["x[0, 0] += 1"],
        ["v: T.int32 = k"],
        ["v: T.let = k", "v: T.let = k"],
        ["x[0, nowhere] = 1"],
        ["if 1 < 2:", "    x[0, 0] = 1"],
        ["a = T.alloc_buffer((1,), 'int32', scope='local')", "a = k"],
        ["for i in range(n):", "    x[i, 0] = 1"],
    ],
)
def test_what_it_does_not_know_is_refused(lines):
    with pytest.raises(Unreadable):
        read_kernel(_kernel(lines))


def test_the_parser_reads_what_is_refused():
    assert build_executable(_kernel(["if n > 0:", "    x[0, 0] += 1"]), host_target()) is not None


def test_errors_are_the_parsers(monkeypatch):
    wrong = _kernel(["x[0, 0] = T.no_such_function(k)"])
    with pytest.raises(LoweringError, match="no_such_function") as found:
        build_executable(wrong, host_target())
    monkeypatch.setattr(build, "read_kernel", lambda source: _parsed(source))
    with pytest.raises(LoweringError) as expected:
        build_executable(wrong, host_target())
    assert str(found.value) == str(expected.value)


def test_nothing_is_left_behind_by_a_failure():
    """TVM's builder is of the whole thread: what failed halfway must not stay open in it."""
    with pytest.raises(Exception, match="no_such_function"):
        read_kernel(_kernel(["for i in T.serial(n):", "    x[i, 0] = T.no_such_function(i)"]))
    assert _same(_kernel(["x[0, 0] = 1"]))
