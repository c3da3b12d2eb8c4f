# Every target builds what it needs. `make demo` and `make test` work on a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 3

.PHONY: setup demo test test-all lint type check bench gpu docs docs-serve pictures notebooks dist test-lowest test-newest clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/msd demo --out runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow"

# Types of tensors are checked at every call here, which takes as long again as the tests.
test-all: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --jaxtyping-packages=multistage_diffusion,beartype.beartype

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup
	$(BIN)/pyright

check: lint type test

bench: setup
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

gpu: setup  # parts of at most 8 minutes, resumed by the same command; results with the card's name
	$(BIN)/python benchmarks/gpu.py

# The site has an environment of its own: it reads the sources and imports none of them, so torch is not needed.
.docs-venv/.ready: pyproject.toml
	$(PYTHON) -m venv .docs-venv
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | .docs-venv/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

docs: .docs-venv/.ready
	.docs-venv/bin/mkdocs build --strict

docs-serve: .docs-venv/.ready
	.docs-venv/bin/mkdocs serve

pictures: demo  # of README.md and of the site's first page
	$(BIN)/python scripts/pictures.py runs/demo docs/img

notebooks: setup  # executed, with their outputs, into build/notebooks
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[notebooks,diffusers]'
	mkdir -p build/notebooks
	for source in notebooks/*.py; do \
	  $(BIN)/python -m jupytext --to ipynb --execute --output build/notebooks/$$(basename $$source .py).ipynb $$source || exit 1; \
	done

# Built, then installed where nothing of this folder is in reach, and used there.
dist: setup
	rm -rf dist build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --quiet --outdir dist .
	away=$$(mktemp -d) && $(PYTHON) -m venv $$away/venv && \
	  $$away/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl && \
	  (cd $$away && venv/bin/msd --version && venv/bin/msd demo --quick --out demo) && rm -rf $$away

# What pyproject.toml promises, at both ends, where warnings of dependencies are no errors. TORCH replaces the lowest torch where an index does not have it.
CORE_TESTS ?= tests/test_stages.py tests/test_noise.py tests/test_rng.py tests/test_multidecoder.py tests/test_sampling.py \
  tests/test_config.py tests/test_files.py tests/test_examples.py tests/models tests/training tests/clustering tests/metrics
ENDS := python -m pytest -p no:cacheprovider -W default -m "not slow" $(CORE_TESTS)
TORCH ?=

test-lowest:
	rm -rf .lowest-venv && $(PYTHON) -m venv .lowest-venv
	$(PYTHON) scripts/lowest.py test $(if $(TORCH),| sed 's/^torch==.*/$(TORCH)/') \
	  | .lowest-venv/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	.lowest-venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	OMP_NUM_THREADS=1 .lowest-venv/bin/$(ENDS)

test-newest:
	rm -rf .newest-venv && $(PYTHON) -m venv .newest-venv
	.newest-venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e '.[test]'
	OMP_NUM_THREADS=1 .newest-venv/bin/$(ENDS)

clean:
	rm -rf $(VENV) .docs-venv .lowest-venv .newest-venv site build dist runs .pytest_cache .ruff_cache
