"""Every GPU kernel of a model against float64, and its time beside torch's; whole potentials, too.

    python benchmarks/gpu.py --models sevennet-0 so3lr --json benchmarks/results/gpu.json

Kernels run on what flows through the graph for a real structure. Each is compared with the operator's
meaning in float64 (on the CPU), and timed alternately with the same operator in torch, eager and
through ``torch.compile``, and a convolution also with e3nn's ``TensorProduct`` between a gather and a
scatter. Whole potentials are timed beside the same float32 graph in torch, for one molecule and for
about 1,000 atoms. cuEquivariance and OpenEquivariance are named in the result if they are installed.

On machines without a GPU it stops at once and says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.build import bulk
from e3nn.o3 import TensorProduct
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

import gaq_compile
from accuracy import write
from gaq_compile.backends.base import Backend, Refused, make_backend
from gaq_compile.backends.tvm.cuda.driver import require_gpu
from gaq_compile.capture.graphs import collate
from gaq_compile.datasets import example_structures
from gaq_compile.ir.specs import tensor_product_spec
from gaq_compile.passes.graph_tools import attribute, gaq
from gaq_compile.passes.lower import compact
from gaq_compile.passes.row_groups import FusedRows
from gaq_compile.verify.measure import alternate
from gaq_compile.verify.structures import rattled

Run = Callable[..., Any]
OTHERS = ("cuequivariance_torch", "openequivariance")


def structures(model: str) -> dict[str, Atoms]:
    """What a model is calibrated and timed on: a molecule, and about 1,000 atoms."""
    molecule = example_structures("azobenzene")[0]
    if model == "so3lr":
        many = molecule.copy()
        for k in range(1, 42):
            moved = example_structures("azobenzene")[k % 10].copy()
            moved.translate([20.0 * (k % 7), 20.0 * (k // 7), 0.0])
            many += moved
        return {"molecule": molecule, "1,000 atoms": many}
    silicon = bulk("Si", cubic=True)
    return {"molecule": rattled(silicon, 0.05, 1), "1,000 atoms": rattled(silicon * (5, 5, 5), 0.05, 3)}


class CheckedKernels(Interpreter):
    """Runs a grouped graph in torch, and each node's kernel beside it.

    Args:
        graph_module: the stage ``group_rows``.
        backend: whose kernels are checked.
        device: where the graph runs.
        synchronize: waits for the device, for honest times.
        runs: timed pairs of each kernel; 0 for errors only.
        compiled: also time ``torch.compile``.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        backend: Backend,
        device: torch.device,
        synchronize: Callable[[], None],
        runs: int,
        compiled: bool = True,
    ) -> None:
        super().__init__(graph_module)
        self.backend, self.device, self.synchronize = backend, device, synchronize
        self.runs, self.compiled = runs, compiled
        self.rows: list[dict[str, Any]] = []

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        """The arguments; what is made anew is made where the graph runs."""
        found = super().fetch_args_kwargs_from_env(n)
        return map_aggregate(found, lambda v: self.device if isinstance(v, torch.device) else v)

    def run_node(self, n: Node) -> Any:
        operator = self._operator(n)
        if operator is None:
            return super().run_node(n)
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        expected = operator(*arguments)
        self.rows.append(self._compared(n, operator, arguments))
        return expected

    def _operator(self, n: Node) -> Run | None:
        if n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), FusedRows):
            return self.fetch_attr(str(n.target))
        ours = n.op == "call_function" and getattr(n.target, "namespace", "") == "gaq"
        return n.target if ours and n.target is not gaq.sort_edges.default else None  # type: ignore[return-value]

    def _compared(self, n: Node, operator: Run, arguments: Any) -> dict[str, Any]:
        if isinstance(operator, FusedRows):
            answer, given = self.backend.lower_rows(operator), arguments
        else:
            answer = self.backend.lower(n, lambda node: attribute(self.module, node).cpu())
            given = (
                arguments if isinstance(answer, Refused) else self.map_nodes_to_values(answer.arguments, n)
            )
        row = {"node": n.name, "op": str(n.target), "label": str(n.args[-1] if n.args else "")}
        if isinstance(answer, Refused):
            return row | {"refused": answer.reason}
        tensors = [_compact(value) for value in given]
        exact = _exact(operator)(*map(_double, arguments))
        row |= {"arithmetic": answer.arithmetic, "error": error(answer.run(*tensors), exact)}
        if self.runs:
            sides: dict[str, Run] = {"eager": operator}
            if self.compiled:
                sides["torch.compile"] = torch.compile(operator, dynamic=False)
            if n.target is gaq.conv.default:
                sides["e3nn"] = e3nn_convolution(str(n.args[-2]), arguments[0].device)
            for name, side in sides.items():
                row |= self._timed(name, lambda side=side: side(*arguments), lambda: answer.run(*tensors))
        return row

    def _timed(self, name: str, side: Callable[[], Any], kernel: Callable[[], Any]) -> dict[str, Any]:
        def waited(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                call()
                self.synchronize()

            return run

        found = alternate(waited(side), waited(kernel), runs=self.runs, warmup=3)
        return {f"{name}_ms": found.a_ms, "kernel_ms": found.b_ms, f"faster_than_{name}": found.ratio}


def e3nn_convolution(spec: str, device: torch.device) -> Run:
    """Gather, e3nn's tensor product and scatter: the layouts are not turned, which costs e3nn nothing."""
    parsed = tensor_product_spec(spec)
    instructions = [(i, j, k, "uvu", True, 1.0) for i, j, k, _ in parsed.instructions]
    irreps = (parsed.irreps_x, parsed.irreps_sh, parsed.irreps_out)
    product = TensorProduct(*irreps, instructions, shared_weights=False, internal_weights=False).to(device)

    def run(x: Tensor, sh: Tensor, weight: Tensor, edges: list[Tensor], *_: Any) -> Tensor:
        messages = product(x[edges[0].long()], sh, weight)
        return messages.new_zeros(len(x), messages.shape[1]).index_add_(0, edges[1].long(), messages)

    return run


def error(found: Any, exact: Any) -> float:
    """The largest norm of a result's error relative to the result's, over all results."""
    single = isinstance(found, Tensor)
    worst = 0.0
    for a, b in zip((found,) if single else found, (exact,) if single else exact, strict=True):
        size = float(b.double().norm())
        difference = float((a.cpu().double() - b.double()).norm())
        found_error = difference / size if size > 0 else difference
        worst = found_error if math.isnan(found_error) else max(worst, found_error)
    return worst


def _compact(value: Any) -> Any:
    return [_compact(v) for v in value] if isinstance(value, list | tuple) else compact(value)


def _double(value: Any) -> Any:
    """The same on the CPU, floats in float64."""
    if isinstance(value, list | tuple):
        return [_double(v) for v in value]
    if not isinstance(value, Tensor):
        return value
    return value.cpu().double() if value.is_floating_point() else value.cpu()


def _exact(operator: Run) -> Run:
    return copy.deepcopy(operator).cpu().double() if isinstance(operator, FusedRows) else operator


def kernels(potential: gaq_compile.Potential, atoms: Atoms, device: torch.device, runs: int) -> list[Any]:
    """One row for each kernel of a potential."""
    graph = copy.deepcopy(potential.graphs["group_rows"]).to(device)
    tensors = collate([atoms], potential.form)
    checked = CheckedKernels(graph, make_backend("tvm", "cuda"), device, torch.cuda.synchronize, runs)
    with torch.no_grad():
        checked.run(*(tensors[name].to(device) for name in potential.form.inputs))
    return checked.rows


def whole(file: Path, atoms: Atoms, runs: int) -> dict[str, Any]:
    """A potential beside the same graph in torch, both on the GPU, inputs and results on the CPU."""
    ours = gaq_compile.load(file, target="cuda", strict=True)
    plain = gaq_compile.load(file, backend="reference", target="cuda")
    tensors = collate([atoms], ours.form)
    found = alternate(lambda: plain.evaluate(tensors), lambda: ours.evaluate(tensors), runs=runs, warmup=5)
    return {"torch_ms": found.a_ms, "kernels_ms": found.b_ms, "ratio": found.ratio, "spread": found.spread}


def benchmark(model: str, scheme: str, runs: int, device: torch.device) -> dict[str, Any]:
    """Kernels and whole potentials of one model and scheme."""
    found = structures(model)
    examples = [found["molecule"]]
    potential = gaq_compile.quantize(
        model, examples, scheme, target="cuda", strict=True, measure=False, progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        file = potential.save(Path(folder) / "potential.gaq")
        potentials = [
            {"structure": name, "atoms": len(atoms), **whole(file, atoms, runs)}
            for name, atoms in found.items()
        ]
    return {
        "model": model,
        "scheme": scheme,
        "accuracy": dict(potential.report.accuracy),
        "potentials": potentials,
        "kernels": kernels(potential, found["1,000 atoms"], device, runs),
    }


def tables(results: list[dict[str, Any]], console: Console) -> None:
    """Print what was measured."""
    for result in results:
        table = Table(title=f"{result['model']} · {result['scheme']}", title_justify="left")
        columns = ("node", "arithmetic", "error", "kernel_ms", "eager_ms", "torch.compile_ms", "e3nn_ms")
        for name in columns:
            table.add_column(name, justify="left" if name in columns[:2] else "right")
        for row in result["kernels"]:
            figures = (f"{row[name]:.3g}" if name in row else "" for name in columns[2:])
            table.add_row(row["node"], row.get("arithmetic", row.get("refused", "")), *figures)
        console.print(table)
        for p in result["potentials"]:
            times = f"{p['torch_ms']:.2f} -> {p['kernels_ms']:.2f} ms, {p['ratio']:.1f}x"
            console.print(f"{result['model']} {result['scheme']}, {p['atoms']} atoms: {times}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("out/gpu.json"))
    parser.add_argument("--models", nargs="+", default=["sevennet-0", "so3lr"])
    parser.add_argument("--schemes", nargs="+", default=["fp32", "w8", "w8a8", "w4a8"])
    parser.add_argument("--runs", type=int, default=20, help="timed pairs")
    options = parser.parse_args()
    device = require_gpu()
    results = [benchmark(m, s, options.runs, device) for m in options.models for s in options.schemes]
    summary: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(device),
        "installed": [name for name in OTHERS if importlib.util.find_spec(name)],
        "results": results,
    }
    write(summary, options.json)
    tables(results, Console())


if __name__ == "__main__":
    main()
