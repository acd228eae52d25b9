"""What ``speed.py`` times: the original model, what torch's compilers make of it, and ours.

A side is made for one case and returns forces when it is called, so that what is timed is also what
is checked: a compiler whose forces are not the original's is out of the race, with its error.

* ``eager``: the original model in its own package.
* ``compile``: ``torch.compile`` of the original model, in the fastest of the modes that work.
* ``aoti``: AOTInductor. The originals differentiate while they run, which ``torch.export`` does not
  take, so this side gets what they do not have: our own graph of energy and forces, fused and
  simplified as ours are before kernels are generated, with every operator written out in torch's.
* the others are schemes of this package.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from torch import Tensor, nn
from torch.fx import GraphModule

import gaq_compile
from gaq_compile.capture import find_recipe
from gaq_compile.capture.graphs import GraphFormat, collate
from gaq_compile.capture.pretrained import load_model
from gaq_compile.errors import VerificationError
from gaq_compile.operators import reference
from gaq_compile.passes.derive_forces import outputs
from gaq_compile.passes.graph_tools import copied, finished, gaq

EAGER, COMPILE, AOTI = "eager", "compile", "aoti"
EXACT = (COMPILE, AOTI, "fp32")  # sides whose forces are to be the original's
TOLERANCE = 1e-4  # of the largest force component; float32 sums in another order differ by some 1e-6
RECOMPILATIONS = 256  # of one function: SevenNet's layers share theirs, and torch gives up after 8

Forces = Callable[[], Tensor]


@dataclass(frozen=True)
class Side:
    """One contestant.

    Attributes:
        run: computes energy and forces; returns the forces.
        notes: what else is to be known, for the JSON.
    """

    run: Forces
    notes: dict[str, Any]


def make_side(
    name: str, model: str, case: str, structures: Sequence[Atoms], work: Path, modes: Sequence[str]
) -> Side:
    """A side for one case.

    Args:
        name: ``eager``, ``compile``, ``aoti``, or a scheme.
        model: the pretrained model.
        case: the case's name.
        structures: evaluated together.
        work: where compiled files lie (:func:`gaq_file`, :func:`aoti_file`).
        modes: of ``torch.compile``, to be tried in order.
    """
    if name == EAGER:
        return Side(_eager(model, structures), {})
    if name == COMPILE:
        return _compiled(model, structures, modes)
    if name == AOTI:
        return _aoti(aoti_file(work, model, case), form_file(work, model), structures)
    potential = gaq_compile.load(gaq_file(work, model, name))
    tensors = collate(structures, potential.form)
    return Side(lambda: potential.evaluate(tensors)["forces"], {})


def gaq_file(work: Path, model: str, scheme: str) -> Path:
    """A compiled potential's file."""
    return work / f"{model}-{scheme}.gaq"


def aoti_file(work: Path, model: str, case: str) -> Path:
    """A forces graph that AOTInductor has compiled for a case."""
    return work / f"{model}-{case.replace(' ', '-')}.pt2"


def form_file(work: Path, model: str) -> Path:
    """What such a graph takes."""
    return work / f"{model}.form.json"


def disagreement(truth: Tensor, forces: Tensor) -> float:
    """The largest difference of a component, over the largest component."""
    return float((forces - truth).abs().max() / truth.abs().max())


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]


# --- eager and torch.compile --------------------------------------------------------------------


def _eager(
    model: str, structures: Sequence[Atoms], change: Callable[[nn.Module], Any] | None = None
) -> Forces:
    network = load_model(model)
    original: Any = find_recipe(network).original(network)
    prepared = original.prepare(structures[0]) if len(structures) == 1 else original.prepare_batch(structures)
    if change is not None:
        original.change(change)
    return lambda: _forces(original.run(prepared))


def _forces(answer: Any) -> Tensor:
    key = "forces" if isinstance(answer, Mapping) and "forces" in answer else "inferred_force"
    found: Tensor = answer[key]
    return found.detach()


