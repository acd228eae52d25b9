"""straight_line: one Python function that does what the lowered graph does, and holds on to nothing."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from gaq_compile.passes.lower import KernelCall
from gaq_compile.passes.straight_line import _DIRECT, Step, _items, straight_line

aten = torch.ops.aten


def _graph(build, *, inputs=("x",), **modules) -> GraphModule:
    graph, root = Graph(), nn.Module()
    root.register_buffer("weight", torch.arange(3.0))
    for name, module in modules.items():
        root.add_module(name, module)
    graph.output(build(graph, *map(graph.placeholder, inputs)))
    return GraphModule(root, graph)


def test_operators_weights_lists_and_numbers_without_a_literal():
    def build(g, x):
        limited = g.call_function(aten.clamp.default, (x, -math.inf, math.inf))
        both = g.call_function(aten.cat.default, ([limited, g.call_function(aten.neg.default, (x,))], 1))
        zeros = g.call_function(aten.zeros.default, ([2, 3],), {"dtype": torch.float64})
        scaled = g.call_function(aten.mul.Tensor, (x, g.get_attr("weight")))
        return both, zeros, scaled

    gm = _graph(build)
    x = torch.randn(2, 3)
    for got, expected in zip(straight_line(gm)(x), gm(x), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_kernels_get_rows_without_gaps():
    seen = []

    def kernel(*tensors):
        seen.extend(t.is_contiguous() for t in tensors)
        return [t * 2 for t in tensors]

    def build(g, x):
        turned = g.call_function(aten.t.default, (x,))
        results = g.call_module("kernel", (turned, x))
        first = g.call_function(operator.getitem, (results, 0))
        again = g.call_module("kernel", (first,))
        return first, g.call_function(operator.getitem, (again, 0))

    gm = _graph(build, kernel=KernelCall(kernel, "double"))
    x = torch.randn(3, 4)
    first, second = straight_line(gm)(x)
    assert torch.equal(first, 2 * x.t()) and torch.equal(second, 4 * x.t())
    assert seen == [True] * 3


def test_a_part_of_a_split_reaches_a_kernel_without_gaps():
    seen = []

    def kernel(tensor):
        seen.append(tensor.is_contiguous())
        return tensor * 2

    def build(g, x):
        parts = g.call_function(aten.split.Tensor, (g.call_module("kernel", (x,)), 2, 1))
        return g.call_module("kernel", (g.call_function(operator.getitem, (parts, 1)),))

    x = torch.randn(3, 4)
    assert torch.equal(straight_line(_graph(build, kernel=KernelCall(kernel, "double")))(x), 4 * x[:, 2:])
    assert seen == [True, True]


def test_an_empty_tensor_with_strides_reaches_a_kernel_without():
    gm = _graph(
        lambda g, x: g.call_module("kernel", (x,)), kernel=KernelCall(lambda t: t.stride(), "strides")
    )
    assert straight_line(gm)(torch.empty(0, 3).as_strided((0, 3), (1, 7))) == (3, 1)


def test_what_is_read_no_more_is_let_go():
    alive = []

    def watch(tensor):
        alive.append(weakref.ref(tensor))
        return tensor + 1

    def build(g, x):
        value = x
        for _ in range(3):
            value = g.call_module("watch", (g.call_function(aten.mul.Tensor, (value, 2.0)),))
        return value

    gm = _graph(build, watch=KernelCall(watch, ""))
    straight_line(gm)(torch.ones(2))
    assert [ref() for ref in alive] == [None] * 3


def test_errors_of_kernels_come_through():
    def fail(tensor):
        raise ValueError("no")

    gm = _graph(lambda g, x: g.call_module("kernel", (x,)), kernel=KernelCall(fail, ""))
    with pytest.raises(ValueError, match="no"):
        straight_line(gm)(torch.ones(1))


_SAMPLES = {
    aten.add.Tensor: (torch.randn(3), torch.randn(3)),
    aten.all.default: (torch.tensor([True, False]),),
    aten.div.Tensor: (torch.arange(3), torch.tensor([2.0, 4.0, 8.0])),
    aten.eq.Tensor: (torch.arange(3), torch.tensor(1)),
    aten.floor_divide.default: (torch.randn(3), math.inf),
    aten.ge.Scalar: (torch.arange(3), 1),
    aten.index.Tensor: (torch.randn(4, 2), [torch.tensor([3, 0, 3])]),
    aten.index_add.default: (torch.zeros(4), 0, torch.tensor([1, 1]), torch.ones(2)),
    aten.lt.Scalar: (torch.arange(3), 1),
    aten.mul.Tensor: (torch.arange(3), torch.arange(3)),
    aten.pow.Tensor_Tensor: (torch.arange(1, 4), torch.tensor(0.5)),
    aten.reciprocal.default: (torch.arange(1, 3),),
    aten.scatter_add.default: (torch.zeros(4), 0, torch.tensor([1, 1]), torch.ones(2)),
    aten.sub.Tensor: (torch.arange(3), 1),
    aten.sum.default: (torch.randn(3, dtype=torch.float64),),
    aten.unsqueeze.default: (torch.randn(3), -1),
    torch.ops.gaq.bonds.default: (torch.tensor([2, 0]), torch.tensor([0, 2])),
    torch.ops.gaq.sort_edges.default: (torch.tensor([0, 2, 1]), torch.tensor([2, 0, 0]), 3),
}


def test_every_direct_call_has_a_sample():
    assert set(_SAMPLES) - {aten.index.Tensor} == set(_DIRECT)


@pytest.mark.parametrize("target", _SAMPLES, ids=str)
def test_direct_calls_are_the_operators(target):
    graph = Graph()
    given = _SAMPLES[target]
    tensors = [t for a in given for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    inputs = {id(t): graph.placeholder(f"x{k}") for k, t in enumerate(tensors)}
    args = [[inputs[id(t)] for t in a] if isinstance(a, list) else inputs.get(id(a), a) for a in given]
    graph.output(graph.call_function(target, tuple(args)))
    got, expected = straight_line(GraphModule(nn.Module(), graph))(*tensors), target(*given)
    for a, b in zip(*((v if isinstance(v, list) else [v]) for v in (got, expected)), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_sizes_are_asked_of_the_tensor():
    def build(g, x):
        rows = g.call_function(aten.sym_size.int, (x, 1))
        return g.call_function(aten.zeros.default, ([rows],))

    assert straight_line(_graph(build))(torch.ones(2, 5)).shape == (5,)


# --- kernels that run together --------------------------------------------------------------------


class _Kernel:
    """A kernel that says how it is called; it adds up what it is given, once for each of its results."""

    def __init__(self, results: int = 0) -> None:
        self.results, self.launch, self.several = results, self, results > 0

    def __call__(self, *values: Any) -> Any:
        total = sum(values) + 1.0
        return tuple(total * (k + 2) for k in range(self.results)) if self.several else total


def _one(results: int = 0) -> KernelCall:
    return KernelCall(_Kernel(results), "")


class _Together:
    """Runs steps one by one, and notes them."""

    def __init__(self) -> None:
        self.made: list[list[str]] = []
        self.calls = 0

    def __call__(
        self, steps: Sequence[Step], inputs: Sequence[str], outputs: Sequence[str]
    ) -> Callable[..., Any]:
        self.made.append([step.name for step in steps])

        def run(*given: Any) -> tuple[Any, ...]:
            self.calls += 1
            known = dict(zip(inputs, given, strict=True))
            for step in steps:
                value = step.run(*(known[a] if isinstance(a, str) else a for a in step.arguments))
                parts = value if step.run.several else (value,)
                known |= {name: parts[k] for k, name in step.results.items()}
            return tuple(known[name] for name in outputs)

        return run


def _agrees(gm: GraphModule, together: _Together, *inputs: Tensor) -> None:
    got, expected = straight_line(gm, together=together)(*inputs), gm(*inputs)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_kernels_are_called_together_though_torch_stands_between():
    def build(g, x):
        first = g.call_module("one", (x,))
        other = g.call_function(aten.neg.default, (x,))
        second = g.call_module("one", (first, other))
        pair = g.call_module("two", (second, x))
        parts = [g.call_function(operator.getitem, (pair, k)) for k in (1, 0)]
        last = g.call_module("one", (g.call_function(aten.exp.default, (parts[1],)), 3))
        return first, *parts, last

    gm, together = _graph(build, one=_one(), two=_one(2)), _Together()
    _agrees(gm, together, torch.randn(2, 3))
    assert [len(names) for names in together.made] == [3, 1] and together.calls == 2


def test_results_that_nobody_reads_and_read_twice():
    def build(g, x):
        unread = g.call_module("three", (x,))
        three = g.call_module("three", (x,))
        parts = [g.call_function(operator.getitem, (three, k)) for k in (2, 0, 2)]
        del unread
        return parts[0], g.call_module("one", (parts[2],)), g.call_function(aten.neg.default, (parts[1],))

    _agrees(_graph(build, one=_one(), three=_one(3)), _Together(), torch.randn(3))


def test_results_that_are_read_as_a_whole():
    """Or from the end: what calls kernels together knows single results, from the first on."""

    def build(g, x):
        pair, other = (g.call_module("two", (x,)) for _ in range(2))
        joined = g.call_function(aten.cat.default, (pair, 0))
        first, last = (g.call_function(operator.getitem, (other, k)) for k in (0, -1))
        return joined, g.call_module("one", (first, last))

    _agrees(_graph(build, one=_one(), two=_one(2)), _Together(), torch.randn(3))


def test_nothing_comes_after_the_results():
    """A check of what no result depends on is made all the same."""

    def build(g, x):
        checked = g.call_module("one", (x,))
        positive = g.call_function(aten.all.default, (g.call_function(aten.ge.Scalar, (checked, 0)),))
        g.call_function(aten._assert_async.msg, (positive, "negative"))
        return (g.call_function(aten.neg.default, (x,)),)

    run = straight_line(_graph(build, one=_one()), together=_Together())
    assert torch.equal(run(torch.ones(2))[0], -torch.ones(2))
    with pytest.raises(RuntimeError, match="negative"):
        run(torch.full((2,), -3.0))


KINDS = st.lists(
    st.tuples(st.sampled_from(["torch", "one", "two"]), st.lists(st.integers(0, 30), max_size=3)),
    min_size=1,
    max_size=25,
)


def _added(g, kinds, values, otherwise=None):
    """Values, and those of a node of each kind, of some of the values before it."""
    for kind, places in kinds:
        read = tuple(values[k % len(values)] for k in places) or (otherwise or values[-1],)
        if kind == "torch":
            values.append(g.call_function(aten.mul.Tensor, (read[0], read[-1])))
        elif kind == "one":
            values.append(g.call_module("one", read))
        else:
            pair = g.call_module("two", read)
            values += [g.call_function(operator.getitem, (pair, k)) for k in (0, 1)]
    return values


def _random_graph(kinds: Sequence[tuple[str, Sequence[int]]]) -> GraphModule:
    """A node of each kind, of some of the values before it."""

    def build(g, x):
        return tuple(_added(g, kinds, [x], otherwise=x)[-3:])

    return _graph(build, one=_one(), two=_one(2))


def _stretches_needed(nodes: Sequence[Node], kernels: set[Node]) -> int:
    """How often one has to change from torch to kernels, at least."""
    depth: dict[Node, int] = {}
    for node in nodes:
        changes = (depth[a] + (node in kernels and a not in kernels) for a in node.all_input_nodes)
        depth[node] = max(changes, default=0)
    return max(depth.values())


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(KINDS)
def test_any_graph_in_as_few_stretches_as_can_be(kinds: list[tuple[str, list[int]]]) -> None:
    gm = _random_graph(kinds)
    nodes = list(gm.graph.nodes)
    items = _items(gm, nodes)
    order = [node for item in items for node in item]
    place = {node: k for k, node in enumerate(order)}
    assert len(order) == len(place) == len(nodes) and order[-1].op == "output"
    assert all(place[a] < place[node] for node in order for a in node.all_input_nodes)
    kernels = {n for n in nodes if n.op == "call_module"}
    kernels |= {n for n in nodes if n.target is operator.getitem}
    stretches = [item for item in items if item[0] in kernels]
    assert all(kernels.issuperset(item) for item in stretches)
    assert len(stretches) == _stretches_needed(nodes, kernels)
    together = _Together()
    _agrees(gm, together, torch.linspace(0.5, 1.5, 4, dtype=torch.float64) / 8)
    assert together.calls == sum(not set(s).issuperset(u for n in s for u in n.users) for s in stretches)


def test_what_is_read_no_more_is_let_go_between_stretches():
    alive: list[weakref.ref[Tensor]] = []

    class Watching(_Kernel):
        def __call__(self, *values: Any) -> Any:
            assert [ref() is None for ref in alive[:-1]] == [True] * len(alive[:-1])
            alive.extend(weakref.ref(v) for v in values)
            return super().__call__(*values)

    def build(g, x):
        value = x
        for _ in range(4):
            value = g.call_module("watch", (g.call_function(aten.mul.Tensor, (value, 2.0)),))
        return (value,)

    together = _Together()
    gm = _graph(build, watch=KernelCall(Watching(), ""))
    run = straight_line(gm, together=together)
    run(torch.ones(2))
    assert len(alive) == together.calls == 4 and all(ref() is None for ref in alive)


# --- what lasts -----------------------------------------------------------------------------------


class _Counted:
    """``(values) -> their sum + 1``, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *values: Tensor) -> Tensor:
        self.calls += 1
        return sum(values) + 1.0


