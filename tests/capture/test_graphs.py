"""Edges and batches: against ASE's neighbour list, and against each structure alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gaq_compile.capture import graphs
from gaq_compile.capture.graphs import (
    TENSOR_NAMES,
    CalibratedRange,
    GraphFormat,
    Pairs,
    calibrated_range,
    collate,
    find_pairs,
    in_pairs,
    neighbours,
)
from gaq_compile.capture.structures import check_structure
from gaq_compile.errors import StructureError, UnknownElementError
from gaq_compile.verify.structures import random_rotations, rotated

FORM = GraphFormat(TENSOR_NAMES, 3.0, 6.0, elements=(1, 6, 8))

COPPER = bulk("Cu", a=3.6)  # one atom: every edge leads to an image of itself
STRUCTURES = {
    "molecule": [molecule("CH3CH2OH")],
    "one atom": [Atoms("O")],
    "crystal": [bulk("C", cubic=True)],
    "one-atom cell": [COPPER],
    "slab": [fcc111("Cu", (1, 2, 2))],
    "batch": [molecule("H2O"), Atoms("O"), COPPER, molecule("CH4"), bulk("C")],
}


def _sorted(i, j, vectors):
    rows = np.column_stack([i, j, np.round(vectors, 6)])
    return rows[np.lexsort(np.round(rows, 4).T[::-1])]


@pytest.mark.parametrize("seed", range(24))
def test_neighbours(seed):
    """Skewed cells of any size, atoms outside of them, every mixture of periodic directions."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    cell = rng.normal(size=(3, 3)) + np.diag(rng.uniform(1.5, 6, 3))
    pbc = [(seed >> k) & 1 for k in range(3)]
    atoms = Atoms(["H"] * n, rng.uniform(-8, 8, (n, 3)), cell=cell, pbc=pbc)
    ours, ase = _sorted(*neighbours(atoms, 4.0)), _sorted(*neighbor_list("ijD", atoms, 4.0))
    assert ours.shape == ase.shape and np.allclose(ours, ase, atol=1e-5)
    i, j, vectors = neighbours(atoms, 4.0)
    assert (np.linalg.norm(vectors, axis=1) <= 4.0).all()
    if not any(pbc):
        assert np.allclose(vectors, atoms.positions[j] - atoms.positions[i])


def test_slab():
    slab = fcc111("Cu", (2, 2, 2))
    assert np.abs(slab.cell.array[2]).max() == 0
    assert len(neighbours(slab, 4.0)[0]) == len(neighbor_list("i", slab, 4.0))


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_edges_come_in_pairs(structures):
    """Both lists, against the full one; the cutoffs span several lattice constants of copper."""
    form = GraphFormat(TENSOR_NAMES, 4.1, 11.0)
    tensors = collate(structures, form)
    starts = tensors["ptr"].tolist()
    for suffix, cutoff in (("", form.cutoff), ("_lr", form.cutoff_lr)):
        names = (f"edge_vec{suffix}", f"receivers{suffix}", f"senders{suffix}")
        vectors, receivers, senders = (tensors[name] for name in names)
        half = len(vectors) // 2
        assert torch.equal(receivers[half:], senders[:half])
        assert torch.equal(senders[half:], receivers[:half])
        assert torch.equal(vectors[half:], -vectors[:half])
        first = list(zip(receivers[:half].tolist(), senders[:half].tolist(), strict=True))
        assert first == sorted(first) and all(i <= j for i, j in first)
        found = [neighbor_list("ijD", atoms, cutoff) for atoms in structures]
        i, j = (np.concatenate([f[k] + n for f, n in zip(found, starts, strict=False)]) for k in (0, 1))
        expected = _sorted(i, j, np.concatenate([f[2] for f in found]))
        assert np.allclose(_sorted(receivers, senders, vectors), expected, atol=1e-4)
    assert in_pairs(tensors, form) is tensors


def _same(found: Pairs, expected: Pairs) -> None:
    assert all(np.array_equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [1, 2, 9, graphs.FEW, graphs.FEW + 1])
