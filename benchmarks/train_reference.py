"""Train the float32 reference model on rMD17: ``gaq_compile/data/models/<molecule>.safetensors``.

    python benchmarks/train_reference.py azobenzene --data rmd17 --folder out/train/azobenzene

The files (``rmd17_<molecule>_train_01.npz`` and ``..._test_01.npz``) are the published split 01 of
revised MD17 (figshare 12672038, CC0): of the train file the first 950 frames are learned, the last 50
watched; errors are of the test file. Goes on where it was if it is started again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from gaq_compile.capture.graphs import GraphFormat
from gaq_compile.models import EuclideanTransformer, TransformerConfig, save_checkpoint
from gaq_compile.training.convolution import with_fast_convolutions
from gaq_compile.training.fit import FitSettings, errors_of, fit
from gaq_compile.training.frames import Frames, read_rmd17

TRAINED = 950
INPUTS = ("numbers", "edge_vec", "receivers", "senders", "batch", "ptr")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("molecule")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .npz files")
    parser.add_argument("--folder", type=Path, required=True, help="where the state is kept")
    parser.add_argument("--epochs", type=int, default=FitSettings.epochs)
    parser.add_argument("--batch", type=int, default=FitSettings.batch)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--optimizer", choices=("adam", "muon"), default="muon")
    parser.add_argument("--energy-weight", type=float, default=FitSettings.energy_weight)
    parser.add_argument("--channels", type=int, default=TransformerConfig.channels)
    parser.add_argument("--attention", default=TransformerConfig.attention)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    frames = read_rmd17(options.data / f"rmd17_{options.molecule}_train_01.npz")
    elements = tuple(sorted(set(frames[0].numbers.tolist())))
    config = TransformerConfig(elements, channels=options.channels, attention=options.attention)
    form = GraphFormat(INPUTS, config.cutoff, elements=elements)
    train, valid = Frames(frames[:TRAINED], form), Frames(frames[TRAINED:], form)
    torch.manual_seed(options.seed)
    model = EuclideanTransformer(config)
    model.set_scales(train.element_energies(elements), train.force_rms, train.neighbours)
    settings = FitSettings(
        options.epochs, options.batch, options.rate, energy_weight=options.energy_weight, seed=options.seed,
        optimizer=options.optimizer,
    )  # fmt: skip
    fast = with_fast_convolutions(model)
    history = fit(fast, train, valid, settings, options.folder)
    test = Frames(read_rmd17(options.data / f"rmd17_{options.molecule}_test_01.npz"), form)
    errors = errors_of(fast.eval(), test)
    command = shlex.join(["python", *sys.argv])
    print(f"test: energy {errors.energy:.2f} meV, forces {errors.force:.2f} meV/Å")
    save_checkpoint(model, options.folder / "model.safetensors", f"rMD17 {options.molecule}; {command}")
    result = {"command": command, "test": vars(errors), "validation": history[-1]}
    (options.folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
