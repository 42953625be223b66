# Every target sets up what it needs: a virtual environment with the pinned versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
# Compiled when imported, not when installed: most modules of torch and transformers never are.
INSTALL := $(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable
TESTS := $(BIN)/python -m pytest --durations=10

.PHONY: demo test test-all test-gpu test-comfyui check bench docs format clean
.DEFAULT_GOAL := demo

# What the package itself needs, and OpenVINO, which compiles on a CPU.
$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: constraints.txt pins for it" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) '.[cpu]'
	@touch $@

# And what its tests, benchmarks and checks need.
$(DEV): $(RUNTIME)
	@echo "installing what the tests need into $(VENV)"
	@$(INSTALL) '.[dev]'
	@touch $@

# And what the documentation is built with.
$(DOCS): $(RUNTIME)
	@echo "installing what the documentation needs into $(VENV)"
	@$(INSTALL) '.[docs]'
	@touch $@

demo: $(RUNTIME) ## a trained pipeline with and without caching: times, picture, report
	@$(BIN)/deepcache-fx compare --model benchmarks/models/fashion-t2i --guidance-scale 4 --out output.png

test: $(DEV) ## every promise, one representative of each family of tests: minutes
	$(TESTS) -n auto --dist worksteal -m "not thorough and not gpu and not comfyui"

test-all: $(DEV) ## the rest: the families in full, and properties with many examples
	$(TESTS) -n auto --dist worksteal -m "(thorough or hypothesis) and not gpu and not comfyui" --hypothesis-profile=thorough

test-gpu: $(DEV) ## the tests that need a CUDA device; without one they are skipped, and say so
	$(TESTS) -rs -m gpu

test-comfyui: $(DEV) ## the node in ComfyUI itself: COMFYUI=checkout [COMFYUI_PYTHON=python that has its requirements]
	@test -n "$(COMFYUI)" || echo "COMFYUI names no checkout of ComfyUI: what needs one is skipped (docs/comfyui.md)"
	$(TESTS) -rs tests/comfyui -m "comfyui or not thorough"

check: $(DEV) ## lint, format, types, imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV) ## the benchmarks that are sensible on this machine
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.speed.report

docs: $(DOCS) ## the documentation as a site in site/; a broken link fails
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site
