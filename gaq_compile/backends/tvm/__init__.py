"""Generated kernels, compiled by TVM. TVM itself is imported only when a kernel is built."""

from .backend import TVMBackend

__all__ = ["TVMBackend"]
