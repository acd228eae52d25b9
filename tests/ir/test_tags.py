"""Irreps tags are set once; a pass that would change one is stopped and named."""

from __future__ import annotations

import pytest
from torch.fx import Graph

from gaq_compile.errors import IrrepsError
from gaq_compile.ir.tags import irreps_of, tag


def test_tags_are_simplified_and_repeatable():
    node = Graph().placeholder("x")
    assert irreps_of(node) is None
    tag(node, "2x0e+3x0e+1x1o", "first")
    tag(node, "5x0e+1x1o", "second")
    assert irreps_of(node) == "5x0e+1x1o"


def test_conflict_names_pass_node_and_both_irreps():
    node = Graph().placeholder("features")
    tag(node, "4x0e", "first")
    with pytest.raises(IrrepsError) as error:
        tag(node, "4x0o", "my_pass")
    for part in ("my_pass", "features", "4x0e", "4x0o"):
        assert part in str(error.value)
    assert irreps_of(node) == "4x0e"


def test_same_dimension_is_not_the_same_irreps():
    node = Graph().placeholder("x")
    tag(node, "1x1o", "a")
    with pytest.raises(IrrepsError):
        tag(node, "3x0e", "b")


def test_only_nodes_have_irreps():
    assert irreps_of(3.0) is None and irreps_of(None) is None