def test_pairs_of_few_atoms_are_those_of_many(monkeypatch, count):
    """Two ways to find them, the same answer to the bit; also with atoms on top of each other."""
    positions = np.random.default_rng(count).uniform(0, 6, (count, 3))
    positions[-1] = positions[0]
    atoms = Atoms(["H"] * count, positions)
    found = find_pairs(atoms, 4.0)
    monkeypatch.setattr(graphs, "FEW", 0)
    _same(find_pairs(atoms, 4.0), found)
    assert found.receivers.dtype == found.senders.dtype == np.int64
    assert (found.lengths < 4.0).all()


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_pairs_within_a_cutoff_and_turned(structures):
    (rotation,) = random_rotations(1, 3)
    for atoms in structures:
        pairs = find_pairs(atoms, 7.0)
        assert pairs.within(7.0) is pairs
        _same(pairs.within(4.1), find_pairs(atoms, 4.1))
        turned, expected = pairs.turned(rotation), find_pairs(rotated(atoms, rotation), 7.0)
        assert np.array_equal(turned.receivers, expected.receivers)
        assert np.allclose(turned.vectors, expected.vectors) and np.allclose(turned.lengths, expected.lengths)


def _shuffled(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    shuffled = dict(tensors)
    for suffix in ("", "_lr"):
        order = torch.randperm(
            len(tensors[f"edge_vec{suffix}"]), generator=torch.Generator().manual_seed(seed)
        )
        for name in ("edge_vec", "receivers", "senders"):
            shuffled[name + suffix] = tensors[name + suffix][order]
    return shuffled


def _rows(tensors: Mapping[str, Tensor], suffix: str) -> list[list[float]]:
    ends = torch.stack([tensors[f"receivers{suffix}"], tensors[f"senders{suffix}"]], 1).double()
    return sorted(torch.cat([ends, tensors[f"edge_vec{suffix}"].double() + 0.0], 1).tolist())


@settings(max_examples=40, deadline=None)
@given(
    atoms=st.integers(1, 3),
    half=st.lists(st.tuples(*[st.integers(0, 2)] * 2, *[st.sampled_from([-1.5, -0.0, 0.0, 2.0])] * 3)),
    seed=st.integers(0, 99),
)
def test_any_order_is_brought_into_pairs(atoms, half, seed):
    """Few values, so that edges between the same ends, equal vectors and both zeros are frequent."""
    rows = [(i % atoms, j % atoms, *v) for i, j, *v in half if i % atoms != j % atoms or any(v)]
    ends = torch.tensor([row[:2] for row in rows], dtype=torch.int64).reshape(-1, 2)
    v = torch.tensor([row[2:] for row in rows], dtype=torch.float32).reshape(-1, 3)
    i, j = torch.cat([ends, ends.flip(1)]).T
    tensors = {"edge_vec": torch.cat([v, -v]), "receivers": i, "senders": j}
    tensors |= {f"{name}_lr": tensor for name, tensor in tensors.items()}
    form = GraphFormat(tuple(tensors), 3.0)
    assert in_pairs(tensors, form) is tensors
    shuffled = _shuffled(tensors, seed)
    found = in_pairs(shuffled, form)
    for suffix in ("", "_lr"):
        assert _rows(found, suffix) == _rows(tensors, suffix)
    assert in_pairs(found, form) is found


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES)
def test_shuffled_edges_of_structures(structures):
    tensors = collate(structures, GraphFormat(TENSOR_NAMES, 4.1, 7.0))
    found = in_pairs(_shuffled(tensors, 0), FORM)
    for name in ("receivers", "senders", "receivers_lr", "senders_lr"):
        assert torch.equal(found[name], tensors[name])  # sorted by their ends, as collate has them
    assert _rows(found, "") == _rows(tensors, "") and _rows(found, "_lr") == _rows(tensors, "_lr")
    untouched = [name for name in TENSOR_NAMES if not name.startswith(("edge", "receivers", "senders"))]
    assert all(found[name] is tensors[name] for name in untouched)


def test_only_lists_out_of_order_are_permuted():
    tensors = collate([molecule("H2O")], FORM)
    shuffled = {**tensors, **{n: t for n, t in _shuffled(tensors, 1).items() if n.endswith("_lr")}}
    found = in_pairs(shuffled, FORM)
    assert found["edge_vec"] is tensors["edge_vec"] and found["receivers"] is tensors["receivers"]
    assert found["edge_vec_lr"] is not shuffled["edge_vec_lr"]


