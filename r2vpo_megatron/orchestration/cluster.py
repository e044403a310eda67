"""Ray: start or join it for one run, and leave nothing behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import psutil
import ray

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.ray_isolation import private_environment, warn_if_open

WAITS_PER_DEADLINE = 8  # of which one at most passes while the driver itself is stopped
DAEMONS = ("raylet", "gcs_server")
EXIT_TERMINATED = 128 + signal.SIGTERM


class DaemonLost(RuntimeError):
    """Ray itself broke, on this node."""


class NoAnswer(TimeoutError):
    """A part of the run did not answer in time; any other TimeoutError is of a file or a socket."""


@contextlib.contextmanager
def ray_session(config: RunConfig, resources: dict[str, int]) -> Iterator[None]:
    """Join the Ray cluster at `runtime.ray_address`, or start one on this machine for the block.

    A cluster that is started here is closed to others (`private_environment`) and ends with the
    block, also on an exception or SIGTERM; one that is joined is left, and its actors of this run
    end with their driver.

    Args:
        config: of the run.
        resources: what the run's actors need in all, by Ray's names (CPU, GPU, NPU).

    Raises:
        RuntimeError: the cluster has less than that, or cannot be joined.
    """
    # Nothing is reported to anyone; it stays so for what this process starts later.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        terminate_by_exception = stack.enter_context(_own_handler())
        if config.runtime.ray_address:
            stack.callback(ray.shutdown)
            _join(config.runtime.ray_address, options)
        else:
            stack.enter_context(private_environment())
            stack.callback(ray.shutdown)  # before its token goes
            ray.init(**options, **_own_cluster(config, resources))
        terminate_by_exception()  # again: init installs a handler of its own
        _require_resources(resources)
        with _watching_daemons():
            yield


def _own_cluster(config: RunConfig, resources: dict[str, int]) -> dict[str, Any]:
    """What ray.init is told of a cluster that it is to start."""
    return {
        "address": "local",  # RAY_ADDRESS in the environment must not decide
        # Ray starts workers by `bash -c`, without quoting the interpreter's path
        # (ray/_private/runtime_env/context.py, exec_worker).
        "runtime_env": {"py_executable": shlex.quote(sys.executable)},
        "num_cpus": max(os.cpu_count() or 1, resources["CPU"]),
        "include_dashboard": False,
        "object_store_memory": config.runtime.object_store_bytes,
    }


def _join(address: str, options: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise RuntimeError(
            f"runtime.ray_address = {address!r}: Ray does not let this run in ({error}); where it "
            "asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file of that "
            "cluster's token"
        ) from error
    warn_if_open()


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
def _own_handler() -> Iterator[Callable[[], None]]:
    """Let SIGTERM unwind the stack, so that everything is closed; Ray would abort on it.

    Gives what installs the handler once more.
    """

    def leave(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(EXIT_TERMINATED)

    def install() -> None:
        signal.signal(signal.SIGTERM, leave)

    before = signal.getsignal(signal.SIGTERM)
    install()
    try:
        yield install
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _watching_daemons() -> Iterator[None]:
    """Raise DaemonLost in the block as soon as a daemon that Ray started here is gone.

    Without one, Ray waits for what will not come, or names symptoms of its own.
    """
    daemons = [child for child in psutil.Process().children() if child.name() in DAEMONS]

    def look(signal_number: int = 0, frame: FrameType | None = None) -> None:
        lost = [str(daemon.pid) for daemon in daemons if not _is_alive(daemon)]
        if lost:
            signal.signal(signal.SIGCHLD, before)  # once
            raise DaemonLost(
                f"a daemon of Ray on this node is gone (pid {', '.join(lost)}): it was killed, ran "
                "out of memory or crashed"
            )

    before = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    except DaemonLost:
        raise
    except Exception as error:
        try:
            look()
        except DaemonLost as lost:
            raise lost from error
        raise
    finally:
        signal.signal(signal.SIGCHLD, before)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def get_in_time(references: Any, timeout_seconds: float, stage: str) -> Any:
    """What ray.get gives.

    Args:
        references: one, or a list.
        timeout_seconds: from now on, for all of them; time in which this process itself was
            stopped does not count.
        stage: what is waited for, for the error.

    Raises:
        NoAnswer: not all results came in time.
    """
    for _ in range(WAITS_PER_DEADLINE):
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            return ray.get(references, timeout=timeout_seconds / WAITS_PER_DEADLINE)
    raise NoAnswer(no_answer(stage, timeout_seconds))


def wait_for(reference: Any, watched: Sequence[Any], timeout_seconds: float, stage: str) -> Any:
    """The result of one remote call, or at once the error of another that it depends on.

    Raises:
        NoAnswer: nothing came in time, as in `get_in_time`.
    """
    pending, waits_left = [reference, *watched], WAITS_PER_DEADLINE
    while waits_left:
        seconds = timeout_seconds / WAITS_PER_DEADLINE
        ready, pending = ray.wait(pending, num_returns=1, timeout=seconds)
        if not ready:
            waits_left -= 1
            continue
        waits_left = WAITS_PER_DEADLINE
        result = ray.get(ready[0])
        if ready[0] == reference:
            return result
    raise NoAnswer(no_answer(stage, timeout_seconds))


def no_answer(stage: str, timeout_seconds: float) -> str:
    """What a NoAnswer says."""
    return f"{stage}: no answer in {timeout_seconds:g} s (runtime.timeout_seconds)"


def current_node_id() -> str:
    """Ray's id of the node that the calling worker is on."""
    return str(ray.get_runtime_context().get_node_id())


def free_tcp_address() -> str:
    """tcp://ip:port of this node, free at the time of asking, for torch.distributed."""
    ip = ray.util.get_node_ip_address()
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.bind((ip, 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"
