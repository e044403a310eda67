# A learner or engine on NVIDIA GPUs. From the root of the repository:
#     docker build -f docker/cuda.Dockerfile -t r2vpo-cuda .
# Any base with Python 3.11 will do: torch's packages bring CUDA, the host its driver. With a base
# that has CUDA's compiler, flash-attn can be built in; without it torch's varlen attention is used:
#     --build-arg BASE_IMAGE=... --build-arg FLASH_ATTN_VERSION=2.8.3.post2
# NEVER BUILT by this project.
ARG BASE_IMAGE=python:3.11-bookworm
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# What the container runtime reads; images of NVIDIA's say it themselves.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /opt/r2vpo
RUN python3 -c 'import sys; v = sys.version_info[:2]; assert v == (3, 11), f"Python {v}, not 3.11"'
COPY requirements/cuda.txt requirements/cuda.txt
RUN python3 -m pip install --no-cache-dir --no-deps -r requirements/cuda.txt
ARG FLASH_ATTN_VERSION=
RUN if [ -n "${FLASH_ATTN_VERSION}" ]; then \
        python3 -m pip install --no-cache-dir --no-deps --no-build-isolation \
            "flash-attn==${FLASH_ATTN_VERSION}"; \
    fi
COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps -e .
