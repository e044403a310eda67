# A learner or engine on Ascend NPUs. From the root of the repository, on the architecture of the
# nodes (the pins are for aarch64):
#     docker build -f docker/npu.Dockerfile --build-arg BASE_IMAGE=... -t r2vpo-npu .
# The base must have CANN 9.1.0 with NNAL for the device, and Python 3.11; Ascend publishes such
# images (cann:9.1.0-910b-ubuntu22.04-py3.11). The driver is the host's, mounted when a container
# is started. Optional, each as pip takes it (a wheel in the build's folder, an address):
#     --build-arg TRITON_ASCEND=...   3.2.2, which vllm-ascend asks for
#     --build-arg MINDSPEED=...       core_r0.16.0, for its kernel of weight gradients
# NEVER BUILT by this project.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/r2vpo
RUN python3 -c 'import sys; v = sys.version_info[:2]; assert v == (3, 11), f"Python {v}, not 3.11"'
# vLLM without a device: its public builds are for CUDA.
RUN VLLM_TARGET_DEVICE=empty \
    python3 -m pip install --no-cache-dir --no-deps --no-binary vllm vllm==0.23.0
COPY requirements/npu.txt requirements/npu.txt
RUN python3 -m pip install --no-cache-dir --no-deps -r requirements/npu.txt
COPY . .
ARG TRITON_ASCEND=
ARG MINDSPEED=
RUN for package in "${TRITON_ASCEND}" "${MINDSPEED}"; do \
        if [ -n "$package" ]; then \
            python3 -m pip install --no-cache-dir --no-deps "$package"; \
        fi; \
    done
RUN python3 -m pip install --no-cache-dir --no-deps -e .
ENTRYPOINT ["/opt/r2vpo/docker/npu-entrypoint.sh"]
CMD ["bash"]
