"""What kernels' tests share; those of GPU kernels also an emulator and the checks of the CPU's kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # test modules are imported by their place, not by name


@pytest.fixture
def poisoned_memory():
    """New tensors begin as NaN, so that an element which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
