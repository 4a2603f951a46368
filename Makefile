# make         install everything and run the pipeline on the sample data
# make CPU=1   the same with PyTorch's build for CPUs, which lacks 4 GB of CUDA libraries; give it with every target
# make help    list the other targets
.DEFAULT_GOAL := run
.PHONY: run setup test test-fast gpu lint format wheel docs help clean
export PYTHONUNBUFFERED = 1

UV := $(if $(shell command -v uv 2>/dev/null),uv,.uv/bin/uv)
# one process per core; a file's tests stay in one process, so that shared fixtures are made once
EXPORT := $(UV) export --quiet --locked --no-hashes --no-emit-project --no-annotate
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PYTEST := $(UV) run --no-sync pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

run: setup  ## install, then preprocess, train, evaluate and register a model (dvc repro --pull)
	$(UV) run --no-sync dvc repro --pull
	@echo
	@echo "Done. Open reports/index.html (images and metrics), then run:"
	@echo "  .venv/bin/medgen ui                                     runs and the registered model in MLflow"
	@echo "  .venv/bin/medgen generate --n 25 --out outputs/first    new images"

setup: $(if $(filter .uv/%,$(UV)),.uv/bin/uv)  ## install uv if it is missing, and the locked packages
	@# compile bytecode once: with PYTHONDONTWRITEBYTECODE every process would otherwise compile for 15 s
ifdef CPU
	$(UV) venv --quiet --allow-existing
	$(EXPORT) --prune torch --prune torchvision --output-file .venv/others.txt > /dev/null
	$(EXPORT) | grep -E '^(torch|torchvision)==' > .venv/torch.txt
	$(UV) pip install --compile-bytecode --index $(TORCH_INDEX) --index-strategy unsafe-best-match \
	  -r .venv/torch.txt -r .venv/others.txt
	$(UV) pip install --no-deps --editable .
else
	$(UV) sync --locked --compile-bytecode
endif

.uv/bin/uv:
	python3 -m pip install --quiet --target .uv uv \
	|| curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$(CURDIR)/.uv/bin" UV_NO_MODIFY_PATH=1 sh
	@test -x $@ || { echo "uv could not be downloaded: install it (https://docs.astral.sh/uv) and run make again"; exit 2; }

test: setup  ## run all tests, including slow ones
	$(PYTEST)

test-fast: setup  ## run tests that take at most a few seconds each
	$(PYTEST) -m "not slow"

gpu: setup  ## check and measure on a GPU, for MINUTES=15; the table is outputs/gpu-*/gpu.md (docs/gpu.md)
	$(UV) run --no-sync python benchmarks/gpu.py --minutes $(or $(MINUTES),15)

lint: setup  ## check style, types, import order, Dockerfile
	$(UV) run --no-sync ruff check
	$(UV) run --no-sync ruff format --check
	$(UV) run --no-sync mypy
	$(UV) run --no-sync lint-imports
	$(UV) run --no-sync hadolint Dockerfile

format: setup  ## format the code
	$(UV) run --no-sync ruff check --fix
	$(UV) run --no-sync ruff format

wheel: $(if $(filter .uv/%,$(UV)),.uv/bin/uv)  ## build dist/medgen-VERSION-py3-none-any.whl, for projects without a clone
	$(UV) build --wheel

docs: $(if $(filter .uv/%,$(UV)),.uv/bin/uv)  ## build the documentation as a web site in site/, and check its links
	$(UV) run --locked --group docs mkdocs build --strict

clean:  ## remove outputs of the pipeline and the tools; keeps data and git
	rm -rf artifacts runs outputs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
