"""Structures that come with the package (rMD17 frames with labels), and how to take some of many."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

import numpy as np
from ase import Atoms

from .errors import ConfigError

T = TypeVar("T")

EXAMPLES = ("azobenzene", "ethanol", "aspirin", "paracetamol")


def example_structures(name: str) -> list[Atoms]:
    """Ten frames of a molecule from rMD17 (see ``gaq_compile/data/README.md``).

    Each frame carries its reference energy (eV) and forces (n, 3) eV/Å, PBE/def2-SVP, as ASE's
    single-point calculator, and its ``info["rmd17_index"]``.

    Args:
        name: "azobenzene" (24 atoms), "ethanol" (9), "aspirin" (21) or "paracetamol" (20).

    Raises:
        ConfigError: for another name.
    """
    from ase.io import read

    if name not in EXAMPLES:
        raise ConfigError(f"no example structures named {name!r}", fix=f"use one of: {', '.join(EXAMPLES)}")
    text = (resources.files("gaq_compile") / "data" / f"{name}.xyz").read_text(encoding="utf-8")
    frames = read(io.StringIO(text), index=":", format="extxyz")
    return frames if isinstance(frames, list) else [frames]


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most so many of ``items``, from the first to the last; one alone is the first."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