@pytest.mark.parametrize("fault", ["missing", "one direction", "vector", "end", "far end", "own image"])
def test_edges_without_reverse_are_named(fault):
    tensors = collate([molecule("H2O")], FORM)
    edges, half = len(tensors["edge_vec"]), len(tensors["edge_vec"]) // 2
    bad = 1
    if fault in ("missing", "one direction"):
        bad = half - 1 if fault == "missing" else 0
        for name in ("edge_vec", "receivers", "senders"):
            tensors[name] = tensors[name][: edges - 1 if fault == "missing" else half]
    elif fault == "vector":
        tensors["edge_vec"][bad, 1] = torch.nextafter(tensors["edge_vec"][bad, 1], torch.tensor(9.0))
    elif fault == "own image":
        for name in ("receivers", "senders", "edge_vec"):
            tensors[name][bad] = 0
    else:
        tensors["receivers" if fault == "end" else "senders"][bad] = 1
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(StructureError, match=r"has no reverse[\s\S]*both directions") as error:
        in_pairs(tensors, FORM)
    named = int(str(error.value).split("edge ")[1].split()[0])
    assert named == bad or fault not in ("missing", "one direction", "own image")
    for name in ("receivers", "senders", "edge_vec"):
        assert f"{name} {tensors[name][named].tolist()}" in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())


def test_formats_without_pairs():
    """Positions of their own, or no edge vectors: nothing is looked at."""
    rubbish = {"edge_vec": torch.ones(3, 3), "receivers": torch.zeros(3), "senders": torch.zeros(3)}
    for form in (GraphFormat(tuple(rubbish), 0.0, positions="edge_vec"), GraphFormat(("senders",), 3.0)):
        assert in_pairs(rubbish, form) is rubbish


def test_atoms_apart():
    assert len(neighbours(Atoms("H2", [[0, 0, 0], [1e5, 0, 0]]), 5.0)[0]) == 0


def test_atoms_very_far_apart():
    """An exploded trajectory: a typed error or no edges, but not the end of the process."""
    code = (
        "from ase import Atoms\n"
        "from gaq_compile.capture.graphs import GraphFormat, collate\n"
        "from gaq_compile.errors import StructureError\n"
        "try: print(collate([Atoms('H2', [[0, 0, 0], [1e7, 0, 0]])], GraphFormat(('edge_vec',), 5.0)))\n"
        "except StructureError: pass\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_batch():
    water, methane, single = molecule("H2O"), molecule("CH4"), Atoms("O")
    water.info.update(charge=-1, spin=0.5)
    tensors = collate([water, single, methane], FORM)
    assert tensors["numbers"].tolist() == [8, 1, 1, 8, 6, 1, 1, 1, 1]
    assert tensors["batch"].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2] and tensors["ptr"].tolist() == [
        0,
        3,
        4,
        9,
    ]
    assert tensors["charge"].tolist() == [-1, 0, 0] and tensors["spin"].tolist() == [0.5, 0, 0]
    assert (tensors["batch"][tensors["receivers"]] == tensors["batch"][tensors["senders"]]).all()
    for index, (atoms, start) in enumerate(((water, 0), (single, 3), (methane, 4))):
        alone = collate([atoms], FORM)
        for suffix in ("", "_lr"):
            mine = tensors["batch"][tensors[f"receivers{suffix}"]] == index
            for name in ("receivers", "senders"):
                assert torch.equal(tensors[name + suffix][mine] - start, alone[name + suffix])
            assert torch.equal(tensors[f"edge_vec{suffix}"][mine], alone[f"edge_vec{suffix}"])


def test_types_and_empty_tensors_are_compact():
    tensors = collate([Atoms("H")], FORM)
    assert list(tensors) == list(TENSOR_NAMES)
    for name, tensor in tensors.items():
        floats = name in ("edge_vec", "edge_vec_lr", "charge", "spin")
        assert tensor.dtype == (torch.float32 if floats else torch.int64), name
        assert tensor.is_contiguous()
    assert tensors["edge_vec"].shape == tensors["edge_vec_lr"].shape == (0, 3)
    assert tensors["edge_vec"].stride() == (3, 1)


