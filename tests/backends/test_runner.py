"""Segments against their own kernels called one by one: the same bits, whatever was called before."""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_launch import CONV
from test_tvm_rows import _Group
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

pytest.importorskip("tvm")

from gaq_compile.backends.tvm import arena as arenas
from gaq_compile.backends.tvm import launch as launches
from gaq_compile.backends.tvm import runner
from gaq_compile.backends.tvm.arena import LINE, Arena
from gaq_compile.backends.tvm.build import host_target
from gaq_compile.backends.tvm.conv import conv_backward, conv_forward
from gaq_compile.backends.tvm.dense_plan import DenseSchedule
from gaq_compile.backends.tvm.launch import Launch
from gaq_compile.backends.tvm.linear import LinearKernel, LinearProblem, lower_linear
from gaq_compile.backends.tvm.pointwise import (
    lower_gate,
    lower_harmonics,
    lower_mddq,
    lower_product_backward,
)
from gaq_compile.backends.tvm.rows_kernel import lower_rows
from gaq_compile.backends.tvm.runner import Segment, native
from gaq_compile.backends.tvm.sum_rows_kernel import lower_sum_rows
from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.errors import LoweringError
from gaq_compile.passes.lower import KernelCall
from gaq_compile.passes.straight_line import Step

aten = torch.ops.aten
SIZES = ((5, 20), (5, 21), (5, 22), (40, 400), (3, 7), (1, 30), (300, 3000), (2, 1), (310, 3100), (5, 20))

pytestmark = pytest.mark.usefixtures("poisoned_memory")


# --- segments to test -----------------------------------------------------------------------------


