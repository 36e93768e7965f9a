# make demo: set up and take a phantom archive the whole way.  make test: set up, then ruff, mypy and the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# In two processes; tests/conftest.py says which test goes where.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder
# Without bytecode every Ray worker recompiles torch: 11 s an import instead of 5.
unexport PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE := 1

.PHONY: setup demo test test-slow lint clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv || echo "uv cannot be installed here: pip does it, more slowly"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install -q -p $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	touch $@

demo: setup
	$(BIN)/cxrscale demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint
	$(PYTEST) -m "not gpu and not slow"

test-slow: setup
	$(PYTEST) -m "not gpu"

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
