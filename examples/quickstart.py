"""A real potential on a real molecule: its graph before and after, its report, its forces.

python examples/quickstart.py [--model so3lr|sevennet-0] [--scheme w8]
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from torch.fx import GraphModule

import gaq_compile
from gaq_compile.capture import find_recipe
from gaq_compile.capture.pretrained import load_model
from gaq_compile.datasets import example_structures
from gaq_compile.ir.printing import format_graph, label_of

# One layer of each model, by its modules' names.
LAYERS = {
    "so3lr": ("transformers.1.euclidean_attention_block", "transformers.1.interaction_block"),
    "sevennet-0": ("2_self_interaction_1", "2_convolution", "2_self_interaction_2"),
}


def main() -> None:
    options = arguments()
    warnings.simplefilter("ignore")  # the model packages' own
    frames = example_structures("azobenzene")
    model = load_model(options.model)

    fast = gaq_compile.quantize(options.model, frames[:4], options.scheme, backend=options.backend)

    for stage, title in (("tag_irreps", "before: captured, tagged with irreps"), ("lower", "after: lowered")):
        print(f"\n# {title}\n")
        print(layer_code(fast.graphs[stage], LAYERS[options.model]))
    print()
    fast.report.print()
    compare(find_recipe(model).original(model).predict(frames[9]), fast(frames[9]))

    path = Path(options.out) / f"{options.model}-{options.scheme}.gaq"
    path.parent.mkdir(parents=True, exist_ok=True)
    fast.save(path)
    again = gaq_compile.load(path, backend=options.backend)(frames[9])
    print(
        f"\nwrote {path} ({path.stat().st_size / 1024:.0f} KiB); "
        f"loaded again, the energy differs by {again.energy - fast(frames[9]).energy} eV"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(LAYERS), default="so3lr")
    parser.add_argument("--scheme", default=gaq_compile.config.DEFAULT_SCHEME)
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--out", default="out", help="folder for the .gaq file")
    return parser.parse_args()


def layer_code(graph: GraphModule, modules: tuple[str, ...], most: int = 8) -> str:
    """The lines of the printed graph that came from a layer's modules (forward pass only)."""
    text = {line.split(" = ")[0].strip(): line for line in format_graph(graph).splitlines()}
    found = []
    for node in graph.graph.nodes:
        line, label = text.get(node.name, ""), label_of(node) or str(node.meta.get("label", ""))
        labels = (label, *node.meta.get("modules", ()))
        if "backward" in line or "_grad" in line or len(found) == most:
            break
        if line and any(module in label for module in modules for label in labels):
            found.append(" ".join(line.split()))
    return "\n".join(found)


def compare(original, compiled) -> None:
    """Energy and forces of a frame that calibration has not seen."""
    print("\n# a frame that calibration has not seen\n")
    print(f"energy   original {original.energy:14.4f} eV    compiled {compiled.energy:14.4f} eV")
    print("forces of the first atoms (eV/Å)")
    for before, after in zip(original.forces[:4], compiled.forces[:4], strict=True):
        print("         original " + " ".join(f"{f:8.4f}" for f in before), end="    ")
        print("compiled " + " ".join(f"{f:8.4f}" for f in after))
    error = 1e3 * float(np.abs(original.forces - compiled.forces).mean())
    print(f"mean error of a force component: {error:.3f} meV/Å")


if __name__ == "__main__":
    main()
