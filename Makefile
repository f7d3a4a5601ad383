# Every target but gpu sets up the project's own environment, .venv, when that is missing, unfinished or older than
# requirements.lock and pyproject.toml. `make` alone lists the targets.

PYTHON ?= python3
LOWEST_PYTHON ?= python3.12
ARGS ?=

# The environment is this project's alone, whatever the caller's shell has active.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV UV_PYTHON UV_SYSTEM_PYTHON
# Without compiled files each program's imports take three times as long.
unexport PYTHONDONTWRITEBYTECODE

# READY is written last and holds the folder that .venv was made in.
READY := .venv/.ready
UV := .venv/bin/uv
# Two processes, a file's tests on one of them, since they share their training runs.
PYTEST := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart train test test-fast test-slow test-lowest test-minimal gpu lint style types format docs-configuration lock clean moved

help: ## list the targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3.12]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
	    printf '  %-20s%s\n' "$$name" "$$text"; done

setup: $(READY) ## make the environment .venv, and nothing else; the other targets make it when they need it
	@echo 'ready; to work in it: . .venv/bin/activate'

quickstart: $(READY) ## pretrain on the bundled digits: minutes on a CPU, no download
	exec .venv/bin/python -m moco.train +experiment=quickstart $(ARGS)

train: $(READY) ## pretrain, e.g. make train ARGS="+experiment=quickstart trainer.max_epochs=2"
	exec .venv/bin/python -m moco.train $(ARGS)

# mypy works on one core for half a minute, so the tests run beside it.
test: style ## style, types and the fast tests
	@$(MAKE) --no-print-directory --jobs=2 types test-fast

test-fast: $(READY) ## the fast tests alone
	.venv/bin/python -m pytest $(PYTEST) $(ARGS)

test-slow: $(READY) ## the tests that take minutes
	.venv/bin/python -m pytest -m slow $(ARGS)

test-lowest: $(READY) ## the fast tests with the oldest dependencies that pyproject.toml allows, in .venv-lowest
	@for python in "$(LOWEST_PYTHON)" "$(PYTHON)" .venv/bin/python; do \
	    "$$python" -c '' 2>/dev/null && break; echo "make: no $$python here, trying the next Python" >&2; done; \
	$(UV) venv --quiet --clear --python "$$python" .venv-lowest
	$(UV) pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-lowest/bin/python -m pytest $(PYTEST) $(ARGS)

test-minimal: $(READY) ## the fast tests without the optional extras, in .venv-minimal
	$(UV) venv --quiet --clear --python .venv/bin/python .venv-minimal
	$(UV) pip install --quiet --python .venv-minimal/bin/python --constraint requirements.lock -e . pytest pytest-xdist
	.venv-minimal/bin/python -m pytest $(PYTEST) $(ARGS)

# Where a GPU is lent for minutes there may be no network: this sets nothing up.
gpu: ## what a GPU must show, in 9 minutes; in .venv if it is there, else by PYTHON
	@if [ -x .venv/bin/python ]; then exec .venv/bin/python -m scripts.gpu_check $(ARGS); fi; \
	PYTHONPATH="$(PYTHONPATH)" exec "$(PYTHON)" -m scripts.gpu_check $(ARGS)

lint: style types ## style and types; changes nothing

style: $(READY) ## ruff's rules and format
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: $(READY) ## types, by mypy
	.venv/bin/python -m mypy

format: $(READY) ## format the code and fix what can be fixed
	.venv/bin/python -m ruff format .
	.venv/bin/python -m ruff check --fix .

docs-configuration: $(READY) ## write docs/configuration.md anew, after a change in moco/config/
	.venv/bin/python -m scripts.configuration_page

# Needs no more of .venv than uv: what is locked now may be what does not install.
lock: ## re-make requirements.lock for pyproject.toml; ARGS=--upgrade takes the newest versions
	@$(UV) --version >/dev/null 2>&1 || { $(make-venv); }
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.10 --generate-hashes --no-annotate \
	    --custom-compile-command 'make lock' --quiet --output-file requirements.lock $(ARGS)

clean: ## remove the environments, caches and builds; runs/ and data/ stay
	rm -rf .venv .venv-lowest .venv-minimal build dist .mypy_cache .pytest_cache .ruff_cache
	find moco hydra_plugins tests scripts -name __pycache__ -prune -exec rm -rf {} +

# An environment with uv alone, in the version that is locked.
define make-venv
	"$(PYTHON)" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "make: Python 3.10 or newer with venv is needed, and $(PYTHON) is not:" \
	        "name another with PYTHON=... (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	echo 'Setting up .venv (the first time, with some GB to download)' && rm -rf .venv && "$(PYTHON)" -m venv .venv && \
	{ sed -n '/^uv==/,/[^\]$$/p' requirements.lock 2>/dev/null || echo uv; } >.venv/uv.txt && \
	.venv/bin/python -m pip --disable-pip-version-check install --quiet -r .venv/uv.txt
endef

# Compiled while it is set up, since the first `import torch` would otherwise take half a minute.
# A set-up that was interrupted, or an environment that was moved here, is made anew; a stale one is brought up to date.
MOVED := $(shell [ "$$(cat $(READY) 2>/dev/null)" = "$$(pwd -P)" ] || echo moved)
$(READY): requirements.lock pyproject.toml $(MOVED)
	@[ -z "$(MOVED)" ] && $(UV) --version >/dev/null && .venv/bin/python -c '' || { $(make-venv); }
	@rm -f $@
	$(UV) pip sync --python .venv/bin/python --require-hashes --compile-bytecode requirements.lock
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	@pwd -P >$@
