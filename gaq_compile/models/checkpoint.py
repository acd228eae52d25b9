"""Models as files: weights as safetensors, the configuration beside them as JSON. No code is stored."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConfigError, FileFormatError
from .transformer import EuclideanTransformer, TransformerConfig

KIND = "gaq_compile.EuclideanTransformer"
VERSION = "1"


def save_checkpoint(model: EuclideanTransformer, path: str | Path, about: str = "") -> Path:
    """Write a model.

    Args:
        model: what to write.
        path: a file, which is replaced.
        about: a line for people: what it was trained on, and the command.

    Returns:
        The file.

    Raises:
        FileFormatError: if its folder is not there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileFormatError(f"no such folder: {path.parent}", where=str(path), fix="make it first")
    facts = {"kind": KIND, "version": VERSION, "config": json.dumps(model.config.to_dict()), "about": about}
    part = path.with_name(path.name + ".part")
    save_file({name: t.detach().contiguous() for name, t in model.state_dict().items()}, part, facts)
    return part.replace(path)  # whole or not at all


def load_checkpoint(path: str | Path) -> EuclideanTransformer:
    """Read a model that :func:`save_checkpoint` wrote, in evaluation mode.

    Raises:
        FileFormatError: if the file is missing, truncated, or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise FileFormatError(f"not a checkpoint: {error}", where=str(path)) from error
    if (facts.get("kind"), facts.get("version")) != (KIND, VERSION):
        raise FileFormatError(
            f"a file of kind {facts.get('kind')!r}, version {facts.get('version')!r}",
            where=str(path),
            fix=f"this version reads {KIND!r} {VERSION!r}",
        )
    try:
        model = EuclideanTransformer(TransformerConfig.from_dict(json.loads(facts["config"])))
        model.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError, ConfigError) as error:
        raise FileFormatError(
            f"no weights of the configuration beside them: {error}", where=str(path)
        ) from error
    return model.eval()
