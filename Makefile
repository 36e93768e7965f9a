# make demo: set up and take synthetic data through every command.  make test: set up, then ruff, mypy and the tests.
# make test-pythons: the same under every Python from 3.11 to 3.13 that is on this machine.
# PYTHON=/path/to/python chooses the interpreter; without it .ci/find-python does.
VENV ?= .venv
BIN := $(VENV)/bin
# Three processes keep two cores busy, since tests on Ray wait much; tests/conftest.py says which test goes where.
IN_PARALLEL := -n 3 --dist loadgroup --no-loadscope-reorder
PYTEST := $(BIN)/pytest $(IN_PARALLEL)
# Without bytecode every Ray worker recompiles torch: 11 s per import instead of 5.
unexport PYTHONDONTWRITEBYTECODE
export UV_COMPILE_BYTECODE := 1

.PHONY: setup packages demo test test-slow test-pythons test-lowest smoke smoke-tests smoke-pythons lint types sbom clean

# A venv that is broken, of a checkout that has moved, of another Python than PYTHON, or of one out of the range is remade.
# In a second make: this one may have looked at the removed files already.
setup:
	@.ci/check-venv $(VENV)
	@$(MAKE) --no-print-directory packages

packages: $(VENV)/ready
	@:

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || { python=$$(.ci/find-python) && "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install -q uv || echo "uv cannot be installed here: pip does it, more slowly"
	if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install -q -p $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; fi
	pwd -P >$@

demo: setup
	$(BIN)/cxrscale demo

types: setup
	$(BIN)/mypy --cache-dir .mypy_cache/$(notdir $(VENV))

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup lint
	$(PYTEST) -m "not gpu and not slow"

test-slow: setup
	$(PYTEST) -m "not gpu"

# What differs between Pythons: types, the DALI graph, Ray, signals, the command line. mypy and the tests at once: each is
# one process.
smoke: setup
	$(MAKE) --jobs 2 types smoke-tests

smoke-tests: setup
	$(BIN)/pytest -m "smoke and not gpu and not slow"

test-pythons:
	.ci/each-python test

smoke-pythons:
	.ci/each-python smoke

# The tests with the oldest versions that pyproject.toml allows, on the oldest Python: by hand, after a change of bounds.
test-lowest: setup
	"$$(.ci/find-python 3.11)" -m venv --clear .venv-lowest
	$(BIN)/uv pip install -q -p .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-lowest/bin/pytest $(IN_PARALLEL) -m "not gpu and not slow"

# A CycloneDX list of what is installed, in build/sbom.json; its tool has an environment of its own.
SBOM := build/sbom-tool
sbom: setup
	test -x $(SBOM)/bin/cyclonedx-py || { $(BIN)/python -m venv $(SBOM) && $(SBOM)/bin/pip install -q 'cyclonedx-bom>=7.5,<8'; }
	$(SBOM)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o build/sbom.json $(BIN)/python
	@echo build/sbom.json

clean:
	rm -rf .venv .venv-* runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