LASTING = (("a", "absent"), ("b",))


class _Remembering:
    """``first`` of a, ``second`` of that and b, ``third`` of that and x; none of it, and all, are results."""

    def __init__(self, build=None) -> None:
        self.first, self.second, self.third = (_Counted() for _ in range(3))
        calls = {name: KernelCall(getattr(self, name), "") for name in ("first", "second", "third")}
        self.gm = _graph(build or self._build, inputs=("x", "b", "a"), **calls)
        self.run = straight_line(self.gm, lasting=LASTING)
        self.expected = straight_line(self.gm)

    @staticmethod
    def _build(g, x, b, a):
        first = g.call_module("first", (g.call_function(aten.mul.Tensor, (a, g.get_attr("weight"))),))
        second = g.call_module("second", (g.call_function(aten.exp.default, (first,)), b))
        return g.call_module("third", (second, x, first))

    def check(self, x: Tensor, b: Tensor, a: Tensor, *counts: int) -> None:
        """The result is right, and the three have been called so often for it."""
        before = [c.calls for c in (self.first, self.second, self.third)]
        got = self.run(x, b, a)
        after = [c.calls for c in (self.first, self.second, self.third)]
        assert tuple(j - i for i, j in zip(before, after, strict=True)) == counts
        assert torch.equal(got, self.expected(x, b, a))


