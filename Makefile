# make        set up everything, run the main job on the sample data
# make help   the rest
.DEFAULT_GOAL := run
.PHONY: run setup test test-fast lint format help clean
export PYTHONUNBUFFERED = 1

UV := $(if $(shell command -v uv 2>/dev/null),uv,.uv/bin/uv)
# a process a core; a file's tests stay in one process, which makes their shared fixtures once
PYTEST := $(UV) run --no-sync pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

run: setup  ## set up, then preprocess, train, judge and register a model (dvc repro --pull)
	$(UV) run --no-sync dvc repro --pull
	@echo
	@echo "Done. Look at reports/index.html (pictures and numbers), then run:"
	@echo "  $(UV) run medgen ui                                     runs and the registered model in MLflow"
	@echo "  $(UV) run medgen generate --n 25 --out outputs/first    new images"

setup: $(if $(filter .uv/%,$(UV)),.uv/bin/uv)  ## fetch uv if the machine lacks it, and the locked packages
	@# bytecode now and once: where Python may not write it (PYTHONDONTWRITEBYTECODE), every process compiles for 15 s
	$(UV) sync --locked --compile-bytecode

.uv/bin/uv:
	python3 -m pip install --quiet --target .uv uv \
	|| curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$(CURDIR)/.uv/bin" UV_NO_MODIFY_PATH=1 sh
	@test -x $@ || { echo "uv could not be fetched: install it (https://docs.astral.sh/uv) and run make again"; exit 2; }

test: setup  ## all tests, slow ones too
	$(PYTEST)

test-fast: setup  ## tests of a few seconds each
	$(PYTEST) -m "not slow"

lint: setup  ## style, types, floors
	$(UV) run --no-sync ruff check
	$(UV) run --no-sync ruff format --check
	$(UV) run --no-sync mypy
	$(UV) run --no-sync lint-imports
	$(UV) run --no-sync hadolint Dockerfile

format: setup  ## put the code in order
	$(UV) run --no-sync ruff check --fix
	$(UV) run --no-sync ruff format

clean:  ## remove what the pipeline and the tools made; data and git stay
	rm -rf artifacts runs outputs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
