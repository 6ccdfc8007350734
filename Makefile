# Everything runs in .venv, which `make setup` makes from requirements.lock.
.PHONY: setup train test test-ui notebook bench torture lock clean

PYTHON ?= python3
BIN := .venv/bin

train: setup
	$(BIN)/mnist-exp train experiments=seed_mlp

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# In a browser of the system's: chromium, or google-chrome
test-ui: setup
	$(BIN)/pytest tests/ui -rs

# Runs the notebook, and keeps its outputs in it.
notebook: setup
	$(BIN)/jupyter execute --inplace experiments/digit_classifier.ipynb

bench: setup
	$(BIN)/python -m benchmarks.bench --output benchmarks/RESULTS.md

torture: setup
	$(BIN)/python -m benchmarks.torture --output benchmarks/RESULTS.md

setup: .venv/ready

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

# Pins every dependency, for every platform, with hashes and without the address of an index.
lock: setup
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --upgrade --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
