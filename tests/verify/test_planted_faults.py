"""Faults of the kind that a compiler makes, planted in real compiled models: which check finds each.

The faults go into the graphs of SevenNet-0 and SO3LR and run on the reference backend; the models
without a fault pass every check of the contract.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch.fx import GraphModule, Node

import gaq_compile
from gaq_compile.backends.base import make_backend
from gaq_compile.capture.graphs import collate
from gaq_compile.datasets import example_structures
from gaq_compile.ir.layout import blocks
from gaq_compile.ir.specs import gate_spec, linear_spec, tensor_product_spec
from gaq_compile.passes.derive_forces import derive_forces
from gaq_compile.passes.fold_integers import fold_integers
from gaq_compile.passes.graph_tools import attribute, calls, copied, finished, gaq
from gaq_compile.passes.lower import lower
from gaq_compile.passes.simplify import simplify
from gaq_compile.potential import Potential
from gaq_compile.testing import Limits, NotClaimed, PotentialContract, Tolerances, failures
from gaq_compile.verify.structures import rattled

pytest.importorskip("sevenn")
pytest.importorskip("so3krates_torch")

BACKEND = "tvm" if importlib.util.find_spec("tvm_ffi") else "reference"
NO_PARITY = NotClaimed("SevenNet-0 treats every feature as even: rotations only, in the original too")
# what second-order rounding to 8 bits costs on these structures, and half as much again
ROUNDED = {"energy": 0.5, "forces": 5.0, "stress": 0.1}
EVERYTHING = {"energy", "forces", "stress", "gradient", "stress_gradient", "rotation", "net_force"}


def salt() -> Atoms:
    """8 atoms of rock salt."""
    return rattled(bulk("NaCl", "rocksalt", 5.64, cubic=True), 0.05, 3)


@cache
def sevennet(scheme: str, backend: str = BACKEND) -> Potential:
    return gaq_compile.quantize("sevennet-0", salt(), scheme, backend=backend, measure=False, progress=False)


@cache
def so3lr(scheme: str) -> Potential:
    frames = example_structures("ethanol")[:2]
    return gaq_compile.quantize("so3lr", frames, scheme, backend=BACKEND, measure=False, progress=False)


class SevenNet(PotentialContract):
    cutoffs = (5.0,)
    steps = 60
    rattle = 0.2  # in a more regular crystal, features with l = 2 hardly matter, nor faults in them
    tolerances = Tolerances(reflection=NO_PARITY, gradient=1.5e-4)
    scheme = "fp32"

    def calculator(self):
        return sevennet(self.scheme)

    def structures(self):
        return [salt()]

    def original(self):
        return "sevennet-0"


class TestSevenNet(SevenNet):
    pass


class TestSevenNetInIntegers(SevenNet):
    scheme = "w8"
    tolerances = Tolerances(reflection=NO_PARITY, gradient=1.5e-4, **ROUNDED)


class TestSO3LRInIntegers(PotentialContract):
    cutoffs = (4.5, 12.0)  # the second of dispersion and electrostatics
    far = 20.0
    steps = 60
    tolerances = Tolerances(gradient=1.5e-4, **ROUNDED)

    def calculator(self):
        return so3lr("w8")

    def structures(self):
        return example_structures("ethanol")[5:6]

    def original(self):
        return "so3lr"


def test_the_original_of_sevennet_is_not_invariant_under_reflections():
    contract = type("Contract", (SevenNet,), {"tolerances": Tolerances(), "rattle": 0.2})()
    contract.calculator = contract.original  # type: ignore[method-assign]
    subject = contract.subject
    subject.evaluate = subject.original
    assert set(failures(contract, ("rotation", "reflection"))) == {"reflection"}


# --- faults -------------------------------------------------------------------------------------

LINEAR_PATH = re.compile(r"1_self_interaction_2|1\.interaction_block\.from_features")
Plant = Callable[[GraphModule], None]


def with_fault(potential: Potential, plant: Plant) -> Potential:
    """The potential on the reference backend, its forces' graph changed by ``plant``."""
    graph = copied(potential.graphs["fold_integers"])
    plant(graph)
    return _lowered(potential, finished(graph))


