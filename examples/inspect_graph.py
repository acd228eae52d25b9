"""Every stage of a compilation as text, and the interesting ones as pictures.

    python examples/inspect_graph.py [--model so3lr|sevennet-0] [--scheme w8a8] [--print STAGE]

Writes ``out/graphs/<stage>.txt`` for all stages, and ``.html`` (search, details by click) and
``.svg`` for those named by ``--draw``.
"""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from pathlib import Path

import gaq_compile
from gaq_compile.capture.pretrained import PRETRAINED
from gaq_compile.datasets import example_structures
from gaq_compile.ir.printing import format_graph, short_name


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")  # the model packages' own
    frames = example_structures("ethanol")[:2]
    fast = gaq_compile.quantize(options.model, frames, options.scheme, backend=options.backend, measure=False)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'stage':24} {'nodes':>6}  gaq operators")
    for stage, graph in fast.graphs.items():
        (folder / f"{stage}.txt").write_text(format_graph(graph), encoding="utf-8")
        names = [short_name(n) for n in graph.graph.nodes if n.op == "call_function"]
        kinds = Counter(name.removeprefix("gaq.") for name in names if name.startswith("gaq."))
        shown = ", ".join(f"{count} {name}" for name, count in kinds.most_common(5))
        calls = sum(n.op == "call_module" for n in graph.graph.nodes)
        shown += f", {calls} kernel calls" if calls else ""
        print(f"{stage:24} {len(graph.graph.nodes):6}  {shown}")
    for stage in options.draw:
        for suffix in (".html", ".svg"):
            path = gaq_compile.draw(
                fast.graphs[stage], folder / f"{stage}{suffix}", title=f"{options.model} · {stage}"
            )
            print(f"wrote {path}")
    if options.print:
        print(format_graph(fast.graphs[options.print]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(PRETRAINED), default="so3lr")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--draw", nargs="*", default=["tag_irreps", "insert_mddq", "lower"], metavar="STAGE")
    parser.add_argument("--print", metavar="STAGE", help="print this stage's graph")
    parser.add_argument("--out", default="out/graphs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