class _Chain:
    """A segment that is written call by call: ``y = chain(gate, "x")``; inputs are named as they come."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.made: set[str] = set()

    def __call__(self, run: Any, *arguments: str | int) -> str:
        return self.parts(run, *arguments, count=0)[0]

    def parts(self, run: Any, *arguments: str | int, count: int) -> list[str]:
        name = f"v{len(self.steps)}"
        names = [f"{name}_{k}" for k in range(count)] or [name]
        self.made |= set(names)
        self.steps.append(Step(run, name, arguments, dict(enumerate(names))))
        return names

    def segment(self, outputs: Sequence[str], arena: Arena | None = None) -> Segment:
        read = (a for step in self.steps for a in step.arguments if isinstance(a, str))
        inputs = [name for name in dict.fromkeys(read) if name not in self.made]
        return Segment(self.steps, inputs, outputs, arena or Arena())


def _gate(spec: str = "4x0e ; 4x0e ; 4x1e ; silu ; sigmoid") -> Launch:
    return lower_gate(spec, host_target())


def _linear(spec: str, serial_work: int = 1 << 20) -> LinearKernel:
    problem = LinearProblem(spec, "f32", "f32")
    weight = torch.randn(problem.linear.weight_numel, generator=torch.Generator().manual_seed(1))
    schedule = DenseSchedule(serial_work=serial_work)
    return lower_linear(problem, weight, None, None, None, host_target(), schedule)


def _rounded(spec: str) -> LinearKernel:
    """A linear in 8-bit integers."""
    problem = LinearProblem(spec, "s8 m8d8", "s8")
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (problem.linear.weight_numel,), generator=g).to(torch.int8)
    steps = torch.rand(problem.linear.scale_numel, generator=g) * 0.01 + 0.001
    return lower_linear(problem, codes, steps, torch.full((8,), 0.02), None, host_target())


def _group() -> Launch:
    """``(weight, atoms, receivers, mask) -> (weight exp(-atoms[receivers]^2), and where it is below 0)``."""
    g = _Group()
    weight, atoms = g.argument(8), g.table(8)
    receivers, mask = g.argument(holds="index"), g.argument(8, holds="bool")
    gathered = g(aten.index.Tensor, atoms, [receivers])
    decay = g(aten.exp.default, g(aten.neg.default, g(aten.mul.Tensor, gathered, gathered)))
    y = g(aten.mul.Tensor, weight, g(aten.masked_fill.Scalar, decay, mask, 0.5))
    return lower_rows(g.fused(y, g(aten.lt.Scalar, y, 0.0)), host_target())[0]


def _layer(arena: Arena | None = None) -> Segment:
    """A message passing layer and the gradient of its convolution, every family of kernels in it."""
    chain, ends = _Chain(), [f"end{k}" for k in range(6)]
    weight = chain(_linear("6x0e -> 8x0e", serial_work=3000), "basis")
    messages = chain(conv_forward(CONV, host_target()), "x", "sh", weight, *ends)
    wide = chain(_rounded("4x0e+4x1e -> 8x0e+4x1e"), messages)
    gated = chain(_gate(), wide)
    steps = torch.full((8,), 0.05)
    rounded = chain(lower_mddq("4x0e+4x1e", "s8 m8d8", steps, host_target()), gated)
    totals = chain(lower_sum_rows(8, host_target()), weight, "receivers", "atoms")
    bent, below = chain.parts(_group(), weight, totals, "receivers", "mask", count=2)
    grads = chain.parts(conv_backward(CONV, host_target()), rounded, "x", "sh", bent, *ends, count=3)
    back = chain(_linear("8x0e -> 6x0e"), grads[2])
    return chain.segment([rounded, below, grads[0], back], arena)


def _inputs(atoms: int, edges: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1000 * atoms + edges + seed)
    receivers = torch.randint(0, max(1, atoms), (edges,), generator=g)
    senders = torch.randint(0, max(1, atoms), (edges,), generator=g)
    ends = [senders.int(), receivers.int()]
    for end in (receivers, senders):
        starts = torch.bincount(end, minlength=atoms).cumsum(0)
        ends += [torch.cat([starts.new_zeros(1), starts]).int(), end.argsort(stable=True).int()]
    return {
        "basis": torch.randn(edges, 6, generator=g),
        "x": torch.randn(atoms, 4, generator=g),
        "sh": torch.randn(edges, 4, generator=g),
        "receivers": receivers,
        "atoms": atoms,
        "mask": torch.rand(edges, 8, generator=g) < 0.5,
        **{f"end{k}": end for k, end in enumerate(ends)},
    }


def _given(segment: Segment, inputs: dict[str, Any], **changed: Any) -> list[Any]:
    return [{**inputs, **changed}[name] for name in segment.inputs]


@contextlib.contextmanager
def _all_at_once(segment: Segment) -> Iterator[None]:
    """Fails where kernels are called one by one."""

    def refuse(given: Any) -> Any:
        raise AssertionError("one by one")

    segment._one_by_one = refuse
    try:
        yield
    finally:
        del segment._one_by_one


def _same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        assert not (a.is_floating_point() and a.isnan().any())


def _check(segment: Segment, given: Sequence[Any]) -> None:
    """The bits of the kernels one by one, on an arena that holds nothing but NaN."""
    expected = segment._one_by_one(given)
    segment.arena.memory.fill_(255)
    with _all_at_once(segment):
        _same(segment(*given), expected)


@pytest.fixture(scope="module")
def layer() -> Callable[..., Segment]:
    """Makes segments whose kernels are lowered once."""
    made = _layer()
    return lambda arena=None: Segment(made.steps, made.inputs, made.outputs, arena or Arena())


# --- sizes ----------------------------------------------------------------------------------------


def test_the_same_bits_at_every_size(layer) -> None:
    segment = layer()
    functions = set()
    for atoms, edges in SIZES:
        for seed in range(2):
            _check(segment, _given(segment, _inputs(atoms, edges, seed)))
        functions.add(segment._calls[0].choice.function)
    assert len(functions) == 2  # of the first linear: on one thread, and on all


def test_places_are_planned_with_room_to_grow(layer) -> None:
    segment = layer()
    _check(segment, _given(segment, _inputs(64, 640)))
    memory = segment.arena.memory
    for atoms, edges in ((65, 650), (10, 30), (64, 650)):
        _check(segment, _given(segment, _inputs(atoms, edges)))
        assert segment.arena.memory is memory
    _check(segment, _given(segment, _inputs(65, 651)))
    assert segment.arena.memory.numel() > memory.numel()


def test_values_share_places(layer) -> None:
    segment = layer()
    _check(segment, _given(segment, _inputs(64, 640)))
    apart = sum(room * v.width * v.dtype.itemsize for v in segment._inner for room in [segment._room[v.size]])
    assert segment.arena.memory.numel() - LINE < 0.8 * apart


def test_without_edges_and_back(layer) -> None:
    """Convolutions say themselves what they are without edges."""
    segment = layer()
    for atoms, edges in ((5, 20), (5, 0), (7, 30), (0, 0), (5, 20)):
        given = _given(segment, _inputs(atoms, edges))
        if edges:
            _check(segment, given)
        else:
            _same(segment(*given), segment._one_by_one(given))
            assert segment(*given)[3].shape == (0, 6)


def test_kernels_that_can_do_no_rows_run_without() -> None:
    chain = _Chain()
    spec = "8x0e ;  ;  ; silu ; "
    segment = chain.segment([chain(_gate(spec), chain(_gate(spec), "x"))])
    for rows in (3, 0, 5):
        _check(segment, [torch.randn(rows, 8)])


def test_a_size_that_the_graph_says() -> None:
    chain = _Chain()
    sums = chain(lower_sum_rows(8, host_target()), "values", "index", 5)
    segment = chain.segment([chain(_gate("8x0e ;  ;  ; silu ; "), sums)])
    for edges in (10, 300, 0, 4):
        _check(segment, [torch.randn(edges, 8), torch.randint(0, 5, (edges,))])


def test_axes_like_those_of_an_argument() -> None:
    """Of an input, and of what has its own from an input."""
    chain = _Chain()
    sums = lower_sum_rows(8, host_target())
    first = chain(sums, "values", "index", "atoms")
    again = chain(sums, first, "batch", 2)
    gated = chain(_gate("8x0e ;  ;  ; silu ; "), first)
    segment = chain.segment([again, gated, first])
    for edges, atoms, axes in ((30, 7, (2, 4)), (30, 7, (8,)), (90, 20, (2, 2, 2))):
        values, index = torch.randn(edges, *axes), torch.randint(0, atoms, (edges,))
        batch = torch.randint(0, 2, (atoms,))
        given = {"values": values, "index": index, "atoms": atoms, "batch": batch}
        _check(segment, [given[name] for name in segment.inputs])
        assert [t.shape for t in segment(*(given[name] for name in segment.inputs))] == [
            (2, *axes),
            (atoms, 8),
            (atoms, *axes),
        ]


@pytest.mark.parametrize("shape", [(), (8,), (1, 8)])
def test_tensors_without_rows(shape: tuple[int, ...]) -> None:
    g = _Group()
    x, same = g.argument(8), g.fixed(*shape)
    group = lower_rows(g.fused(g(aten.mul.Tensor, x, same)), host_target())[0]
    chain = _Chain()
    (scaled,) = chain.parts(group, "x", "same", count=1)
    segment = chain.segment([chain(_gate("8x0e ;  ;  ; silu ; "), scaled)])
    for rows in (4, 17, 1, 8):
        _check(segment, [torch.randn(rows, 8), torch.randn(shape) + 2.0])


# --- what does not fit ----------------------------------------------------------------------------


WRONG: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "strided": ("x", lambda x: x.t().contiguous().t()),
    "strided edges": ("sh", lambda sh: torch.randn(4, len(sh)).t()),
    "double": ("x", lambda x: x.double()),
    "double basis": ("basis", lambda x: x.double()),
    "half": ("sh", lambda x: x.half()),
    "narrower": ("x", lambda x: x[:, :3].contiguous()),
    "one edge fewer": ("sh", lambda sh: sh[:-1]),
    "basis of other edges": ("basis", lambda b: b[:-1]),
    "short index": ("receivers", lambda r: r[:-1]),
    "index of 32 bits": ("receivers", lambda r: r.int()),
    "order of 64 bits": ("end3", lambda r: r.long()),
    "short order": ("end3", lambda r: r[:-1]),
    "numbers for flags": ("mask", lambda m: m.float()),
    "fewer flags": ("mask", lambda m: m[:-1]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_kernel_refuses_a_segment_refuses(layer, name: str) -> None:
    """With the kernel's own error; and the next call is right."""
    segment, inputs = layer(), _inputs(9, 70)
    which, change = WRONG[name]
    right, wrong = _given(segment, inputs), _given(segment, inputs, **{which: change(inputs[which])})
    for _ in range(2):
        _check(segment, right)
        try:
            expected = segment._one_by_one(wrong)
        except Exception as refused:  # noqa: BLE001 - it is this error, whichever it is
            with pytest.raises(type(refused)) as error:
                segment(*wrong)
            assert str(error.value) == str(refused)
        else:  # nothing that a kernel reads has changed
            _same(segment(*wrong), expected)


