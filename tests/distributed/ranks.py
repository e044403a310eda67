"""Run a function on several ranks, each a forked process, and collect what they return."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 120.0
) -> list[Any]:
    """Call function(rank, world_size, init_method, *args) in `world_size` processes.

    Processes are forked: Megatron, once imported by the parent, costs them nothing. The parent
    must therefore not have started gloo or OpenMP threads of its own; run all torch arithmetic
    of a test with one thread, as conftest.py arranges.

    Args:
        world_size: number of ranks.
        function: what every rank runs; its result must pickle. `init_method` is a file:// URL
            for torch.distributed.
        args: passed on; inherited by fork, so anything will do.
        timeout_seconds: after which every rank is killed.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: a rank raised (with its traceback) or died.
        TimeoutError: not all ranks finished in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        init_method = f"file://{Path(folder) / 'rendezvous'}"
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_run_one,
                args=(pipes[rank][1], function, rank, world_size, init_method, args),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                process.start()
                sender.close()
            return _collect(processes, [receiver for receiver, _ in pipes], timeout_seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


def _run_one(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    init_method: str,
    args: tuple[Any, ...],
) -> None:
    try:
        outcome = (True, function(rank, world_size, init_method, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    # Plain pickle: torch teaches multiprocessing to send tensors by reference to a process that
    # is gone by the time they are read.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()


def _collect(
    processes: Sequence[BaseProcess], receivers: Sequence[Connection], timeout_seconds: float
) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    while len(results) < len(processes):
        pending = [rank for rank in range(len(processes)) if rank not in results]
        # Ranks forked later hold copies of a pipe's end, so a rank's death does not close it:
        # watch the processes too.
        watched = [receivers[rank] for rank in pending]
        ready = wait(
            [*watched, *(processes[rank].sentinel for rank in pending)],
            max(0.0, deadline - time.monotonic()),
        )
        if not ready:
            raise TimeoutError(f"ranks {pending} did not finish in {timeout_seconds} s")
        for rank in pending:
            if receivers[rank].poll():
                succeeded, value = pickle.loads(receivers[rank].recv_bytes())
                if not succeeded:
                    raise RuntimeError(f"rank {rank} raised:\n{value}")
                results[rank] = value
            elif not processes[rank].is_alive():
                code = processes[rank].exitcode
                raise RuntimeError(f"rank {rank} died without a result, exit code {code}")
    return [results[rank] for rank in range(len(processes))]