def test_what_has_not_changed_is_not_computed_again():
    r, x, b, a = _Remembering(), *torch.randn(3, 3)
    r.check(x, b, a, 1, 1, 1)
    r.check(x, b, a, 0, 0, 1)
    r.check(x + 1, b.clone(), a.clone(), 0, 0, 1)
    r.check(x, b + 1, a, 0, 1, 1)
    r.check(x, b, a + 1, 1, 1, 1)
    r.check(x, b, a + 1, 0, 0, 1)
    r.check(x, b, a, 1, 1, 1)  # only the last is remembered


def test_changes_in_place_are_seen():
    r, x, b, a = _Remembering(), *torch.randn(3, 3)
    r.check(x, b, a, 1, 1, 1)
    a[1] += 1
    r.check(x, b, a, 1, 1, 1)
    b.neg_()
    r.check(x, b, a, 0, 1, 1)
    x.mul_(2)
    r.check(x, b, a, 0, 0, 1)


def test_changes_of_shape_are_seen():
    r, x, b, a = _Remembering(), *torch.randn(3, 3)
    r.check(x, b, a, 1, 1, 1)
    r.check(x, b, a.expand(2, 3), 1, 1, 1)
    r.check(x, b, a[None], 1, 1, 1)
    r.check(x, b[None], a[None], 0, 1, 1)
    r.check(x[:0].reshape(0, 1), b, a, 1, 1, 1)