def test_an_input_that_two_kernels_see_differently() -> None:
    """What the first of them cannot take is not read, either."""
    g = _Group()
    x, same = g.argument(8), g.fixed(8)
    group = lower_rows(g.fused(g(aten.mul.Tensor, x, same)), host_target())[0]
    chain = _Chain()
    (scaled,) = chain.parts(group, "x", "same", count=1)
    segment = chain.segment([scaled, chain(_linear("1x0e -> 3x0e"), "same")])
    with pytest.raises((RuntimeError, ValueError, LoweringError)):
        segment(torch.randn(4, 8), torch.randn(4, 1))


def test_a_result_that_is_read_in_other_rows() -> None:
    """As it is where the elements are as many, and refused like anywhere where they are not."""
    g = _Group()
    x, same = g.argument(1), g.fixed(1, 8)
    group = lower_rows(g.fused(g(aten.mm.default, x, same)), host_target())[0]
    chain = _Chain()
    table = chain(lower_sum_rows(8, host_target()), "values", "index", "rows")
    (result,) = chain.parts(group, "x", table, count=1)
    segment = chain.segment([result])
    index = torch.zeros(20, dtype=torch.int64)
    given = {"values": torch.randn(20, 8), "index": index, "x": torch.randn(6, 1)}
    _check(segment, [{**given, "rows": 1}[name] for name in segment.inputs])
    wrong = [{**given, "rows": 2}[name] for name in segment.inputs]
    with pytest.raises(RuntimeError, match="invalid for input of size 16"):
        segment(*wrong)
    _check(segment, [{**given, "rows": 1}[name] for name in segment.inputs])


