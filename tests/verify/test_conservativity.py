from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from ase.build import bulk, molecule

from gaq_compile.errors import ConfigError, StructureError
from gaq_compile.verify.conservativity import conservativity, stress_consistency
from gaq_compile.verify.types import Evaluate, Prediction, from_calculator


def test_true_forces_pass(emt, morse, crystal, molecules):
    for evaluate, structures in ((emt, crystal), (morse, molecules)):
        found = conservativity(evaluate, structures)
        assert found.error < 1e-5
        assert found.best.order == 4
        assert found.scale > 100
        assert len(found.steps) == 5


def test_second_and_fourth_order(morse, molecules):
    table = {(s.step, s.order): s.error for s in conservativity(morse, molecules).steps}
    assert table[0.02, 2] / table[0.01, 2] == pytest.approx(4.0, rel=0.1)
    assert table[0.01, 4] / table[0.005, 4] == pytest.approx(16.0, rel=0.2)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda f: 1.05 * f, 0.05),
        (lambda f: 0.0 * f, 1.0),
        (lambda f: -f, 2.0),
        (lambda f: f + 0.3 * np.abs(f).mean() * np.roll(np.sign(f), 1), 0.2),
    ],
    ids=["scaled", "zeroed", "sign", "added"],
)
def test_wrong_forces_are_flagged_at_their_size(emt, crystal, planted, fault, expected):
    wrong = planted(emt, lambda _, p: replace(p, forces=fault(p.forces)))
    assert conservativity(wrong, crystal).error == pytest.approx(expected, rel=0.5)


def test_one_dead_atom_is_flagged(emt, crystal, planted):
    def fault(atoms, p: Prediction):
        forces = p.forces.copy()
        forces[5] = 0.0
        return replace(p, forces=forces)

    assert conservativity(planted(emt, fault), crystal).error > 0.03


def test_directions_perpendicular_to_the_force_do_not_blow_up(morse, molecules):
    for seed in range(4):  # a single direction may have hardly any projection
        assert conservativity(morse, molecules[:1], directions=1, seed=seed).error < 1e-4


@pytest.mark.parametrize("offset", [0.0, -100.0])
@pytest.mark.parametrize("size", [2, 5])
def test_float32_energies_are_judged_with_their_digits(emt, planted, float32, offset, size):
    from gaq_compile.verify.structures import rattled

    atoms = rattled(bulk("Cu", cubic=True) * (size, size, size), 0.08, 3)  # 32 and 500 atoms
    single = planted(emt, partial(float32, offset=offset))
    total = planted(emt, partial(float32, offset=offset, per_atom=False))
    fine = conservativity(single, [atoms], directions=2)
    coarse = conservativity(total, [atoms], directions=2)
    assert fine.error < 5e-4
    assert fine.error < 10 * fine.resolution + 1e-5
    assert coarse.resolution > 2 * fine.resolution
    wrong = planted(single, lambda _, p: replace(p, forces=1.01 * p.forces))
    assert conservativity(wrong, [atoms], directions=8).error == pytest.approx(0.01, rel=0.5)


def test_a_piecewise_constant_energy_shows_at_small_steps(emt, crystal, planted):
    def fault(atoms, p: Prediction):
        return replace(p, energy=float(np.round(p.energy / 0.2) * 0.2), energies=None)

    found = conservativity(planted(emt, fault), crystal, steps=(4e-2, 1e-2, 1e-3))
    plain = {s.step: s.error for s in found.steps if s.order == 2}
    assert plain[1e-3] > 3 * plain[4e-2]  # the smallest steps mostly stay on one stair
    assert found.error > 0.01


def test_a_relaxed_structure_is_compared_absolutely():
    from ase.calculators.emt import EMT

    found = conservativity(from_calculator(EMT()), [bulk("Cu", cubic=True)])
    assert found.scale == pytest.approx(10.0, rel=0.5)  # the floor
    assert found.error < 1e-3


def test_true_stress_passes_and_wrong_ones_do_not(emt, lennard_jones, crystal, planted):
    for evaluate in (emt, lennard_jones):
        assert stress_consistency(evaluate, crystal).error < 1e-5

    def altered(change) -> Evaluate:
        return planted(emt, lambda _, p: replace(p, stress=change(p.stress)))

    assert stress_consistency(altered(lambda s: 0.5 * s), crystal).error == pytest.approx(0.5, rel=0.1)
    assert stress_consistency(altered(lambda s: -s), crystal).error == pytest.approx(2.0, rel=0.1)
    assert stress_consistency(altered(lambda s: 0.0 * s), crystal).error == pytest.approx(1.0, rel=0.1)
    twist = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 0]])
    assert stress_consistency(altered(lambda s: s + 0.02 * twist), crystal).error > 0.1


def test_true_shear_is_seen(emt, crystal, planted):
    swapped = planted(emt, lambda _, p: replace(p, stress=p.stress[[1, 2, 0]][:, [1, 2, 0]]))
    assert stress_consistency(swapped, crystal).error > 0.01


def test_what_cannot_be_measured_is_refused(emt, morse, crystal):
    with pytest.raises(ConfigError, match="two or more different"):
        conservativity(emt, crystal, steps=(1e-2,))
    with pytest.raises(ConfigError, match="positive steps"):
        stress_consistency(emt, crystal, strains=(1e-2, -1e-2))
    with pytest.raises(StructureError, match="no stress"):
        stress_consistency(morse, [molecule("H2O")])
    with pytest.raises(StructureError, match="no structures"):
        conservativity(emt, [])
