"""Find faster constants for a potential's kernels; ``quantize`` and ``load`` use them.

    python examples/tune.py sevennet-0 --trials 64
    python examples/tune.py my_potential.gaq --kernels linear
    python examples/tune.py my_potential.gaq --tracker 10.0.0.1:9190 --key nodes

The last tunes on other machines, which need apache-tvm and nothing else, and which are to be in a trusted
network: on one of them ``python -m tvm.exec.rpc_tracker --port 9190``, on each that shall measure
``python -m tvm.exec.rpc_server --tracker 10.0.0.1:9190 --key nodes``. What is found is for their processor.

Every measurement is stored as it is made: stop whenever you like and start again, nothing is measured
twice. The database is ``$GAQ_CACHE_DIR/tuning/<target>.jsonl`` (by default in ``~/.cache/gaq_compile``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from gaq_compile import load, quantize
from gaq_compile.backends.tvm.tune_remote import tracker_at
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
    parser.add_argument("--tracker", metavar="HOST:PORT", help="measure on the machines of a TVM RPC tracker")
    parser.add_argument("--key", default="", help="the name that these machines' servers were started with")
    options = parser.parse_args()
    console = Console()
    try:
        tracker = tracker_at(options.tracker, options.key) if options.tracker else None
        potential = open_potential(options.model, options.scheme)
        families = tuple(name.strip() for name in options.kernels.split(","))
        tune_potential(potential, trials=options.trials, families=families, console=console, tracker=tracker)
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