def test_unknown_elements_are_named():
    with pytest.raises(UnknownElementError, match=r"Cu[\s\S]*structure 1"):
        collate([molecule("H2O"), bulk("Cu")], FORM)
    with pytest.raises(UnknownElementError, match="X"):
        collate([Atoms("X")], FORM)
    assert collate([bulk("Cu")], GraphFormat(("numbers",), 3.0))["numbers"].tolist() == [29]


def test_calibrated_range():
    form = GraphFormat(("numbers", "edge_vec", "receivers"), 3.0)
    salt, copper = (collate([bulk(*a) * (2, 2, 2)], form) for a in (("NaCl", "rocksalt", 5.6), ("Cu",)))
    whole, elements = calibrated_range([salt], True), calibrated_range([salt], False)
    assert whole == CalibratedRange((11, 17), 6, 6, pytest.approx(2.8, abs=1e-5))
    assert CalibratedRange.from_dict(json.loads(json.dumps(asdict(whole)))) == whole
    for found in (whole, elements):
        assert found.complaint(salt) is None and "calibrated were Na, Cl, not Cu" in found.complaint(copper)
    dense = collate([bulk("NaCl", "rocksalt", 4.2) * (2, 2, 2)], form)
    assert "neighbours" in whole.complaint(dense) and elements.complaint(dense) is None
    near = collate([bulk("NaCl", "rocksalt", 4.9) * (2, 2, 2)], form)
    assert "distance of 2.45" in whole.complaint(near)


def test_nothing_and_rubbish():
    for structures in ([], ["H2O"], [Atoms()], [None]):
        with pytest.raises(StructureError):
            collate(structures, FORM)


COINCIDENT = {
    "molecule": Atoms("HOH", [[0, 0, 0], [1, 0, 0], [1, 0, 0.01]]),
    "exactly": Atoms("HOH", [[0, 0, 0], [1, 0, 0], [1, 0, 0]]),
    "across a boundary": Atoms("H2", [[0.01, 0, 0], [4.99, 0, 0]], cell=[5, 5, 5], pbc=True),
    "own image": Atoms("H", cell=[0.02, 5, 5], pbc=True),
    "own image in a skewed cell": Atoms("H", cell=[[5, 0, 0], [5, 0.08, 0], [0, 0, 5]], pbc=True),
    "wire": Atoms("H", cell=[0.05, 0, 0], pbc=(True, False, False)),
    "many": Atoms(["H"] * 80, np.repeat(np.arange(40.0)[:, None] * [1, 0, 0], 2, axis=0)),
}


@pytest.mark.parametrize("atoms", COINCIDENT.values(), ids=COINCIDENT)
def test_coincident_atoms_are_named_as_by_the_check(atoms):
    """Here edges tell whether there are such atoms; the words are those of ``check_structure``."""
    with pytest.raises(StructureError) as expected:
        check_structure(atoms)
    with pytest.raises(StructureError) as found:
        collate([molecule("H2O"), atoms, Atoms("H", [[np.nan, 0, 0]])], FORM)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("gap", [0.1, 0.11, 0.3])
def test_close_atoms_are_not_coincident(gap):
    close = Atoms("H2", [[0, 0, 0], [0, 0, gap]])
    thin = Atoms("H", cell=[6, 6, gap], pbc=(False, False, True))
    form = GraphFormat(TENSOR_NAMES, 0.05, 1.0)
    assert collate([close, thin], form)["senders"].tolist() == []
    assert len(collate([close], form)["senders_lr"]) == 2


@pytest.mark.parametrize("charge", [float("nan"), "plus one", [1, 2]], ids=str)
def test_charge_that_is_no_number(charge):
    water = molecule("H2O")
    water.info["charge"] = charge
    with pytest.raises(StructureError):
        collate([water], FORM)


def test_format_round_trip():
    own = GraphFormat(("positions",), 0.0, positions="positions")
    for form in (FORM, GraphFormat(("numbers",), 5.0), own):
        assert GraphFormat.from_dict(form.to_dict()) == form
    with pytest.raises(StructureError, match="tensors of its own"):
        collate([Atoms("H")], own)
