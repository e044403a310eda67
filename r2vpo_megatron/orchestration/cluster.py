"""Ray: start or join it for one run, and leave nothing behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import ray

from r2vpo_megatron.config import RunConfig

EXIT_TERMINATED = 128 + signal.SIGTERM


@contextlib.contextmanager
def ray_session(config: RunConfig, resources: dict[str, int]) -> Iterator[None]:
    """Join the Ray cluster at `runtime.ray_address`, or start one on this machine for the block.

    A cluster that is started here ends with the block, also on an exception or SIGTERM; one that
    is joined is left, and its actors of this run end with their driver.

    Args:
        config: of the run.
        resources: what the run's actors need in all, by Ray's names (CPU, GPU, NPU).

    Raises:
        RuntimeError: the cluster has less than that.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.runtime.ray_address:
        options["address"] = config.runtime.ray_address
    else:
        options |= {
            "address": "local",  # RAY_ADDRESS in the environment must not decide
            # Ray starts workers by `bash -c`, without quoting the interpreter's path
            # (ray/_private/runtime_env/context.py, exec_worker).
            "runtime_env": {"py_executable": shlex.quote(sys.executable)},
            "num_cpus": max(os.cpu_count() or 1, resources["CPU"]),
            "include_dashboard": False,
            "object_store_memory": config.runtime.object_store_bytes,
        }
    try:
        ray.init(**options)
        with _terminate_by_exception():  # after init, which installs a handler of its own
            _require_resources(resources)
            yield
    finally:
        ray.shutdown()


def _require_resources(needed: dict[str, int]) -> None:
    """Ray would wait for ever for what it does not have."""
    present = ray.cluster_resources()
    lacking = [
        f"{name}: {amount} needed, {present.get(name, 0):g} present"
        for name, amount in needed.items()
        if present.get(name, 0) < amount
    ]
    if lacking:
        raise RuntimeError(f"the Ray cluster is too small for this run: {'; '.join(lacking)}")


@contextlib.contextmanager
def _terminate_by_exception() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that everything is closed; Ray would abort on it."""

    def leave(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_for(reference: Any, watched: Sequence[Any], timeout_seconds: float) -> Any:
    """The result of one remote call, or at once the error of another that it depends on.

    Raises:
        TimeoutError: neither came in time.
    """
    pending = [reference, *watched]
    while True:
        ready, pending = ray.wait(pending, num_returns=1, timeout=timeout_seconds)
        if not ready:
            raise TimeoutError(f"no answer from a worker in {timeout_seconds:g} s")
        result = ray.get(ready[0])
        if ready[0] == reference:
            return result


def current_node_id() -> str:
    """Ray's id of the node that the calling worker is on."""
    return str(ray.get_runtime_context().get_node_id())


def free_tcp_address() -> str:
    """tcp://ip:port of this node, free at the time of asking, for torch.distributed."""
    ip = ray.util.get_node_ip_address()
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind((ip, 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"