def test_more_elements_than_kernels_count(layer, monkeypatch) -> None:
    """Of an input or of what is made: the kernels' own answer, refused or another way."""
    segment, chain = layer(), _Chain()
    sums = chain(lower_sum_rows(3, host_target()), "values", "index", 4)
    total = chain.segment([chain(_gate("3x0e ;  ;  ; silu ; "), sums)])
    given = _given(segment, _inputs(9, 70))
    values = [torch.randn(70, 3).round(), torch.randint(0, 4, (70,))]
    expected = total._one_by_one(values)
    for module in (launches, runner):
        monkeypatch.setattr(module, "MAX_ELEMENTS", 70 * 3 - 1)
    with pytest.raises(LoweringError, match="evaluate fewer structures"):
        segment(*given)
    asked = []
    monkeypatch.setattr(total, "_one_by_one", lambda given: asked.append(given) or expected)
    _same(total(*values), expected)
    assert len(asked) == 1  # the input is too long, not what is made of it


def test_without_memory_the_next_call_is_right(monkeypatch) -> None:
    chain = _Chain()
    sums = chain(lower_sum_rows(8, host_target()), "values", "index", "rows")
    segment = chain.segment([chain(lower_sum_rows(8, host_target()), sums, "again", 3)])
    for module in (launches, runner):
        monkeypatch.setattr(module, "MAX_ELEMENTS", 1 << 60)
    values, index = torch.randn(20, 8), torch.randint(0, 5, (20,))
    given = {"values": values, "index": index, "rows": 5, "again": torch.tensor([0, 1, 1, 2, 0])}
    _check(segment, [given[name] for name in segment.inputs])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="allocate memory"):
            segment(*({**given, "rows": 1 << 45}[name] for name in segment.inputs))
    _check(segment, [given[name] for name in segment.inputs])


def test_a_constant_with_gaps_is_read_as_what_it_says() -> None:
    steps = torch.rand(8) + 0.1
    whole = lower_mddq("8x0e", "s8 m8d8", steps, host_target())
    x, _, y = whole.parts
    spread = torch.stack([steps, torch.full((8,), torch.nan)], 1)[:, 0]
    chain = _Chain()
    segment = chain.segment([chain(replace(whole, parts=(x, spread, y)), "x")])
    given = torch.randn(5, 8)
    _same(segment(given), [whole(given)])


# --- arenas ---------------------------------------------------------------------------------------


def test_segments_share_an_arena_that_one_of_them_moves(layer) -> None:
    arena = Arena()
    first, second = layer(arena), layer(arena)
    small, large = _given(first, _inputs(9, 70)), _given(first, _inputs(60, 900))
    _check(first, small)
    before = arena.memory
    _check(second, large)
    assert arena.memory is not before
    before.fill_(255)
    with _all_at_once(first):  # at addresses that have changed
        _same(first(*small), Segment._one_by_one(first, small))
    assert bool((before == 255).all())
    _check(second, large)
    _check(first, small)


