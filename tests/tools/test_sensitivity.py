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
def salt():
    pytest.importorskip("sevenn")
    return rattled(bulk("NaCl", "rocksalt", 5.64, cubic=True), 0.1, 3)


@pytest.fixture(scope="module")
def found(salt):
    return gaq_compile.sensitivity("sevennet-0", salt, "w8a8", nodes="[01]_convolution*", progress=False)


def test_every_matching_node_is_there_in_order(found):
    layers = {f"{i}_convolution.weight_nn.layer{j}" for i in (0, 1) for j in (0, 1, 2)}
    assert {(n.label, n.what) for n in found.nodes} == {
        (k, w) for k in layers for w in ("weights", "activations")
    }
    forces = [n.force_mev_per_a for n in found.nodes]
    assert forces == sorted(forces, reverse=True) and forces[-1] > 0 and np.isfinite(forces).all()
    assert all((n.bytes > 0) == (n.what == "weights") for n in found.nodes)
    assert found.together > found.nodes[0].force_mev_per_a / 2


@pytest.mark.parametrize(
    ("label", "settings"),
    [
        ("0_convolution.weight_nn.layer2", {"weight_bits": 8, "activation": None}),
        ("1_convolution.weight_nn.layer2", {"weight_bits": None, "activation": "s8 m8d8"}),
    ],
)
def test_a_node_alone_is_what_quantize_gives_for_it_alone(found, salt, label, settings):
    what = "weights" if settings["weight_bits"] else "activations"
    (node,) = (n for n in found.nodes if (n.label, n.what) == (label, what))
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
    assert found.nodes[0].label in out.getvalue() and "12 together" in out.getvalue()
    assert found.plot(tmp_path / "nodes.png").stat().st_size > 5000
    assert found.to_dict()["nodes"][0]["force_mev_per_a"] == found.nodes[0].force_mev_per_a


@pytest.mark.parametrize(("scheme", "nodes"), [("w8", "no_such_layer"), ("fp32", "*")])
def test_nothing_to_measure_is_an_error(salt, scheme, nodes):
    with pytest.raises(ConfigError, match="no node"):
        gaq_compile.sensitivity("sevennet-0", salt, scheme, nodes=nodes, progress=False)
