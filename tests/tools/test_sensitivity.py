"""sensitivity: each node's quantization alone, against the same node quantized by `quantize`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from ase.build import bulk
from rich.console import Console

import gaq_compile
from gaq_compile.config import QuantConfig, resolve
from gaq_compile.errors import ConfigError
from gaq_compile.verify.structures import rattled


@pytest.fixture(scope="module")
def found(springs):
    return gaq_compile.sensitivity(*springs, "w8a8", progress=False)


def test_every_node_is_there_in_order(found):
    assert {(n.label, n.what) for n in found.nodes} == {
        (label, what) for label in ("first", "second", "third") for what in ("weights", "activations")
    }
    forces = [n.force_mev_per_a for n in found.nodes]
    assert forces == sorted(forces, reverse=True) and np.isfinite(forces).all()
    still = [(n.label, n.what) for n in found.nodes if n.force_mev_per_a == 0]
    assert still == [("third", "activations")]  # linear in them: what is rounded there moves no gradient
    assert all((n.bytes > 0) == (n.what == "weights") for n in found.nodes)
    assert found.together > found.nodes[0].force_mev_per_a / 2


def test_a_pattern_chooses_nodes(found, springs):
    some = gaq_compile.sensitivity(*springs, "w8a8", nodes="sec*", progress=False)
    assert some.nodes == tuple(n for n in found.nodes if n.label == "second")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "settings"),
    [
        ("0_convolution.weight_nn.layer2", {"weight_bits": 8, "activation": None}),
        ("1_convolution.weight_nn.layer2", {"weight_bits": None, "activation": "s8 m8d8"}),
    ],
)
def test_a_node_alone_is_what_quantize_gives_for_it_alone(label, settings):
    pytest.importorskip("sevenn")
    salt = rattled(bulk("NaCl", "rocksalt", 5.64, cubic=True), 0.1, 3)
    found = gaq_compile.sensitivity("sevennet-0", salt, "w8a8", nodes=label, progress=False)
    what = "weights" if settings["weight_bits"] else "activations"
    (node,) = (n for n in found.nodes if n.what == what)
    assert node.bits == ("s8" if what == "weights" else "s8 m8d8")
    config = resolve(QuantConfig("alone"), {label: settings})
    options = {"backend": "reference", "measure": False, "progress": False}
    alone, exact = (gaq_compile.quantize("sevennet-0", salt, c, **options) for c in (config, "fp32"))
    tests = [rattled(salt, 0.05, 101), rattled(salt, 0.04, 102)]
    difference = [a.forces - b.forces for a, b in zip(alone(tests), exact(tests), strict=True)]
    error = 1e3 * float(np.abs(np.concatenate(difference)).mean())
    assert node.force_mev_per_a == pytest.approx(error, rel=0.02)


def test_it_can_be_printed_drawn_and_stored(found, tmp_path):
    out = io.StringIO()
    found.print(Console(file=out, width=140), shown=3)
    assert found.nodes[0].label in out.getvalue() and "6 nodes together" in out.getvalue()
    assert found.plot(tmp_path / "nodes.png").stat().st_size > 5000
    assert found.to_dict()["nodes"][0]["force_mev_per_a"] == found.nodes[0].force_mev_per_a


@pytest.mark.parametrize(("scheme", "nodes"), [("w8", "no_such_layer"), ("fp32", "*")])
def test_nothing_to_measure_is_an_error(springs, scheme, nodes):
    with pytest.raises(ConfigError, match="no node"):
        gaq_compile.sensitivity(*springs, scheme, nodes=nodes, progress=False)