def test_a_large_arena_is_given_back(layer, monkeypatch) -> None:
    for module in (arenas, runner):
        monkeypatch.setattr(module, "LARGE", 20_000)
    segment = layer()
    _check(segment, _given(segment, _inputs(300, 3000)))
    large = segment.arena.memory.numel()
    _check(segment, _given(segment, _inputs(200, 2000)))
    assert segment.arena.memory.numel() == large
    _check(segment, _given(segment, _inputs(10, 60)))
    assert segment.arena.memory.numel() < large / 8


def test_a_large_arena_is_given_back_where_some_sizes_stay(monkeypatch) -> None:
    """There may be one graph, before and after."""
    for module in (arenas, runner):
        monkeypatch.setattr(module, "LARGE", 20_000)
    chain = _Chain()
    gated = chain(_gate("8x0e ;  ;  ; silu ; "), "x")
    segment = chain.segment([chain(lower_sum_rows(8, host_target()), gated, "batch", "graphs")])
    for rows in (4000, 10):
        given = {"x": torch.randn(rows, 8), "batch": torch.zeros(rows, dtype=torch.int64), "graphs": 1}
        _check(segment, [given[name] for name in segment.inputs])
    assert segment.arena.memory.numel() < 20_000


# --- calls ----------------------------------------------------------------------------------------


def test_results_are_fresh(layer) -> None:
    segment = layer()
    given, other = _given(segment, _inputs(9, 70)), _given(segment, _inputs(9, 70, seed=1))
    first = segment(*given)
    kept = [t.clone() for t in first]
    second = segment(*other)
    assert not {t.data_ptr() for t in first} & {t.data_ptr() for t in second}
    _same(first, kept)
    for t in second:
        t.fill_(1)
    _same(segment(*given), kept)
    low, high = segment.arena.start, segment.arena.start + segment.arena.memory.numel()
    assert not any(low <= t.data_ptr() < high for t in first)


class _Timed:
    """A kernel whose calls are timed."""

    def __init__(self, run: Any) -> None:
        self.run, self.launch, self.times = run, run.launch, []

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


def test_with_a_clock_around_every_call(layer) -> None:
    plain = layer()
    steps = [replace(step, run=_Timed(step.run)) for step in plain.steps]
    segment = Segment(steps, plain.inputs, plain.outputs, Arena())
    for runs, (atoms, edges) in enumerate([(9, 70), (9, 70), (12, 300)], start=1):
        _check(segment, _given(segment, _inputs(atoms, edges)))
        assert all(len(step.run.times) == runs and step.run.times[-1] > 0 for step in steps)


def test_inputs_are_only_read(layer) -> None:
    segment = layer()
    given = _given(segment, _inputs(9, 70))
    kept = [t.clone() if isinstance(t, Tensor) else t for t in given]
    segment(*given)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True) if isinstance(a, Tensor))


def test_inputs_at_any_address(layer) -> None:
    """Rows within a longer tensor."""
    segment, inputs = layer(), _inputs(9, 70)
    shifted = {name: torch.cat([t[:1], t])[1:] if isinstance(t, Tensor) else t for name, t in inputs.items()}
    expected = segment._one_by_one(_given(segment, inputs))
    _same(segment(*_given(segment, shifted)), expected)


@pytest.mark.parametrize("timed", [False, True])
def test_an_error_in_one_kernel_does_not_stay(layer, timed: bool) -> None:
    """A kernel in the middle fails on what only it reads; those before it have run."""
    segment, inputs = layer(), _inputs(9, 70)
    if timed:
        steps = [replace(step, run=_Timed(step.run)) for step in segment.steps]
        segment = Segment(steps, segment.inputs, segment.outputs, Arena())
    right = _given(segment, inputs)
    wrong = _given(segment, inputs, mask=inputs["mask"][:-1])
    sizes = [*map(launches.count, wrong), *segment._numbers]
    with segment.arena.busy:
        assert segment._run(wrong, sizes) is None
    assert segment._sizes == sizes  # everything has been prepared: it is the kernel that complains
    with pytest.raises(Exception, match=r"(?i)mismatch|expect|shape|argument"):
        segment(*wrong)
    _check(segment, right)


def test_threads_share_a_segment(layer) -> None:
    segment = layer()
    cases = [_given(segment, _inputs(atoms, edges)) for atoms, edges in ((9, 70), (30, 250), (4, 9), (6, 0))]
    expected = [segment._one_by_one(given) for given in cases]
    problems: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for k in range(100):
                which = (k + offset) % len(cases)
                _same(segment(*cases[which]), expected[which])
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            problems.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as often as can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems


