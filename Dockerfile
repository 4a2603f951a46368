# docker build -t medgen .                              for CPUs
# docker build -t medgen --build-arg DEVICE=cuda .      for NVIDIA GPUs (run with --gpus all)
# docker run --rm -v "$PWD:/project" medgen dvc repro --pull
# compose.yaml uses the same image for MLflow's server: docs/operations.md.
# `make pin-images` writes the digests of the base images into this file and compose.yaml.
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG DEVICE=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PROJECT_ENVIRONMENT=/opt/medgen UV_PYTHON_DOWNLOADS=never \
    UV_BUILD_CONSTRAINT=/src/build-requirements.txt
WORKDIR /src
COPY build-requirements.txt ./
RUN python3 -m pip install --no-cache-dir --root-user-action=ignore --require-hashes -r build-requirements.txt
COPY pyproject.toml uv.lock README.md LICENSE ./
# Dependencies first, so that a change of the code reuses this layer. All come from PyPI with the hashes of uv.lock,
# except for CPUs torch and torchvision: PyPI's build needs 4 GB of CUDA libraries. The same versions come from
# PyTorch's index, whose builds uv.lock has no hashes of; nothing else does.
RUN export="uv export --quiet --locked --no-dev --extra server --no-emit-project --no-annotate --no-header" && \
    uv venv "$UV_PROJECT_ENVIRONMENT" && \
    if [ "$DEVICE" = cuda ]; then \
      $export -o others.txt; \
    else \
      $export --no-hashes | grep -E '^(torch|torchvision)==' > torch.txt && \
      $export --no-emit-package torch --no-emit-package torchvision \
        | sed -E '/^(cuda-|nvidia-[^m]|triton==)/,/[^\\]$/d' > others.txt && \
      uv pip install --python "$UV_PROJECT_ENVIRONMENT" --default-index "$TORCH_INDEX" --no-deps -r torch.txt; \
    fi && \
    uv pip install --python "$UV_PROJECT_ENVIRONMENT" --no-deps --require-hashes -r others.txt
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
