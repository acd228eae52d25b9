"""``import gaq_compile`` needs neither TVM nor a model package, and says so where it does."""

from __future__ import annotations

import subprocess
import sys

# Removing a package means that nobody finds it: neither an import, nor torch's own look for "tvm",
# nor importlib.metadata.
HIDE = """
import sys

MODULES = {"tvm", "tvm_ffi", "sevenn", "so3krates_torch"}
DISTRIBUTIONS = {"apache-tvm", "apache-tvm-ffi", "sevenn", "so3krates-torch"}

class Hidden:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, context):
        if context.name in DISTRIBUTIONS:
            return
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(context)

sys.meta_path[:] = [Hidden(list(sys.meta_path))]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True, timeout=300)


def test_package_and_command_import() -> None:
    done = run("""
import gaq_compile, gaq_compile.cli, gaq_compile.datasets, gaq_compile.integrations.ase
for name in gaq_compile.__all__:
    getattr(gaq_compile, name)
assert len(gaq_compile.datasets.example_structures("ethanol")) == 10
""")
    assert done.returncode == 0, done.stderr


def test_missing_model_package_is_named() -> None:
    done = run("""
import gaq_compile
from gaq_compile.datasets import example_structures
for model, package in (("so3lr", "so3krates-torch"), ("sevennet-0", "sevenn")):
    try:
        gaq_compile.quantize(model, example_structures("ethanol")[0], backend="reference")
    except gaq_compile.errors.MissingPackageError as error:
        assert f"pip install {package}" in str(error), error
    else:
        raise SystemExit(f"{model} was loaded")
""")
    assert done.returncode == 0, done.stderr


def test_missing_tvm_is_named() -> None:
    done = run("""
import gaq_compile.api
from gaq_compile.backends.base import make_backend
assert make_backend("reference").name == "reference"
try:
    make_backend("tvm")
except gaq_compile.errors.MissingPackageError as error:
    assert "gaq-compile[tvm]" in str(error), error
else:
    raise SystemExit("a TVM backend without TVM")
""")
    assert done.returncode == 0, done.stderr
