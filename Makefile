# make         install everything and run the pipeline on the sample data
# make CPU=1   the same with PyTorch's build for CPUs, which lacks 4 GB of CUDA libraries; give it with every target
# make help    list the other targets
.DEFAULT_GOAL := run
.PHONY: run setup test test-fast gpu campaign lint format wheel docs help clean sbom audit-packages pin-images pin-build
export PYTHONUNBUFFERED = 1

UV := $(if $(shell command -v uv 2>/dev/null),uv,.uv/bin/uv)
# one process per core; a file's tests stay in one process, so that shared fixtures are made once
EXPORT := $(UV) export --quiet --locked --no-emit-project --no-annotate --no-header
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
	@# torch and torchvision come from PyTorch's index, of whose builds uv.lock has no hashes; all others from PyPI
	$(EXPORT) --no-hashes | grep -E '^(torch|torchvision)==' > .venv/torch.txt
	$(EXPORT) --no-emit-package torch --no-emit-package torchvision \
	  | sed -E '/^(cuda-|nvidia-[^m]|triton==)/,/[^\\]$$/d' > .venv/others.txt
	$(UV) pip install --compile-bytecode --default-index $(TORCH_INDEX) --no-deps -r .venv/torch.txt
	$(UV) pip install --compile-bytecode --no-deps --require-hashes \
	  --build-constraints build-requirements.txt -r .venv/others.txt
	$(UV) pip install --build-constraints build-requirements.txt --no-deps --editable .
else
	$(UV) sync --locked --compile-bytecode
endif

.uv/bin/uv:
	-python3 -m pip install --quiet --target .uv --require-hashes -r build-requirements.txt
	@test -x $@ || { echo "uv could not be downloaded: install it (https://docs.astral.sh/uv) and run make again"; exit 2; }

test: setup  ## run all tests, including slow ones
	$(PYTEST)

test-fast: setup  ## run tests that take at most a few seconds each
	$(PYTEST) -m "not slow"

gpu: setup  ## check and measure on a GPU, for MINUTES=15; the table is outputs/gpu-*/gpu.md (docs/gpu.md)
	$(UV) run --no-sync python benchmarks/gpu.py --minutes $(or $(MINUTES),15)

campaign: setup  ## attack medgen with kills, faults, hostile files and requests, for MINUTES=60; outputs/campaign-*/campaign.md
	$(UV) run --no-sync python -m benchmarks.campaign --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0)

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

sbom:  ## write dist/sbom.json (CycloneDX, with licences) and dist/licences.md of the installed packages
	@mkdir -p dist
	$(UV) tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --of JSON -o dist/sbom.json .venv/bin/python
	$(UV) tool run pip-licenses==5.5.5 --python .venv/bin/python --format markdown --order license --output-file dist/licences.md

audit-packages:  ## look up the locked packages in the database of known vulnerabilities (OSV)
	@$(UV) audit --locked $(OPTIONS) || { echo "Vulnerabilities are listed above. Without a network: give an OSV server's address in" \
	  "OPTIONS, such as make audit-packages OPTIONS='--service-url https://osv.example.org'"; exit 2; }

pin-images:  ## write the present digests of the base images into Dockerfile and compose.yaml (needs docker)
	@for image in python:3.12-slim-bookworm postgres:17; do \
	  digest=$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' $$image) \
	    && echo "$$digest" | grep -qE '^sha256:[0-9a-f]{64}$$' \
	    || { echo "$$image: no digest; expected docker with buildx and a reachable registry"; exit 2; }; \
	  sed -i -E "s#$$image(@sha256:[0-9a-f]{64})?#$$image@$$digest#" Dockerfile compose.yaml; \
	done

pin-build:  ## update build-requirements.txt: uv, and what builds packages from source, with hashes
	{ echo "# uv and what builds packages from source, each with its hashes. Made by: make pin-build"; \
	  printf 'uv\nhatchling\nsetuptools\n' | $(UV) pip compile - --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-annotate --quiet; } > build-requirements.txt.tmp
	mv build-requirements.txt.tmp build-requirements.txt

clean:  ## remove outputs of the pipeline and the tools; keeps data and git
	rm -rf artifacts runs outputs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
