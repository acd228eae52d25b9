"""What several test files share: one quantized SO3LR, made once."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

# Tests run in several processes: threads that spin while they wait, or are bound to the same cores, would
# slow each other down many times. Before anything starts a pool of them.
for _name, _value in (
    ("OMP_WAIT_POLICY", "PASSIVE"),
    ("TVM_THREAD_POOL_SPIN_COUNT", "0"),
    ("TVM_BIND_THREADS", "0"),
    ("GAQ_CACHE_GRAPHS", "0"),  # tests plant faults in passes, which no key knows of
):
    os.environ.setdefault(_name, _value)

sys.path.insert(0, str(Path(__file__).parent))  # test modules are imported by their place, not by name

import gaq_compile  # noqa: E402
from gaq_compile.datasets import example_structures  # noqa: E402


def pytest_configure() -> None:
    """Where ``GAQ_REQUIRE`` names packages (CI does), their tests must run, not be skipped."""
    for name in os.environ.get("GAQ_REQUIRE", "").split(","):
        if name:
            importlib.import_module(name)


@pytest.fixture(scope="session")
def so3lr_w8a8() -> gaq_compile.Potential:
    """SO3LR in 8-bit integers, calibrated on two frames of azobenzene."""
    pytest.importorskip("so3krates_torch")
    pytest.importorskip("tvm_ffi")
    frames = example_structures("azobenzene")[:2]
    return gaq_compile.quantize("so3lr", frames, "w8a8", measure=False, progress=False)


@pytest.fixture(scope="session")
def so3lr_file(so3lr_w8a8: gaq_compile.Potential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved."""
    return so3lr_w8a8.save(tmp_path_factory.mktemp("saved") / "so3lr.gaq")