# --- graphs ---------------------------------------------------------------------------------------


FORM = GraphFormat(("edge_vec", "receivers", "senders", "batch"), 5.0)


def _lowered(atoms: Tensor) -> GraphModule:
    """Kernels of vectors, and of what lasts; one result of a kernel is read twice, one not at all."""
    graph, root = Graph(), nn.Module()
    root.register_buffer("atoms", atoms)
    kernels = {
        "harmonics": lower_harmonics("1x0e+1x1e", True, "component", host_target()),
        "linear": _linear("3x0e -> 8x0e"),
        "sums": lower_sum_rows(8, host_target()),
        "few": lower_sum_rows(4, host_target()),
        "gate": _gate("8x0e ;  ;  ; silu ; "),
        "backward": lower_product_backward("8x0e * 1x0e+1x1e -> 8x0e+8x1e | 0.0.0 0.1.1", host_target()),
    }
    for name, kernel in kernels.items():
        root.add_module(name, KernelCall(kernel, name))
    vec, receivers, senders, batch = map(graph.placeholder, FORM.inputs)
    rows = graph.call_function(aten.sym_size.int, (batch, 0))
    edges = graph.call_function(aten.sym_size.int, (receivers, 0))
    ones = graph.call_function(aten.ones.default, ([edges, 8],))
    count = graph.call_module("sums", (ones, receivers, rows))  # lasts
    known = graph.call_function(aten.index.Tensor, (graph.get_attr("atoms"), [batch]))
    own = graph.call_module("gate", (known,))  # lasts longer
    weight = graph.call_module("linear", (vec,))
    sh = graph.call_module("harmonics", (vec,))
    x = graph.call_function(aten.index.Tensor, (own, [senders]))
    wide = graph.call_function(aten.cat.default, ([weight, x, x, weight], 1))
    grads = graph.call_module("backward", (wide, x, sh, graph.call_function(aten.cat.default, ([x, x], 1))))
    parts = [graph.call_function(operator.getitem, (grads, k)) for k in (0, 1, 0)]
    totals = graph.call_module("sums", (graph.call_module("gate", (parts[0],)), senders, rows))
    last = graph.call_module("few", (parts[1], receivers, rows))
    graph.output((totals, last, count, parts[2], own))
    return GraphModule(root, graph)


@pytest.mark.parametrize("positions", [None, "edge_vec"])
def test_graphs_of_kernels_and_operators(positions: str | None) -> None:
    gm = _lowered(torch.randn(3, 8))
    run = native(gm, replace(FORM, positions=positions))
    cases = ((5, 20, 0), (5, 20, 0), (5, 20, 1), (30, 400, 0), (2, 1, 0), (4, 0, 0), (5, 20, 0))
    for atoms, edges, seed in cases:
        g = torch.Generator().manual_seed(atoms + edges)
        ends = torch.randint(0, atoms, (2, edges), generator=g)
        batch = torch.randint(0, 3, (atoms,), generator=g)
        vec = torch.randn(edges, 3, generator=g.manual_seed(seed))
        got, expected = run(vec, *ends, batch), gm(vec, *ends, batch)
        _same(got, expected)
        for t in got:
            t.zero_()


def test_what_lasts_is_computed_once_for_a_neighbour_list(monkeypatch) -> None:
    """Until the list changes, not only vectors; graphs of their own tensors have nothing that lasts.

    Of eight kernels one is called by itself, since one of its results is read twice.
    """
    runs: list[int] = []
    plain = Segment.__call__
    monkeypatch.setattr(
        Segment, "__call__", lambda self, *given: runs.append(len(self.steps)) or plain(self, *given)
    )
    gm = _lowered(torch.randn(3, 8))
    run, never = native(gm, FORM), native(gm, replace(FORM, positions="edge_vec"))
    ends, batch = torch.randint(0, 5, (2, 20)), torch.randint(0, 3, (5,))

    def kernels(function: Callable[..., Any]) -> int:
        runs.clear()
        function(torch.randn(20, 3), *ends, batch)
        return sum(runs)

    assert [kernels(run), kernels(run), kernels(run)] == [7, 5, 5]
    ends[0, 0] = (ends[0, 0] + 1) % 5
    assert [kernels(run), kernels(run)] == [6, 5]
    batch[0] = (batch[0] + 1) % 3
    assert [kernels(run), kernels(run)] == [7, 5]
    assert [kernels(never), kernels(never)] == [7, 7]
