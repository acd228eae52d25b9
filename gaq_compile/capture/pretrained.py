"""Named pretrained potentials, with the weights that their own wheels ship, and user's files."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError, FileFormatError, MissingPackageError
from ..models import load_checkpoint


def _sevennet_0() -> nn.Module:
    from sevenn.calculator import SevenNetCalculator

    with warnings.catch_warnings(), _moments_once():
        warnings.simplefilter("ignore")
        return SevenNetCalculator("7net-0", device="cpu").model


@contextmanager
def _moments_once() -> Iterator[None]:
    """Let e3nn find the mean square of each activation function once.

    It takes a million seeded random numbers, the same each time, for every layer that has an activation:
    a third of the time that SevenNet takes to be built.
    """
    from e3nn.math import _normalize_activation as activations

    true = activations.moment
    activations.moment = functools.lru_cache(maxsize=64)(true)
    try:
        yield
    finally:
        activations.moment = true


def _so3lr() -> nn.Module:
    path = resources.files("so3krates_torch") / "pretrained" / "so3lr" / "so3lr.model"
    with resources.as_file(path) as file:
        return torch.load(file, map_location="cpu", weights_only=False).float()


def _reference(molecule: str) -> nn.Module:
    path = resources.files("gaq_compile") / "data" / "models" / f"{molecule}.safetensors"
    with resources.as_file(path) as file:
        return load_checkpoint(file)


# name -> (loader, pip package that ships the weights)
PRETRAINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "sevennet-0": (_sevennet_0, "sevenn"),
    "so3lr": (_so3lr, "so3krates-torch"),
    # of this package: trained on one molecule each (gaq_compile/data/README.md)
    "rmd17-azobenzene": (functools.partial(_reference, "azobenzene"), "gaq-compile"),
    "rmd17-ethanol": (functools.partial(_reference, "ethanol"), "gaq-compile"),
}


def load_model(name: str) -> nn.Module:
    """A pretrained potential by name, or a checkpoint by path: SevenNet's (``.pth``), or the reference
    model's (``.safetensors``, :func:`~gaq_compile.models.save_checkpoint`).

    Raises:
        ConfigError: for an unknown name, listing the known ones.
        MissingPackageError: if the package that ships the model is not installed.
        FileFormatError: if the file is no such checkpoint.
    """
    if name in PRETRAINED:
        loader, package = PRETRAINED[name]
        try:
            return loader()
        except ImportError as error:
            raise MissingPackageError(
                f"the model {name!r} comes with the package {package!r}: {error}",
                fix=f"pip install {package}",
            ) from error
    path = Path(name)
    if path.is_file():
        return load_checkpoint(path) if path.suffix == ".safetensors" else _checkpoint(path)
    raise ConfigError(
        f"no model named {name!r} and no such file", fix=f"use {', '.join(PRETRAINED)}, or a file"
    )


def _checkpoint(path: Path) -> nn.Module:
    """A SevenNet checkpoint. Checkpoints are pickles: only load those that you trust."""
    try:
        from sevenn.calculator import SevenNetCalculator

        with warnings.catch_warnings(), _moments_once():
            warnings.simplefilter("ignore")
            return SevenNetCalculator(str(path), device="cpu").model
    except ImportError as error:
        raise MissingPackageError(
            "SevenNet checkpoints need the package 'sevenn'", fix="pip install sevenn"
        ) from error
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, TypeError) as error:
        raise FileFormatError(
            f"not a SevenNet checkpoint: {error}",
            where=str(path),
            fix="pass a SevenNet checkpoint or a .gaq file",
        ) from error
