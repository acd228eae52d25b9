"""The kernels around the large ones: gate, harmonics, activation quantization, per-row products.

All functions take and return float32, contiguous, component-major tensors whose number of rows is
decided by the call, and may be 0.
"""

from __future__ import annotations

from .gate_kernel import gate_backward_source, gate_source, lower_gate, lower_gate_backward
from .harmonics_kernel import (
    harmonics_backward_source,
    harmonics_source,
    lower_harmonics,
    lower_harmonics_backward,
)
from .mddq_kernel import lower_mddq, lower_mddq_backward, mddq_backward_source, mddq_source
from .product_kernel import lower_product, lower_product_backward, product_backward_source, product_source

__all__ = [
    "gate_backward_source",
    "gate_source",
    "harmonics_backward_source",
    "harmonics_source",
    "lower_gate",
    "lower_gate_backward",
    "lower_harmonics",
    "lower_harmonics_backward",
    "lower_mddq",
    "lower_mddq_backward",
    "lower_product",
    "lower_product_backward",
    "mddq_backward_source",
    "mddq_source",
    "product_backward_source",
    "product_source",
]
