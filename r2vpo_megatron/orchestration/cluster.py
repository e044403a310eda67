"""Ray: start or join it for one run, and leave nothing behind."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import ray

OBJECT_STORE_BYTES = 512 << 20  # batches and descriptors only; weights travel beside Ray


@contextmanager
def ray_session(address: str, num_actors: int) -> Iterator[None]:
    """Join the Ray cluster at `address`, or start one on this machine for the block.

    A cluster that is started here ends with the block, also on an exception; one that is joined
    is left, and its actors of this run end with their driver.

    Args:
        address: of a running cluster; empty: start one here.
        num_actors: actors this run will create, each of one CPU slot.
    """
    # Workers import this package from where the driver does, installed or not.
    package_root = str(Path(__file__).resolve().parents[2])
    runtime_env = {"env_vars": {"PYTHONPATH": _prepend(os.environ.get("PYTHONPATH"), package_root)}}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options = {"runtime_env": runtime_env, "log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **options)
    else:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, num_actors),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _prepend(path: str | None, entry: str) -> str:
    return entry if not path else f"{entry}{os.pathsep}{path}"


def free_tcp_address() -> str:
    """tcp://ip:port of this node, free at the time of asking, for torch.distributed."""
    ip = ray.util.get_node_ip_address()
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind((ip, 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"
