"""The registry of backends: known names, typed errors."""

from __future__ import annotations

import pytest

import gaq_compile.backends.reference  # noqa: F401 - registers itself
from gaq_compile.backends import base
from gaq_compile.backends.base import Lowered, Refused, known_backends, make_backend, register_backend
from gaq_compile.errors import ConfigError


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError) as error:
        make_backend("cuda")
    assert "cuda" in str(error.value) and "reference" in error.value.fix


def test_own_backends_can_be_registered(monkeypatch):
    monkeypatch.setattr(base, "_FACTORIES", dict(base._FACTORIES))

    class Mine:
        name = "mine"

        def __init__(self, target):
            self.target = target or "here"

        def lower(self, node, attribute):
            return Refused("lazy")

    register_backend("mine", Mine)
    assert "mine" in known_backends() and list(known_backends()) == sorted(known_backends())
    assert make_backend("mine").target == "here" and make_backend("mine", "there").target == "there"


def test_reference_says_yes_and_keeps_arguments(monkeypatch):
    import torch
    from torch.fx import Graph

    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.gaq.gate.default, (x, "2x0e ; ; ; silu ; ", "g"))
    backend = make_backend("reference")
    answer = backend.lower(node, lambda n: pytest.fail("needs no weights"))
    assert isinstance(answer, Lowered) and answer.arithmetic == "f32" and answer.arguments == node.args
    assert (backend.name, backend.target) == ("reference", "torch")