def _compiled(model: str, structures: Sequence[Atoms], modes: Sequence[str]) -> Side:
    """The fastest mode whose forces are right.

    Raises:
        VerificationError: if there is none; says why, mode by mode.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILATIONS
    truth = _eager(model, structures)()
    tried: dict[str, Any] = {}
    best: tuple[float, str, Forces] | None = None
    for mode in modes:
        run = _eager(model, structures, lambda network, mode=mode: torch.compile(network, mode=mode))
        try:
            ms, seconds = _checked(run, truth)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            tried[mode] = first_line(error)
            continue
        tried[mode] = {"ms": ms, "compile_seconds": seconds}
        if best is None or ms < best[0]:
            best = (ms, mode, run)
    if best is None:
        raise VerificationError("; ".join(f"{mode}: {reason}" for mode, reason in tried.items()))
    return Side(best[2], {"mode": best[1], "modes": tried})


def _checked(run: Forces, truth: Tensor, calls: int = 5) -> tuple[float, float]:
    """Milliseconds of a call and seconds of the first ones, which compile.

    Raises:
        VerificationError: if the forces are not ``truth``.
    """
    start = time.perf_counter()
    for _ in range(2):
        forces = run()
    seconds = time.perf_counter() - start
    error = disagreement(truth, forces)
    if not error <= TOLERANCE:
        raise VerificationError(f"forces differ by {100 * error:.3g} % of the largest")
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times), seconds


# --- AOTInductor --------------------------------------------------------------------------------

# fmt: off
_MEANING: dict[Any, Callable[..., Any]] = {
    getattr(gaq, name).default: getattr(reference, name)
    for name in (
        "conv", "conv_backward", "gate", "gate_backward", "irreps_linear", "relayout", "spherical_harmonics",
        "spherical_harmonics_backward", "tensor_product", "tensor_product_backward",
    )
}
# fmt: on
_UNLABELLED = (gaq.relayout.default, gaq.sort_edges.default)


def _ends(senders: Tensor, receivers: Tensor, num_nodes: int) -> list[Tensor]:
    """What convolutions in torch need of ``sort_edges``: they read the first two only.

    The rest is left out in favour of the one who has to run it.
    """
    return [senders, receivers, *[receivers] * 2, *[senders] * 2]


_MEANING[gaq.sort_edges.default] = _ends


def plain_graph(folded: GraphModule) -> GraphModule:
    """A float graph of energy and forces with every gaq operator replaced by its meaning in torch.

    Checks of the model's own code that do nothing but raise are left out.
    """
    gm = copied(folded)
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _MEANING:
            node.args = node.args if node.target in _UNLABELLED else node.args[:-1]
            node.target = _MEANING[node.target]
        elif "assert" in str(node.target):
            gm.graph.erase_node(node)
    return finished(gm)


def build_aoti(model: str, case: str, structures: Sequence[Atoms], work: Path) -> str | None:
    """Compile a model's forces graph for a case, with its numbers of atoms and edges fixed.

    Dynamics would change the edges, so this favours AOTInductor. With free numbers ``torch.export`` takes
    the graph (if ``torch.backends.opt_einsum`` is off, which compares sizes), and its result is right, but
    the code that is generated from it still has the example's numbers in it, and reads beyond its inputs.

    Args:
        model: whose ``fp32`` potential lies in ``work``.
        case: the case's name.
        structures: what is evaluated at once.
        work: where the result goes.

    Returns:
        None, or why there is none.
    """
    potential = gaq_compile.load(gaq_file(work, model, "fp32"))
    module = _Callable(plain_graph(potential.graphs["fold_integers"]))
    tensors = collate(structures, potential.form)
    inputs = tuple(tensors[name] for name in potential.form.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module(*inputs)  # constants are made at the first call, and not to be made while tracing
            program = torch.export.export(module, inputs, strict=False)
            torch._inductor.aoti_compile_and_package(program, package_path=str(aoti_file(work, model, case)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return first_line(error)
    # beside it, so that using it takes nothing of ours into memory
    form_file(work, model).write_text(json.dumps(potential.form.to_dict()))
    return None


class _Callable(nn.Module):
    """A graph as a module with plain arguments."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.forces = graph

    def forward(self, *tensors: Tensor) -> Any:
        return self.forces(*tensors)


def _aoti(file: Path, form_of: Path, structures: Sequence[Atoms]) -> Side:
    package = torch._inductor.aoti_load_package(str(file))
    form = GraphFormat.from_dict(json.loads(form_of.read_text()))
    tensors = collate(structures, form)
    inputs = tuple(tensors[name] for name in form.inputs)
    forces = outputs(form).index("forces")

    def run() -> Tensor:
        with torch.no_grad():
            found: Tensor = package(*inputs)[forces]
        return found

    return Side(run, {})
