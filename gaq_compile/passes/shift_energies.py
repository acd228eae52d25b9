"""Take back the mean energy error that rounding leaves on each element.

Before::

    atomic = ...

After::

    atomic = ... + self.energy_shift[numbers]

A shift per element moves no atom: forces, symmetry and true gradients stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..capture.graphs import GraphFormat
from .graph_tools import add_buffer, aten, copied, finished, is_call


def shift_energies(
    quantized: GraphModule, exact: GraphModule, form: GraphFormat, batches: Sequence[Sequence[Tensor]]
) -> GraphModule:
    """Correct ``quantized`` so that the mean atomic energy of every element is that of ``exact``.

    Args:
        quantized: inputs ``form.inputs`` -> (N,) atomic energies, eV.
        exact: the same before rounding.
        form: the inputs; a model of its own tensors knows no elements and stays as it is.
        batches: calibration batches. An element that is not in them is not shifted.
    """
    if form.positions is not None or not batches:
        return quantized
    numbers = torch.cat([dict(zip(form.inputs, batch, strict=True))["numbers"] for batch in batches])
    with torch.no_grad():
        errors = torch.cat([(exact(*batch) - quantized(*batch)).double() for batch in batches])
    size = max([int(numbers.max()), *form.elements]) + 1
    sums = torch.zeros(size, dtype=torch.float64).index_add(0, numbers, errors)
    shift = sums / torch.bincount(numbers, minlength=size).clamp(min=1)
    if not bool(torch.isfinite(shift).all()):
        return quantized  # nothing to average; the checks that follow say what is wrong
    return _shifted(quantized, shift)


def _shifted(quantized: GraphModule, shift: Tensor) -> GraphModule:
    gm = copied(quantized)
    output = gm.graph.output_node()
    numbers = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "numbers")
    name = add_buffer(gm, "energy_shift", shift)
    with gm.graph.inserting_before(output):
        table = gm.graph.get_attr(name)
        per_atom = gm.graph.call_function(aten.index.Tensor, (table, [numbers]))
        total = gm.graph.call_function(aten.add.Tensor, (output.args[0], per_atom))
    output.args = (total,)
    return finished(gm)


def shift_table(shifted: GraphModule) -> Node | None:
    """The table (``get_attr``) that :func:`shift_energies` has added to a graph; None if it has not."""
    total = shifted.graph.output_node().args[0]
    per_atom = total.args[1] if isinstance(total, Node) and is_call(total, aten.add.Tensor) else None
    if not isinstance(per_atom, Node) or not is_call(per_atom, aten.index.Tensor):
        return None
    table, (numbers,) = cast(Any, per_atom.args)
    return table if (table.op, numbers.op, numbers.name) == ("get_attr", "placeholder", "numbers") else None
