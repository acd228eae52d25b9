"""Tests of GPU kernels share an emulator and the checks of the CPU's kernels."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # test modules are imported by their place, not by name
