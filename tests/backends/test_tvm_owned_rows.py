"""Groups of edges that add up by atom: the order of the edges, whatever the threads and the memory before."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

pytest.importorskip("tvm")

from written_groups import WrittenGroup

from gaq_compile.backends.tvm import launch
from gaq_compile.backends.tvm.build import compile_kernel, host_target
from gaq_compile.backends.tvm.row_kernel import UNTUNED
from gaq_compile.backends.tvm.rows_kernel import lower_rows, rows_source
from gaq_compile.backends.tvm.rows_plan import make_plan
from gaq_compile.operators.reference import sort_edges
from gaq_compile.passes.row_groups import FusedRows
from gaq_compile.passes.row_shapes import PRIMES

aten, gaq = torch.ops.aten, torch.ops.gaq
ROWS: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (9,), (24,), (32,), (128,), (4, 32), (3, 3))
FEW, MANY = 40, 6000  # edges: below and above what is worth threads
# Names of index lists -> which of so many atoms each of so many edges belongs to.
LISTS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "random": lambda edges, atoms, g: torch.randint(0, atoms, (edges,), generator=g),
    "few have any": lambda edges, atoms, g: torch.randint(0, 1 + atoms // 3, (edges,), generator=g) * 2,
    "the first has all": lambda edges, atoms, g: torch.zeros(edges, dtype=torch.int64),
    "the last has all": lambda edges, atoms, g: torch.full((edges,), atoms - 1),
    "sorted": lambda edges, atoms, g: torch.randint(0, atoms, (edges,), generator=g).sort().values,
}
SIZES = (
    (0, 1),
    (0, 0),
    (0, 9),
    (1, 1),
    (1, 7),
    (FEW, 1),
    (FEW, 5),
    (FEW, 60),
    (MANY, 41),
    (MANY, 1),
    (MANY, 2),
)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class _Group(WrittenGroup):
    """A group that adds up by the order of one end."""

    def __init__(self) -> None:
        super().__init__()
        edges = (PRIMES["edge"],)
        self.index = self.input("index", (), edges, torch.int64)
        self.other = self.input("other", (), edges, torch.int64)
        self.order = self.input("order", (), edges, torch.int32)
        self.starts = self.input("starts", (), (PRIMES["atom"] + 1,), torch.int32)
        self.atoms = self.number("atoms", "atom")

    def argument(self, *row: int) -> Node:
        """Rows of edges."""
        return self.input("rows", row, (PRIMES["edge"], *row), torch.float32)

    def sum(self, values: Node) -> Node:
        more = (self.index, self.order, self.starts, self.atoms, "sum")
        return self(gaq.sum_sorted.default, values, *more)

    def inputs(self, edges: int, atoms: int, kind: str = "random") -> list[Any]:
        g = torch.Generator().manual_seed(edges + atoms)
        index = LISTS[kind](edges, max(atoms, 1), g).clamp(max=max(atoms - 1, 0))
        other = torch.randint(0, max(atoms, 1), (edges,), generator=g)
        _, _, starts, order, _, _ = sort_edges(other, index, atoms)
        known = {"index": index, "other": other, "order": order, "starts": starts, "atoms": atoms}
        rows = {"rows": edges, "table": atoms}
        return [known[k] if k in known else torch.randn(rows[k], *row, generator=g) for k, row in self.made]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def _exact(fused: FusedRows, inputs: list[Any]) -> tuple[Tensor, ...]:
    """In float64."""
    double = FusedRows(fused, fused.graph, fused.rows, fused.shapes).double()
    return double(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))


def _check(fused: FusedRows, group: _Group, lists: tuple[str, ...] = ("random",)) -> None:
    """Within rounding of float64, and of the same bits when called again after a call with NaN."""
    run = lower_rows(fused, host_target())[0]
    for edges, atoms in SIZES:
        for kind in lists:
            inputs = group.inputs(edges, atoms, kind)
            got = run(*inputs)
            for a, b in zip(got, _exact(fused, inputs), strict=True):
                assert a.shape == b.shape and a.dtype is torch.float32
                most = float(b.abs().max()) if b.numel() else 0.0
                assert torch.allclose(
                    a.double(), b, rtol=0.0, atol=1e-6 * (1 + math.sqrt(edges)) * (1 + most)
                )
            run(*(x * math.nan if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))
            assert all(_same(a, b) for a, b in zip(run(*inputs), got, strict=True))


# --- sums of what is given ----------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_sums_have_the_bits_of_adding_edge_after_edge(row: tuple[int, ...]) -> None:
    """Of torch's ``index_add``: with one thread, one addition after another."""
    g = _Group()
    fused = g.fused(g.sum(g.argument(*row)))
    run = lower_rows(fused, host_target())[0]
    for edges, atoms in SIZES:
        for kind in LISTS:
            inputs = g.inputs(edges, atoms, kind)
            (got,) = run(*inputs)
            expected = torch.zeros(atoms, *row)
            for e, n in enumerate(inputs[0].tolist() if edges <= FEW else ()):
                expected[n] += inputs[-1][e]
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            in_torch = fused(*inputs)[0]
            torch.set_num_threads(threads)
            assert _same(got, in_torch), (kind, edges, atoms)
            assert edges > FEW or _same(got, expected), (kind, edges, atoms)