def test_numbers_that_are_none_are_not_the_same():
    """NaN is not equal to itself: computed anew, not taken for what it was."""
    r, x, b, a = _Remembering(), *torch.randn(3, 3)
    a[0] = torch.nan
    for _ in range(2):
        before = r.first.calls
        assert r.run(x, b, a)[0].isnan() and r.first.calls == before + 1


def test_whole_numbers_and_others_are_not_the_same():
    def build(g, x, b, a):
        return g.call_function(aten.add.Tensor, (g.call_function(aten.clone.default, (a,)), b)), x

    run = straight_line(_graph(build, inputs=("x", "b", "a")), lasting=LASTING)
    one = torch.ones(2, dtype=torch.int64)
    assert run(one, one, one)[0].dtype is torch.int64
    assert run(one, one, one.float())[0].dtype is torch.float32
    assert run(one, one.double(), one.float())[0].dtype is torch.float64


def test_what_depends_on_constants_alone_lasts_longest():
    def build(g, x, b, a):
        return g.call_module("third", (g.call_module("first", (g.get_attr("weight"),)), x))

    r, (x, b, a) = _Remembering(build), torch.randn(3, 3)
    r.check(x, b, a, 1, 0, 1)
    r.check(x + 1, b + 1, a, 0, 0, 1)


