# Everything that one does here, the same for a person and for CI. `make` alone lists it.

PYTHON ?= python3
PYTEST_ARGS ?=
# Test files that run at the same time: starting processes, as many tests do, is mostly waiting.
TEST_WORKERS ?= 2
PORT ?= 5000
BENCHMARKS := "start_up.py --rounds 3" "steady_state.py --rounds 1" "end_to_end.py --rounds 1" \
	"data_building.py --megabytes 16 --rounds 1" "saving.py --rounds 2" "loss_head.py --rounds 1" \
	"optimizers.py --models small --rounds 4" \
	"growth.py --parts model processes paper --steps 3"

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
FOR_RUNS := $(VENV)/requirements.installed
FOR_TESTS := $(VENV)/requirements-dev.installed

# Scripts in benchmarks/ and docs/ import the modules of this folder.
export PYTHONPATH := $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: help quickstart test check format bench equivalence chaos docs review clean

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' Makefile

quickstart: $(FOR_RUNS)  ## Train a small model on this machine; run again to continue or to see it
	@$(VENV_PYTHON) train_llm.py train_configs/quickstart.json

# Pages are opened where chromium and chromedriver are installed; pictures go to test-artifacts/.
test: check  ## Check, then run every test that needs no GPU and no network
	@$(VENV_PYTHON) -m pytest -m "not gpu and not network" -n $(TEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

check: $(FOR_TESTS)  ## Lint, format, types and known weaknesses, without changing a file
	@$(VENV_PYTHON) -m ruff check
	@$(VENV_PYTHON) -m ruff format --check
	@$(VENV_PYTHON) -m mypy
	@$(VENV_PYTHON) tests/audit.py

format: $(FOR_TESTS)  ## Format the code and mend what lint can mend
	@$(VENV_PYTHON) -m ruff check --fix
	@$(VENV_PYTHON) -m ruff format

bench: $(FOR_RUNS)  ## Measure what the README claims, in one round each (their --help has more)
	@set -e; for words in $(BENCHMARKS); do \
		echo "== $$words"; \
		$(VENV_PYTHON) benchmarks/$$words; \
	done

equivalence: $(FOR_RUNS)  ## Train under every backend, print how far the curves differ (4 minutes)
	@$(VENV_PYTHON) benchmarks/equivalence.py

chaos: $(FOR_TESTS)  ## Kill small runs 200 times, compare them with ones never killed (4 minutes)
	@$(VENV_PYTHON) -m tests.faults.chaos --kills 200

docs: $(FOR_RUNS)  ## Rewrite the tables of arguments and of other tools' names
	@$(VENV_PYTHON) docs/make_argument_table.py
	@$(VENV_PYTHON) docs/make_tool_table.py

review: $(FOR_RUNS)  ## Show all runs in the browser: http://127.0.0.1:5000 (PORT=5001 for another)
	@test -f mlflow.db || { echo "There is no mlflow.db yet: make quickstart writes the first run."; exit 1; }
	@echo "Runs are at http://127.0.0.1:$(PORT)/#/experiments?workflowType=machine_learning; Ctrl-C stops."
	@MLFLOW_DISABLE_TELEMETRY=true $(VENV_PYTHON) -m mlflow ui --workers 1 \
		--backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT)

clean:  ## Remove the tools' caches and pictures; runs, data and .venv stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache test-artifacts
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again. An environment
# without a working pip (missing, half made, its Python gone) is made anew.
$(VENV)/%.installed: %.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is not. Name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing $< into $(VENV): some minutes the first time."
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(FOR_TESTS): $(FOR_RUNS)