@pytest.mark.parametrize("row", ROWS)
def test_few_edges_are_below_and_many_above_what_is_worth_threads(row: tuple[int, ...]) -> None:
    """So that the other tests run the kernel's both ways."""
    g = _Group()
    text = rows_source(make_plan(g.fused(g.sum(g.argument(*row))), host_target()))
    (work,) = re.findall(rf"if n \* (\d+) <= {UNTUNED.serial_work}:", text)
    assert FEW * int(work) <= UNTUNED.serial_work < MANY * int(work) and "T.parallel" in text


def test_atoms_without_edges_are_zero() -> None:
    """Also those between others, and the last ones, in memory that began as NaN."""
    for row in ((3,), (24,)):
        g = _Group()
        run = lower_rows(g.fused(g.sum(g.argument(*row))), host_target())[0]
        for edges in (FEW, MANY):
            inputs = g.inputs(edges, 30)
            inputs[0] = torch.tensor([3, 11, 12, 29])[inputs[0] % 4]
            _, _, inputs[3], inputs[2], _, _ = sort_edges(inputs[1], inputs[0], 30)
            (got,) = run(*inputs)
            assert (got != 0).flatten(1).any(1).nonzero().flatten().tolist() == [3, 11, 12, 29]
            assert not got.isnan().any()


def test_nan_stays_with_its_atom() -> None:
    for row, edges in (((9,), FEW), ((9,), MANY), ((128,), MANY)):
        g = _Group()
        run = lower_rows(g.fused(g.sum(g.argument(*row))), host_target())[0]
        inputs = g.inputs(edges, 20)
        inputs[-1][inputs[0] == 7] = torch.nan
        (got,) = run(*inputs)
        assert got[7].isnan().all() and not got[:7].isnan().any() and not got[8:].isnan().any()


# --- sums of what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize("row", [(1,), (3,), (24,), (128,), (4, 32), (3, 3)])
def test_gathered_rows_and_their_products(row: tuple[int, ...]) -> None:
    """Of both ends: the one that owns the sum, and the other."""
    g = _Group()
    x, weight = g.table(*row), g.argument(*row)
    far, own = (g(aten.index.Tensor, x, [end]) for end in (g.other, g.index))
    apart = g(aten.sub.Tensor, own, far)
    _check(g.fused(g.sum(g(aten.mul.Tensor, far, weight)), g.sum(apart)), g, tuple(LISTS))


def test_several_sums_of_many_shapes() -> None:
    """Narrow ones, wide ones, the same values twice, and one that follows from another's values."""
    g = _Group()
    column, vector, wide, heads = (g.argument(*row) for row in ((1,), (3,), (32,), (4, 8)))
    scaled = g(aten.mul.Tensor, wide, column)
    outer = g(aten.mul.Tensor, g(aten.unsqueeze.default, vector, 2), g(aten.unsqueeze.default, vector, 1))
    flat = g(aten.view.default, scaled, [-1, 4, 8])
    total = g(aten.sum.dim_IntList, scaled, [1], True)
    spread = g(aten.expand.default, column, [-1, 24])
    constant = g(aten.mul.Tensor, vector, g.constant(torch.tensor([1.0, -2.0, 0.5])))
    values = [column, vector, wide, heads, scaled, scaled, outer, flat, total, spread, constant]
    values += [g(aten.slice.Tensor, wide, 1, 3, 9), g(aten.slice.Tensor, wide, 1, 4, 28)]
    _check(g.fused(*(g.sum(v) for v in values)), g)


