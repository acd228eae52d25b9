# make demo   a real potential on a real molecule, from an empty checkout
# make test   the tests; make slow adds the long ones
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# make whole-gpu   all GPU kernels of both models, emulated and through nvcc: tens of minutes
.PHONY: demo test slow whole-gpu lint env clean
demo: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest -q -m "not slow and not whole_gpu" -n auto --maxprocesses 4 --dist loadfile

slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

whole-gpu: $(READY)
	$(BIN)/python -m pytest -q -m whole_gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(READY)

# torch first: then no other package pulls in another build of it
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tvm,models,dev]"
	touch $@

clean:
	rm -rf .venv out
