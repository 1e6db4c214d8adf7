# Two commands do all the set-up: `make quickstart` runs the main job, `make test` passes the tests.

PYTHON ?= python3
BIN := .venv/bin
PYTAG := $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

# The CPU build of torch comes from a local wheel folder where pip is set up with one, else from PyTorch's CPU index.
LOCAL_TORCH := $(wildcard $(firstword $(PIP_FIND_LINKS))/torch-2.13.0*$(PYTAG)*.whl)
TORCH_FROM := $(if $(LOCAL_TORCH),--find-links $(firstword $(PIP_FIND_LINKS)),--torch-backend cpu)

export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: quickstart small test test-slow lint format clean

quickstart: .venv/.installed ## the main job on embedded defaults: about 15 minutes on 2 cores
	$(BIN)/llmr run conf/quickstart.yaml

small: .venv/.installed ## the same job at the size that shows what training changes: 1 to 2 hours on 2 cores
	$(BIN)/llmr run conf/small.yaml

test: .venv/.installed lint ## lint, types and every test but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2 --no-loadscope-reorder --durations=15 --durations-min=5

test-slow: .venv/.installed ## faults and end-to-end runs in real processes
	$(BIN)/python -m pytest -m "slow"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.installed: requirements/cpu.lock pyproject.toml
	@case "$(PYTAG)" in cp311|cp312) ;; *) echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $(PYTAG). Use: make PYTHON=python3.11 ..."; exit 1;; esac
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==0.13.8
	$(BIN)/uv pip install --python $(BIN)/python --no-deps $(TORCH_FROM) --requirements requirements/cpu.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

clean: ## what runs made; the cache of sample models and data stays
	rm -rf artifacts runs
