"""A potential's answers do not depend on what it was asked before."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from gaq_compile.capture.graphs import collate
from gaq_compile.datasets import example_structures
from gaq_compile.passes.straight_line import straight_line
from gaq_compile.potential import Potential
from gaq_compile.verify.types import Prediction


@pytest.fixture
def fresh(so3lr_w8a8: Potential) -> Callable[[], Potential]:
    """Makes potentials that have not been called."""
    p = so3lr_w8a8
    return lambda: Potential(p.graphs, p.form, p.config, p.report, p.calibrated)


def _moved(atoms: Atoms, seed: int, by: float = 0.02) -> Atoms:
    found = atoms.copy()
    found.positions += by * np.random.default_rng(seed).standard_normal(found.positions.shape)
    return found


def _charged(atoms: Atoms) -> Atoms:
    found = atoms.copy()
    found.info["charge"] = 1
    return found


def _other_elements(atoms: Atoms) -> Atoms:
    found = atoms.copy()
    found.numbers[found.numbers == 6] = 7
    return found


def _assert_same(got: Prediction, expected: Prediction) -> None:
    assert got.energy == expected.energy
    assert np.array_equal(got.forces, expected.forces)
    assert np.array_equal(got.energies, expected.energies)


def test_other_structures_in_between_change_nothing(fresh) -> None:
    """Other atoms, other edges, more and fewer of them, other elements and charges at the same places."""
    water, methane, large = molecule("H2O"), molecule("CH4"), example_structures("azobenzene")[3]
    asked = [water, large, water, methane, _moved(large, 0), _moved(large, 1, by=0.3), large]
    asked += [_charged(large), large, _other_elements(large), large, Atoms("H")]
    asked += [water + Atoms("O", [[30, 0, 0]]), _moved(water, 2), water]
    potential = fresh()
    for atoms in asked:
        _assert_same(potential(atoms), fresh()(atoms))
    batch = [water, large, Atoms("H"), methane]
    for structures in (batch, batch[::-1], [_moved(a, 3) for a in batch], batch):
        for got, expected in zip(potential(structures), fresh()(structures), strict=True):
            _assert_same(got, expected)


def test_kernels_that_run_together_give_the_bits_of_those_that_do_not(fresh) -> None:
    potential = fresh()
    apart = straight_line(potential.graphs["lower"])
    for structures in ([molecule("H2O")], example_structures("azobenzene")[:2], [molecule("CH4")]):
        tensors = collate(structures, potential.form)
        with torch.no_grad():
            expected = apart(*(tensors[name] for name in potential.form.inputs))
        got = potential(tensors)
        assert all(torch.equal(a, b) for a, b in zip(got.values(), expected, strict=True))


def test_answers_can_be_written_to(fresh) -> None:
    potential = fresh()
    tensors = collate([molecule("H2O")], potential.form)
    kept = {name: value.clone() for name, value in potential(tensors).items()}
    for _ in range(2):
        out = potential(tensors)
        assert all(torch.equal(out[name], kept[name]) for name in kept)
        for value in out.values():
            value.fill_(7)


def test_tensors_that_the_caller_changes_in_place(fresh) -> None:
    potential = fresh()
    tensors = collate([molecule("CH4")], potential.form)
    potential(tensors)
    tensors["numbers"][0] = 7
    order = torch.randperm(len(tensors["receivers"]), generator=torch.Generator().manual_seed(0))
    for name in ("edge_vec", "receivers", "senders"):
        tensors[name].copy_(tensors[name][order])
    got, expected = potential(tensors), fresh()(tensors)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_saved_potential_never_asks_for_the_compiler(so3lr_file) -> None:
    """In a new process, however many atoms: every kernel that any number of rows reaches is there."""
    code = f"""
import sys
from gaq_compile import load
from gaq_compile.backends.tvm import build
from gaq_compile.datasets import example_structures

def never(*a, **k):
    raise SystemExit("something is compiled")

build.build_executable = build.import_tvm = never
large = example_structures("azobenzene")[3]
q = load({str(so3lr_file)!r})
for structures in ([large[:1]], [large[:3]], [large], [large] * 4, [large] * 64):
    print(sum(p.energy for p in q(structures)))
assert "tvm" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    energies = [float(line) for line in done.stdout.split()]
    assert energies[4] == pytest.approx(64 * energies[2], rel=1e-6)
