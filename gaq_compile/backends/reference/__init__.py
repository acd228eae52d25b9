"""Plain torch: runs every gaq operator, slowly and readably."""

from .backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
