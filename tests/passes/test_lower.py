"""lower: the first backend that says yes runs a node; every refusal is recorded, strict raises."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from gaq_compile.backends.base import Lowered, Refused
from gaq_compile.backends.reference import ReferenceBackend
from gaq_compile.config import preset
from gaq_compile.errors import LoweringError
from gaq_compile.passes.calibrate import quantization_sites
from gaq_compile.passes.fold_integers import fold_integers
from gaq_compile.passes.insert_mddq import insert_mddq
from gaq_compile.passes.lower import KernelCall, lower
from gaq_compile.passes.weigh_channels import ChannelCosts
from gaq_compile.passes.widen_activations import widen_activations

gaq, aten = torch.ops.gaq, torch.ops.aten


@dataclass
class OnlyGates:
    """A backend that runs gates, and doubles them to be seen."""

    name: str = "only_gates"
    target: str = "here"
    groups_linears: bool = False
    asked: list[str] = field(default_factory=list)

    def lower(self, node, attribute):
        self.asked.append(str(node.args[-1]))
        if node.target is gaq.gate.default:
            spec, label = node.args[1:]
            return Lowered(lambda x: 2 * gaq.gate(x, spec, label), "f32 doubled", node.args[:1])
        return Refused(f"cannot do {node.args[-1]}")


class Nobody:
    name, target, groups_linears = "nobody", "nowhere", False

    def lower(self, node, attribute):
        return Refused("never")


@pytest.fixture
def graph(with_weights):
    def function(self, x):
        y = gaq.irreps_linear.default(x, self.w, None, "4x0e -> 4x0e", False, "net.linear")
        y = aten.mul.Tensor(gaq.gate.default(y, "4x0e ; ; ; silu ; ", "net.gate"), 3.0)
        return gaq.irreps_linear.default(y, self.w, None, "4x0e -> 4x0e", True, "net.linear")

    torch.manual_seed(0)
    return with_weights(function, w=torch.randn(16))


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_reference_runs_everything(graph, x, assert_pure):
    lowered, placements = assert_pure(lambda g: lower(g, [ReferenceBackend()], strict=True), graph)
    assert torch.equal(lowered(x), graph(x))
    assert [(p.label, p.op, p.backend, p.reason) for p in placements] == [
        ("net.linear", "gaq::irreps_linear", "reference", None),
        ("net.gate", "gaq::gate", "reference", None),
        ("net.linear", "gaq::irreps_linear", "reference", None),
    ]


def test_fallback_is_recorded(graph, x, assert_pure):
    backend = OnlyGates()
    lowered, placements = assert_pure(lambda g: lower(g, [backend, ReferenceBackend()]), graph)
    assert backend.asked == ["net.linear", "net.gate", "net.linear"]
    assert torch.allclose(lowered(x), 2 * graph(x))
    by_op = {p.op: p for p in placements}
    assert by_op["gaq::gate"].backend == "only_gates" and by_op["gaq::gate"].arithmetic == "f32 doubled"
    assert by_op["gaq::gate"].reason is None
    assert by_op["gaq::irreps_linear"].backend == "reference"
    assert by_op["gaq::irreps_linear"].reason == "only_gates: cannot do net.linear"
    names = {n.name: n for n in lowered.graph.nodes}
    assert all(p.node in names for p in placements)
    assert "only_gates: cannot do" in names[placements[0].node].meta["runs_on"]
    assert sum(isinstance(m, KernelCall) for m in lowered.modules()) == 1


def test_strict_names_every_node_and_reason(graph):
    with pytest.raises(LoweringError) as error:
        lower(graph, [OnlyGates(), ReferenceBackend()], strict=True)
    text = str(error.value)
    assert "2 nodes" in text and text.count("net.linear (gaq::irreps_linear)") == 2
    assert "only_gates: cannot do net.linear" in text and "net.gate" not in text


def test_a_node_that_nobody_runs(graph):
    with pytest.raises(LoweringError, match=r"irreps_linear[\s\S]*net\.linear[\s\S]*nobody: never"):
        lower(graph, [Nobody()])


def test_metadata_is_kept(graph):
    node = next(n for n in graph.graph.nodes if n.target is gaq.gate.default)
    node.meta["irreps"], node.meta["bits"] = "4x0e", "s8"
    lowered, placements = lower(graph, [OnlyGates(), ReferenceBackend()])
    new = next(n for n in lowered.graph.nodes if n.name == placements[1].node)
    assert new.meta["irreps"] == "4x0e" and new.meta["bits"] == "s8" and new.meta["label"] == "net.gate"


def test_integer_weights_are_reported(with_weights, x):
    codes, scale = torch.ones(16, dtype=torch.int8), torch.ones(4)

    def function(self, x):
        spec, scheme = "4x0e -> 4x0e", "f32"
        return gaq.int_irreps_linear.default(x, None, self.c, self.s, None, spec, scheme, 8, False, "l")

    _, (placement,) = lower(with_weights(function, c=codes, s=scale), [ReferenceBackend()])
    assert placement.integer_weights and "integers simulated" in placement.arithmetic


SPEC = "9x0e+4x0e+5x1o -> 6x0e+7x1o"
STEPS = torch.linspace(0.006, 0.03, 18)[torch.randperm(18, generator=torch.Generator().manual_seed(2))]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "naive-w8a8", "exact-w8a8", "exact-w4a8", "w8a16"])
def test_kernels_get_the_steps_of_channels(with_weights, scheme):
    """Generated kernels give what the reference gives, for a layer and for its gradient."""
    backend = pytest.importorskip("gaq_compile.backends.tvm.backend").TVMBackend()
    forward = with_weights(
        lambda self, x: gaq.irreps_linear.default(x, self.w, None, SPEC, False, "l"),
        w=torch.randn(13 * 6 + 5 * 7, generator=torch.Generator().manual_seed(1)),
    )
    config = preset(scheme)
    sites = widen_activations(quantization_sites(forward, config), {"l": STEPS}, ChannelCosts(), None)
    quantized = insert_mddq(forward, config, sites)
    node = next(n for n in quantized.graph.nodes if n.target is gaq.irreps_linear.default)
    with quantized.graph.inserting_after(node):
        back = quantized.graph.call_function(node.target, (node, *node.args[1:4], True, "l"))
    quantized.graph.output_node().args = ((node, back),)
    quantized.recompile()
    folded = fold_integers(quantized)
    lowered, placements = lower(folded, [backend], strict=True)
    assert [p.op for p in placements] == ["gaq::int_irreps_linear"] * 2
    steps = [n.args[1] for n in folded.graph.nodes if n.target is gaq.int_irreps_linear.default]
    assert [s is not None for s in steps] == [True, config.weight_bits == 8]
    x = torch.randn(20, 28, generator=torch.Generator().manual_seed(3))
    for got, want in zip(lowered(x), folded(x), strict=True):
        assert float((got - want).abs().max()) < 5e-3 * float(want.abs().max())  # a tie may round apart
        assert float((got - want).abs().median()) < 1e-5 * float(want.abs().max())


def test_a_common_grid_without_integer_weights_has_no_kernel(with_weights, x):
    backend = pytest.importorskip("gaq_compile.backends.tvm.backend").TVMBackend()
    steps = torch.tensor([0.02, 0.003, 0.011, 0.007])
    for scheme, runs_on in (("s8 m8d8", "tvm"), ("s8 m8d8 common", "reference")):
        graph = with_weights(
            lambda self, x, scheme=scheme: gaq.mddq.default(x, self.s, "4x0e", scheme, "l"), s=steps
        )
        lowered, (placement,) = lower(graph, [backend, ReferenceBackend()])
        assert placement.backend == runs_on
        assert placement.reason is None or "common grid" in placement.reason
        torch.testing.assert_close(lowered(x), graph(x))


def test_ordering_of_edges_stays_with_torch():
    graph = torch.fx.Graph()
    s, r = graph.placeholder("s"), graph.placeholder("r")
    graph.output(graph.call_function(gaq.sort_edges.default, (s, r, 3)))
    lowered, placements = lower(torch.fx.GraphModule(torch.nn.Module(), graph), [Nobody()])
    assert placements == () and len(lowered(torch.tensor([0]), torch.tensor([2]))) == 6


def test_kernels_of_one_name_do_not_replace_each_other(with_weights, x):
    """Labels that differ only in punctuation keep their own kernels."""

    class Times:
        name, target = "times", "here"

        def lower(self, node, attribute):
            factor = float(attribute(node.args[1])[0])
            return Lowered(lambda v: v * factor, "f32", node.args[:1])

    def function(self, x):
        y = gaq.irreps_linear.default(x, self.a, None, "4x0e -> 4x0e", False, "net.0_a")
        return gaq.irreps_linear.default(y, self.b, None, "4x0e -> 4x0e", False, "net_0.a")

    graph = with_weights(function, a=torch.full((16,), 2.0), b=torch.full((16,), 5.0))
    lowered, _ = lower(graph, [Times()])
    assert torch.equal(lowered(x), 10 * x)