def test_checks_of_what_lasts_are_made():
    def build(g, x, b, a):
        positive = g.call_function(aten.all.default, (g.call_function(aten.ge.Scalar, (a, 0)),))
        g.call_function(aten._assert_async.msg, (positive, "negative"))
        return g.call_module("third", (g.call_module("first", (a,)), x)), b

    r, (x, b, a) = _Remembering(build), torch.rand(3, 3)
    expected = r.run(x, b, a)[0]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="negative"):
            r.run(x, b, -a - 1)
    assert torch.equal(r.run(x, b, a)[0], expected)


def test_results_that_are_remembered_can_be_written_to():
    """Themselves, and what looks at them."""

    def build(g, x, b, a):
        first = g.call_module("first", (a,))
        second = g.call_module("second", (first, b))
        rows = g.call_function(aten.sym_size.int, (x, 0))
        seen = g.call_function(aten.view.default, (second, [rows, -1]))
        seen = g.call_function(aten.slice.Tensor, (seen, 1, 0, 1))
        return first, [second, g.call_module("third", (x, first))], seen, a

    r, (x, b, a) = _Remembering(build), torch.randn(3, 4)
    kept = a.clone()
    expected = [t.clone() for t in _leaves(r.expected(x, b, a))]
    for _ in range(3):
        results = _leaves(r.run(x, b, a))
        assert all(torch.equal(got, right) for got, right in zip(results, expected, strict=True))
        for result in results:
            result.fill_(torch.nan)
        a.copy_(kept)
    assert (r.first.calls, r.second.calls) == (2, 2)  # once for each of the two functions


def _leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _leaves(part)]


def test_what_was_remembered_is_let_go_when_it_is_computed_anew():
    alive: list[weakref.ref[Tensor]] = []

    def watch(*values: Tensor) -> Tensor:
        alive.extend(weakref.ref(v) for v in values)
        return values[0] + 1

    def build(g, x, a):
        inner = g.call_function(aten.mul.Tensor, (a, 2.0))
        kept = g.call_function(aten.mul.Tensor, (g.call_module("watch", (inner,)), 3.0))
        return g.call_module("watch", (kept, g.call_function(aten.neg.default, (x,))))

    gm = _graph(build, inputs=("x", "a"), watch=KernelCall(watch, ""))
    run = straight_line(gm, lasting=(("a",),))
    x, a = torch.randn(2, 3)
    run(x, a)
    inner, kept, last = alive
    assert inner() is None and last() is None and kept() is not None
    run(x, a)
    assert alive[3]() is kept()
    run(x, a + 1)
    assert kept() is None


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(KINDS, st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_any_graph_is_remembered_right(kinds: list[tuple[str, list[int]]], changes: list[int]) -> None:
    """Whatever the inputs that change from call to call."""

    def build(g, *inputs):
        return tuple(_added(g, kinds, list(inputs))[-4:])

    gm = _graph(build, inputs=("x", "b", "a"), one=_one(), two=_one(2))
    together, inputs = _Together(), list(torch.rand(3, 4, dtype=torch.float64) / 8)
    run = straight_line(gm, together=together, lasting=LASTING)
    for change in (0, *changes):
        for k in range(3):
            if change >> k & 1:
                inputs[k] += 0.125  # in place
        for got, right in zip(run(*inputs), gm(*inputs), strict=True):
            assert torch.equal(got, right)
            got.zero_() if all(got is not t for t in inputs) else None
