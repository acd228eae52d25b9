"""Edges and batches: against ASE's neighbour list, and against each structure alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.neighborlist import neighbor_list

from gaq_compile.capture.graphs import (
    TENSOR_NAMES,
    CalibratedRange,
    GraphFormat,
    calibrated_range,
    collate,
    neighbours,
)
from gaq_compile.errors import StructureError, UnknownElementError

FORM = GraphFormat(TENSOR_NAMES, 3.0, 6.0, elements=(1, 6, 8))


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


def test_every_edge_has_its_reverse():
    tensors = collate([bulk("C", cubic=True)], FORM)
    edges = torch.cat(
        [tensors["receivers"][:, None], tensors["senders"][:, None], tensors["edge_vec"].double()], 1
    )
    back = torch.cat([edges[:, 1:2], edges[:, :1], -edges[:, 2:]], 1)
    assert np.allclose(
        np.unique(edges.round(decimals=4), axis=0), np.unique(back.round(decimals=4) + 0.0, axis=0)
    )


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
