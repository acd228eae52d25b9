"""A subject's structures: those that calibrate, those that choose, and how they are batched."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms

from gaq_compile.subject import Subject, _are_frames, _rattled_too


def _subject(sizes: list[int]) -> Subject:
    structures = [Atoms("H" * n, positions=3.0 * np.arange(3 * n).reshape(n, 3)) for n in sizes]
    form = SimpleNamespace(positions=None, inputs=("sizes",))
    return Subject(
        "sizes", SimpleNamespace(form=form), None, structures,
        lambda batch: {"sizes": torch.tensor([len(atoms) for atoms in batch])}, [], structures,
    )  # fmt: skip


def test_small_structures_are_calibrated_together():
    subject = _subject([20, 30, 14, 1, 100, 64, 65, 9])
    groups = [sizes.tolist() for (sizes,) in subject.batches(subject.structures)]
    assert groups == [[20, 30, 14], [1], [100], [64], [65], [9]]
    assert [s.tolist() for (s,) in subject.batches_alone(subject.structures[:2])] == [[20], [30]]


@pytest.mark.parametrize(
    ("sizes", "trials"),
    [
        ([24], [24] * 6),
        ([3], [3] * 16),
        ([256], [256] * 2),
        ([256, 3, 6, 12], [256, 3, 6, 12]),
        ([3, 256], [3, 256]),
        ([40, 30], [40, 30, 40, 30]),
        ([*range(10, 50)], [10, 13, 15, 18, 20, 23, 26, 28, 31, 33, 36, 39, 41, 44, 46, 49]),
    ],
)
def test_bits_are_chosen_on_every_structure_unless_there_are_many(sizes, trials):
    found = _subject(sizes).trials
    assert [len(atoms) for atoms in found] == trials
    assert len({atoms.positions.tobytes() for atoms in found}) == len(found)


@pytest.mark.parametrize(("atoms", "copies"), [(8, 33), (24, 12), (64, 3), (200, 3), (1, 90)])
def test_small_examples_are_rattled_more_often(atoms, copies):
    """What few atoms do not show is clipped: calibration sees 256, or three copies at least."""
    example = Atoms("H" * atoms, positions=np.arange(3.0 * atoms).reshape(-1, 3))
    found = _rattled_too([example])
    assert len(found) == 1 + copies and (len(found) * atoms >= 256 or atoms == 1)
    assert len({a.positions.tobytes() for a in found}) == len(found)
    assert found[0] == example


def test_calibration_batches_are_made_once():
    subject = _subject([20, 30])
    (sizes,) = (batch.tolist() for (batch,) in subject.calibration_batches)
    assert sizes == [20, 30] and subject.calibration_batches is subject.calibration_batches


def _frames(count: int, moved: float, seed: int = 0) -> list[Atoms]:
    molecule = Atoms("H8", positions=2.0 * np.arange(24.0).reshape(8, 3))
    random = np.random.default_rng(seed)
    return [Atoms("H8", positions=molecule.positions + random.normal(0, moved, (8, 3))) for _ in range(count)]


def test_frames_of_a_trajectory_are_not_rattled():
    """They show how far atoms move; few, still or different structures do not."""
    assert _are_frames(_frames(32, 0.05))
    assert not _are_frames(_frames(31, 0.05))
    assert not _are_frames(_frames(32, 1e-4))
    assert not _are_frames([*_frames(32, 0.05), Atoms("He8", positions=_frames(1, 0.05)[0].positions)])


def test_distances_across_a_cell_count():
    """One atom that crosses a periodic boundary has not moved."""
    cell = Atoms("H2", positions=[[0.0, 0, 0], [1.0, 0, 0]], cell=[5, 5, 5], pbc=True)
    wrapped = Atoms("H2", positions=[[0.0, 0, 0], [-4.0, 0, 0]], cell=[5, 5, 5], pbc=True)
    assert not _are_frames([cell, wrapped] * 16)
