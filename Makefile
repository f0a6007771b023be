# make demo       the main job on the example pair, in a virtual environment of its own
# make test       what every change must pass
# make test-slow  the tests that take longer
# make test-web   HTML reports in an installed Chromium
# make faults     killed processes, full disks, resuming
# make check      formatting, lint, types, layers, generated documentation
# make bench      ratios against rivals, on a checkpoint of about 1 GB
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_OPTIONS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test test-slow test-web faults check docs bench clean

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(TORCH_OPTIONS) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable ".[dev,demo]"
	@touch $@

$(VENV)/.web: $(VENV)/.dev
	$(PIP) install --quiet --editable ".[dev,demo,web]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/e2e/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not web"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

test-web: $(VENV)/.web
	$(BIN)/python -m pytest -n auto --dist loadfile -m web tests/web

faults: $(VENV)/.dev
	$(BIN)/python -m pytest tests/faults

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) build dist benchmarks/work .pytest_cache .mypy_cache .ruff_cache .hypothesis
