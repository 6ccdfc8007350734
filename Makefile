# Everything runs in .venv, which `make setup` makes from requirements.lock.
.PHONY: train help test lint format test-ui notebook bench torture setup lock clean

PYTHON ?= python3
BIN := .venv/bin

train: setup ## train the seed recipe
	$(BIN)/mnist-exp train experiments=seed_mlp

help: ## say what can be made
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# COVERAGE=1 takes half as long again, and fails where less is covered than pyproject.toml says.
# Three processes on two cores, as tests often wait for other processes. Files in the order of their
# names: xdist would begin with those of the most tests, and a slow one of few would run last, alone.
test: lint ## lint, and run all tests but those in a browser
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(if $(COVERAGE),--cov)

lint: setup ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the code, and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-ui: setup ## run the tests in a browser of the system's: chromium, or google-chrome
	$(BIN)/pytest tests/ui -rs

notebook: setup ## run the notebook, and keep its outputs in it
	$(BIN)/jupyter execute --inplace experiments/digit_classifier.ipynb

bench: setup ## measure speed and memory, into benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.bench --output benchmarks/RESULTS.md

torture: setup ## inject faults into real runs by the hundred, into benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.torture --output benchmarks/RESULTS.md

setup: .venv/ready ## make the environment .venv

# The virtual environment is made anew where the lock or the project file has changed. Bytecode is
# compiled at once: torch and mlflow take twice as long to import without it.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mnist-exp needs Python 3.11 or newer; choose one: make PYTHON=python3.12 ...")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --require-hashes --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python --editable .
	touch $@

# For every platform, with hashes and without the address of an index.
lock: setup ## pin every dependency anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --upgrade --extra onnx --group dev pyproject.toml \
		-o requirements.lock

clean: ## remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