def with_wrong_energy(potential: Potential, plant: Plant, structure: Atoms) -> Potential:
    """The same with the fault in the energy, of which the forces are then the true gradient."""
    graph = copied(potential.graphs["insert_mddq"])
    plant(graph)
    partner = Atoms(
        structure.get_chemical_symbols()[:1] * 3, positions=[[0, 0, 0], [1.5, 0, 0], [0, 1.6, 0.2]]
    )
    tensors = collate([structure, partner], potential.form)
    example = [tensors[name] for name in potential.form.inputs]
    derived = derive_forces(finished(graph), potential.form, example)
    return _lowered(potential, fold_integers(simplify(derived, differentiated=True)))


def _lowered(potential: Potential, graph: GraphModule) -> Potential:
    lowered, _ = lower(graph, [make_backend("reference")])
    graphs = {**potential.graphs, "fold_integers": graph, "lower": lowered}
    return Potential(graphs, potential.form, potential.config, potential.report, potential.calibrated)


def found_by(potential: Potential, contract: type[PotentialContract], names: set[str]) -> set[str]:
    """Which of the named checks fail."""
    broken = type("Broken", (contract,), {"calculator": lambda self: potential})
    return set(failures(broken(), tuple(sorted(names))))


def scaled_path(gm: GraphModule) -> None:
    """(a) one tensor product path's gradient times 1.05, its forward pass untouched."""
    node = list(calls(gm, gaq.conv_backward.default))[2]
    spec = tensor_product_spec(str(node.args[-2]))
    items = [f"{i}.{j}.{k}*{c!r}" for i, j, k, c in spec.instructions]
    i, j, k, c = spec.instructions[0]
    items[0] = f"{i}.{j}.{k}*{1.05 * c!r}"
    text = f"{spec.irreps_x} * {spec.irreps_sh} -> {spec.irreps_out} | {' '.join(items)}"
    node.update_arg(len(node.args) - 2, text)


def scaled_linear_path(gm: GraphModule) -> None:
    """(a) one path of a layer's transpose times 1.05: another scale in the backward pass only."""
    found = (n for n in _integer_layers(gm, transpose=True) if LINEAR_PATH.search(str(n.args[-1])))
    node = next(found)
    path = linear_spec(str(node.args[5])).paths[0]
    scale = attribute(gm, node.args[3]).clone()
    scale[path.scale_offset : path.scale_offset + path.block_out.mul] *= 1.05
    gm.register_buffer("wrong_scale", scale)
    with gm.graph.inserting_before(node):
        node.update_arg(3, gm.graph.get_attr("wrong_scale"))


def dropped_term(gm: GraphModule) -> None:
    """(b) a convolution's gradient by the directions of its edges is lost."""
    node = list(calls(gm, gaq.conv_backward.default))[1]
    term = next(user for user in node.users if user.args[1] == 1)
    with gm.graph.inserting_after(term):
        nothing = gm.graph.call_function(torch.ops.aten.zeros_like.default, (term,))
    term.replace_all_uses_with(nothing, delete_user_cb=lambda user: user is not nothing)


def transposed_block(gm: GraphModule) -> None:
    """(c) an l = 2 block read in the other layout: components and channels exchanged."""
    gate = next(n for n in calls(gm, gaq.gate.default) if "2e" in gate_spec(str(n.args[1])).irreps_out)
    irreps = gate_spec(str(gate.args[1])).irreps_out
    block = next(b for b in blocks(irreps) if b.l == 2)
    order = torch.arange(sum(b.mul * b.components for b in blocks(irreps)))
    here = slice(block.base, block.base + block.mul * block.components)
    order[here] = order[here].reshape(block.mul, block.components).T.flatten()
    gm.register_buffer("transposed", order)
    users = list(gate.users)
    with gm.graph.inserting_after(gate):
        index = gm.graph.get_attr("transposed")
    with gm.graph.inserting_after(index):
        wrong = gm.graph.call_function(torch.ops.aten.index_select.default, (gate, 1, index))
    for user in users:
        user.replace_input_with(gate, wrong)


def zeroed_forces(gm: GraphModule) -> None:
    """(d) forces are zeros."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    results = list(output.args[0])
    with gm.graph.inserting_before(output):
        results[2] = gm.graph.call_function(torch.ops.aten.zeros_like.default, (results[2],))
    output.args = (tuple(results),)


def exchanged_scales(gm: GraphModule) -> None:
    """(e) two output channels of a layer have each other's weight scale, forward and backward."""
    node = next(n for n in _integer_layers(gm, transpose=False) if "self_interaction_2" in str(n.args[-1]))
    _exchange_extremes(gm, str(node.args[3].target))


