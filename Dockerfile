# docker build -t medgen .                              for CPUs
# docker build -t medgen --build-arg DEVICE=cuda .      for NVIDIA GPUs (run with --gpus all)
# docker run --rm -v "$PWD:/project" medgen dvc repro --pull
# compose.yaml uses the same image for MLflow's server: docs/operations.md.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG DEVICE=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PROJECT_ENVIRONMENT=/opt/medgen UV_PYTHON_DOWNLOADS=never
RUN python3 -m pip install --no-cache-dir --root-user-action=ignore "uv>=0.9,<1"
WORKDIR /src
COPY pyproject.toml uv.lock README.md LICENSE ./
# Dependencies first, so that a change of the code reuses this layer.
# The registry's torch is the CUDA build (4 GB of libraries); for CPUs the same versions are installed without them.
RUN if [ "$DEVICE" = cuda ]; then \
      uv sync --locked --no-dev --extra server --no-install-project; \
    else \
      uv venv "$UV_PROJECT_ENVIRONMENT" && \
      uv export --quiet --locked --no-dev --extra server --no-hashes --no-emit-project \
        --prune torch --prune torchvision -o others.txt && \
      uv export --quiet --locked --no-dev --extra server --no-hashes --no-emit-project --no-annotate \
        | grep -E '^(torch|torchvision)==' > torch.txt && \
      uv pip install --python "$UV_PROJECT_ENVIRONMENT" --index "$TORCH_INDEX" \
        --index-strategy unsafe-best-match -r torch.txt -r others.txt; \
    fi
COPY medgen medgen
COPY recipes recipes
COPY params.yaml dvc.yaml .dvcignore ./
RUN uv pip install --python "$UV_PROJECT_ENVIRONMENT" --no-deps .

FROM ${BASE}
# git: for lineage tags and DVC. gcc: for torch.compile
RUN apt-get update \
 && apt-get install -y --no-install-recommends git=1:2.* gcc=4:* libc6-dev=2.* \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 medgen \
 && install --directory --owner=medgen --group=medgen /mlartifacts \
 && git config --system --add safe.directory /project
COPY --from=build /opt/medgen /opt/medgen
ENV PATH=/opt/medgen/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /project
CMD ["medgen", "--help"]