@pytest.mark.parametrize("width", [3, 24])
def test_narrow_and_wide_values_of_a_chain(width: int) -> None:
    """Sums over a row, functions and comparisons on the way: what a tile holds is of its own edges."""
    g = _Group()
    x = g.argument(width)
    norm = g(aten.sqrt.default, g(aten.sum.dim_IntList, g(aten.mul.Tensor, x, x), [1], True))
    near = g(aten.lt.Scalar, norm, float(math.sqrt(width)))
    kept = g(aten.where.self, near, g(aten.div.Tensor, x, norm), g.constant(torch.tensor(0.0)))
    _check(g.fused(g.sum(kept), g.sum(g(aten.exp.default, g(aten.neg.default, norm)))), g)


def test_each_edge_is_added_once_to_its_own_atom() -> None:
    """Numbers that say which edge they are: sums of powers of two have no other parts."""
    g = _Group()
    x = g.argument(1)
    run = lower_rows(g.fused(g.sum(g(aten.mul.Tensor, x, 1.0))), host_target())[0]
    inputs = g.inputs(20, 6)
    inputs[-1] = (2.0 ** torch.arange(20)).unsqueeze(1)
    (got,) = run(*inputs)
    for atom in range(6):
        mine = {e for e in range(20) if int(got[atom, 0]) >> e & 1}
        assert mine == set(torch.nonzero(inputs[0] == atom).flatten().tolist())


@pytest.mark.parametrize("row", [(3,), (24,)])
def test_atoms_can_be_done_in_any_order(row: tuple[int, ...]) -> None:
    """As threads do them: from the last to the first, none adds to what another one has begun."""
    g = _Group()
    plan = make_plan(g.fused(g.sum(g.argument(*row))), host_target())
    text = rows_source(plan)
    (blocks, owned) = re.findall(r"b in T.parallel\((.*) // (\d+)\):", text)[0]
    backwards = text.replace("low: T.let = b *", f"low: T.let = ({blocks} // {owned} - 1 - b) *")
    assert backwards.count("- 1 - b) *") == 1
    index, other, order, starts, atoms, values = g.inputs(MANY, 41)
    expected = torch.zeros(atoms, *row).index_add_(0, index, values)
    for source in (text, backwards):
        out = torch.empty(atoms, *row)
        kernel = compile_kernel(source, host_target())
        kernel(index, other, order, starts, values, out)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-4)


_IN_THREADS = """
import sys, torch
sys.path.insert(0, {here!r})
from test_tvm_owned_rows import _Group, aten, host_target, lower_rows
torch.set_num_threads({threads})
g = _Group()
x, y = g.table(128), g.argument(3)
far = g(aten.index.Tensor, x, [g.other])
results = [g.sum(g(aten.mul.Tensor, far, g(aten.sum.dim_IntList, y, [1], True))), g.sum(y)]
run = lower_rows(g.fused(*results), host_target())[0]
found = [t for n in (40, 3000, 20000) for t in run(*g.inputs(n, 501))]
torch.save(found, {out!r})
"""


def test_bits_do_not_depend_on_threads(tmp_path: Path) -> None:
    running = []
    for threads in ("1", "2"):
        text = _IN_THREADS.format(
            here=str(Path(__file__).parent), threads=threads, out=str(tmp_path / threads)
        )
        settings = {**os.environ, "TVM_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        running.append(subprocess.Popen([sys.executable, "-c", text], env=settings))
    assert [process.wait(timeout=500) for process in running] == [0, 0]
    found = [torch.load(tmp_path / threads) for threads in ("1", "2")]
    assert len(found[0]) == 6 and all(_same(a, b) for a, b in zip(*found, strict=True))


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", ["rows", "table", "results"])
def test_more_elements_than_indices_can_count_go_to_torch(longest: str, monkeypatch) -> None:
    """They cannot go in stretches: an atom's edges lie anywhere."""
    g = _Group()
    x = g.table(24)
    far, given = g(aten.index.Tensor, x, [g.other]), g.argument(24 if longest == "rows" else 1)
    fused = g.fused(g.sum(g(aten.mul.Tensor, far, given)))
    run = lower_rows(fused, host_target())[0]
    inputs = g.inputs(100, 20 if longest == "rows" else 200)
    expected = run(*inputs)
    most = {"rows": 100 * 24, "table": 200 * 24, "results": 200 * 24}[longest]
    asked: list[int] = []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *a: asked.append(1) or forward(*a))
    monkeypatch.setattr(launch, "MAX_ELEMENTS", most)
    assert _same(run(*inputs)[0], expected[0]) and not asked
    monkeypatch.setattr(launch, "MAX_ELEMENTS", most - 1)
    assert torch.allclose(run(*inputs)[0], expected[0], rtol=1e-5, atol=1e-5) and asked == [1]