def exchanged_steps(gm: GraphModule) -> None:
    """(e) wherever several activation steps stand side by side, two have each other's place."""
    operators = (gaq.int_irreps_linear.default, gaq.mddq.default)
    steps = {n.args[1] for n in gm.graph.nodes if n.target in operators and isinstance(n.args[1], Node)}
    several = {str(node.target) for node in steps if attribute(gm, node).numel() > 1}
    assert several, "no several steps in one place"
    for name in several:
        _exchange_extremes(gm, name)


def _integer_layers(gm: GraphModule, *, transpose: bool) -> list[Node]:
    return [n for n in calls(gm, gaq.int_irreps_linear.default) if n.args[8] is transpose]


def _exchange_extremes(gm: GraphModule, name: str) -> None:
    values = getattr(gm, name).clone()
    flat = values.flatten()
    low, high = int(flat.argmin()), int(flat.argmax())
    flat[[low, high]] = flat[[high, low]]
    gm.register_buffer(name, flat.reshape(values.shape))


@pytest.mark.parametrize("scheme", ["fp32", "w8"])
@pytest.mark.parametrize(
    ("plant", "caught"),
    [
        (scaled_path, {"gradient", "stress_gradient"}),
        (dropped_term, {"gradient"}),  # it acts across the edges: the stress hardly feels it
        (zeroed_forces, {"gradient"}),
    ],
    ids=["scaled-path", "dropped-term", "zeroed-forces"],
)
def test_a_wrong_backward_pass_is_not_the_gradient(scheme, plant, caught):
    """The original need not be at hand, and what 8 bits may cost hides nothing here."""
    contract = TestSevenNet if scheme == "fp32" else TestSevenNetInIntegers
    found = found_by(with_fault(sevennet(scheme), plant), contract, EVERYTHING)
    assert caught <= found
    assert not found & {"energy", "rotation", "net_force"}
    if scheme == "fp32" or plant is zeroed_forces:  # the others are as small as what 8 bits cost
        assert "forces" in found


def test_a_scaled_path_of_an_integer_layer_is_not_the_gradient():
    for potential, contract in ((sevennet("w8"), TestSevenNetInIntegers), (so3lr("w8"), TestSO3LRInIntegers)):
        broken = with_fault(potential, scaled_linear_path)
        assert "gradient" in found_by(broken, contract, EVERYTHING)


@pytest.mark.parametrize("scheme", ["fp32", "w8"])
def test_a_transposed_block_does_not_turn_with_the_structure(scheme):
    """Its forces are the true gradient of a wrong energy."""
    contract = TestSevenNet if scheme == "fp32" else TestSevenNetInIntegers
    broken = with_wrong_energy(sevennet(scheme), transposed_block, salt())
    found = found_by(broken, contract, EVERYTHING)
    assert "rotation" in found and not found & {"gradient", "stress_gradient", "net_force"}


def test_exchanged_scales_give_another_potential():
    """Everything else holds: it is a sound potential, just not the one that was asked for."""
    broken = with_fault(sevennet("w8"), exchanged_scales)
    found = found_by(broken, TestSevenNetInIntegers, EVERYTHING)
    assert "forces" in found and found <= {"energy", "forces", "stress"}


def test_exchanged_activation_steps_give_another_potential():
    class Rounded(SevenNet):
        tolerances = Tolerances(
            energy=20.0,
            forces=40.0,
            rotation=Limits(energy=10.0, force=100.0, stress=0.1),
            reflection=NO_PARITY,
            gradient=NotClaimed("rounded activations: the energy is a staircase"),
        )

    names = {"energy", "forces", "rotation", "gradient"}
    sound = with_fault(sevennet("w8a8", "reference"), lambda gm: None)
    assert found_by(sound, Rounded, names) == set()
    assert {"energy", "forces"} <= found_by(with_fault(sound, exchanged_steps), Rounded, names)


def test_zeroed_forces_cannot_pass_without_an_original():
    class Alone(SevenNet):
        def original(self):
            return None

    found = failures(
        type("Broken", (Alone,), {"calculator": lambda self: with_fault(sevennet("w8"), zeroed_forces)})()
    )
    assert {"rotation", "translation", "permutation", "gradient", "net_force"} <= set(found)
    assert "forces vanish" in str(found["gradient"])
