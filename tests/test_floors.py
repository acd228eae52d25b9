"""Floors: a file imports only from its own floor or from one below (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import gaq_compile

PACKAGE = Path(gaq_compile.__file__).parent
FILES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})  # which is made of every floor
TABLE = (PACKAGE.parent / "docs" / "architecture.md").read_text()


def floors() -> dict[str, int]:
    """``{"passes": 7, "config": 1, ...}`` as the table of the documentation says."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", TABLE, re.MULTILINE)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", names)}


def rooms(path: Path) -> list[tuple[str, str]]:
    """(own room, imported room) for every import inside the package, lazy ones included."""
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = list(inside[: len(inside) - node.level])
        target = base + (node.module.split(".") if node.module else [])
        names = [target[0]] if target else [alias.name for alias in node.names]
        found += [(inside[0], name) for name in names]
    return found


def test_every_room_has_a_floor():
    known = floors()
    missing = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert missing - set(known) == {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE).with_suffix("")))
def test_imports_go_down(path):
    known = floors()
    upwards = [(a, b) for a, b in rooms(path) if a != b and known[b] > known[a]]
    assert not upwards, f"{path.name} imports from a higher floor: {upwards}"
