# `make demo` and `make test` do everything on a machine with Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*)
STAMP := $(VENV)/installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format clean

demo: $(STAMP)
	$(BIN)/robplug train benchmarks/demo/standard.toml
	$(BIN)/robplug train benchmarks/demo/adversarial.toml
	$(BIN)/robplug run benchmarks/demo/plan.toml
	$(BIN)/robplug train benchmarks/demo/segmentation.toml
	$(BIN)/robplug run benchmarks/demo/pixels.toml

test: $(STAMP) lint
	$(BIN)/python -m pytest -n 2 -q -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --no-cache --fix .
	$(BIN)/ruff format --no-cache .

# Installed anew whenever the metadata of the host or of a plugin, or the constraints, change.
$(STAMP): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	@echo "installing into $(VENV), about 2 GB with PyTorch; this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]" $(foreach plugin,$(PLUGINS),-e "$(plugin)[test]")
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs
