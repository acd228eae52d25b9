"""Find faster constants for a potential's kernels on this machine; ``quantize`` and ``load`` use them.

    python examples/tune.py sevennet-0 --trials 64
    python examples/tune.py my_potential.gaq --kernels linear

Every measurement is stored as it is made: stop whenever you like and start again, nothing is measured
twice. The database is ``$GAQ_CACHE_DIR/tuning/<target>.jsonl`` (by default in ``~/.cache/gaq_compile``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from gaq_compile import load, quantize
from gaq_compile.backends.tvm.database import database_path
from gaq_compile.backends.tvm.tune_space import FAMILIES
from gaq_compile.datasets import example_structures
from gaq_compile.errors import GaqError
from gaq_compile.potential import Potential
from gaq_compile.tools.tune import tune_potential


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="sevennet-0", help="sevennet-0, so3lr, or a .gaq file")
    parser.add_argument("--scheme", default="w8a8", help="for a named model (default: w8a8)")
    parser.add_argument("--trials", type=int, default=64, help="candidates to measure at most (default: 64)")
    every = ",".join(FAMILIES)
    parser.add_argument("--kernels", default=every, help=f"which to tune, by comma (default: {every})")
    options = parser.parse_args()
    console = Console()
    try:
        potential = open_potential(options.model, options.scheme)
        families = tuple(name.strip() for name in options.kernels.split(","))
        tune_potential(potential, trials=options.trials, families=families, console=console)
        console.print(f"database: {database_path(potential.report.target)}", soft_wrap=True)
    except GaqError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; what was measured is stored, and the same command goes on from here")
        return 130
    return 0


def open_potential(model: str, scheme: str) -> Potential:
    """A saved potential, or a pretrained one by name, quantized with a bundled molecule."""
    if Path(model).suffix == ".gaq":
        return load(model)
    structure = example_structures("azobenzene")[0]
    return quantize(model, structure, scheme, measure=False)


if __name__ == "__main__":  # candidates are built and measured in processes that import this file
    sys.exit(main())
