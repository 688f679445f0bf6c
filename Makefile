# `make demo` and `make test` need python3 (3.10 or newer) and make; they install the rest into $(VENV).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test laws fuzz test-newest test-oldest check style docs clean
.NOTPARALLEL:

demo: $(VENV)/.demo-installed  ## compress a real model, reload it without this library, compare
	@$(BIN)/python examples/demo.py

# One thread a worker: more would only fight over the cores.
test: $(VENV)/.dev-installed  ## all tests; ARGS='-k plan' narrows them, WORKERS=4 uses more cores
	@echo "test: pytest, $(WORKERS) workers"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

laws: $(VENV)/.dev-installed  ## the fast tests of one folder of the package, as FOLDER=planning
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "laws and $(FOLDER)" $(ARGS)

fuzz: $(VENV)/.dev-installed  ## other cases than `make test` draws, and ten times as many; SEED=7 draws those of 7
	@HF_LOWRANK_FUZZ_SEED=$(or $(SEED),$(shell date +%s)) HF_LOWRANK_FUZZ_SHARE=10 \
		$(BIN)/python -m pytest -q -n $(WORKERS) tests/test_fuzz.py $(ARGS)

test-newest: $(VENV)/.dev-installed  ## all tests on the newest releases, in an environment of their own
	@$(BIN)/python tests/run_on_releases.py newest --workers $(WORKERS) -- $(ARGS)

test-oldest: $(VENV)/.dev-installed  ## all tests on the oldest releases that pyproject.toml states
	@$(BIN)/python tests/run_on_releases.py oldest --workers $(WORKERS) -- $(ARGS)

check: $(VENV)/.dev-installed  ## formatting, lint, types
	@echo "check: ruff format"; $(BIN)/ruff format --check .
	@echo "check: ruff"; $(BIN)/ruff check .
	@echo "check: mypy --strict"; $(BIN)/mypy

style: $(VENV)/.dev-installed  ## format and fix in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.dev-installed  ## write the API reference, the plot and the digests of the shipped code
	@$(BIN)/python -m hf_lowrank.sharing.shipped_code
	@$(BIN)/python docs/make_reference.py
	@$(BIN)/python docs/make_plots.py
	@$(BIN)/python docs/make_architecture.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo-installed: $(INPUTS) | $(BIN)/python
	@echo "install: hf-lowrank[demo] into $(VENV) (torch is large: minutes the first time)"
	@$(PIP_INSTALL) -e '.[demo]'
	@touch $@

# [dev] contains [demo].
$(VENV)/.dev-installed: $(INPUTS) | $(BIN)/python
	@echo "install: hf-lowrank[dev] into $(VENV) (torch is large: minutes the first time)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.demo-installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' is not Python 3.10 or newer; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "create: virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }
