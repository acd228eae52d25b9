"""Reference models: small, readable, on e3nn; compiled by ``quantize`` like any other potential."""

from __future__ import annotations

from .checkpoint import load_checkpoint, save_checkpoint
from .transformer import EuclideanTransformer, TransformerConfig

__all__ = ["EuclideanTransformer", "TransformerConfig", "load_checkpoint", "save_checkpoint"]
