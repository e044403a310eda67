"""When a stage passes its deadline: which process is to blame, and what all of them are doing.

A run's workers announce themselves on their nodes. Nothing else is kept of them: should a deadline
pass, each node is searched for the processes of the run that live there, restarted ones included.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r2vpo_megatron.observability.heartbeat import Heartbeat
from r2vpo_megatron.observability.stacks import (
    STACK_SIGNAL,
    ProcessReport,
    examine_processes,
    write_stacks_when_asked,
)
from r2vpo_megatron.orchestration.cluster import NoAnswer, current_node_id

DRIVER = "driver"
LEARNER = "learner rank"
ENGINE = "rollout engine"
OTHER_NODES_SECONDS = 20.0  # for Ray to start a worker there, and for the stacks
# States in which a process does nothing whatever, by psutil's names; the worst first.
UNABLE_STATES = ("gone", "zombie", "stopped", "tracing-stop")
STDERR = 2
# Code in which a rank waits for others: collectives, and receiving from another pipeline stage.
WAITING_PLACES = ("/torch/distributed/", "/pipeline_parallel/p2p_communication.py")


class StageTimeout(TimeoutError):
    """A stage passed its deadline; the message's first line says whose fault it seems to be."""


def learner_name(rank: int) -> str:
    """What a learner rank is called in reports."""
    return f"{LEARNER} {rank}"


def announce(name: str) -> Heartbeat:
    """Make the calling Ray worker known to its run's watchdog; where it is to note its beats."""
    write_stacks_when_asked()
    return Heartbeat(f"{_mark_of(current_node_id())}/{name}")


@contextmanager
def explain_timeouts(num_ranks: int, stacks_path: Path) -> Iterator[None]:
    """Replace a NoAnswer of the block by a StageTimeout, and write the stacks of all processes.

    A deadline that passed in a worker is that worker's error and stays. While the block lasts,
    STACK_SIGNAL has the driver write its stacks to stderr.

    Args:
        num_ranks: of the learner; those that are not found are reported as gone.
        stacks_path: file to write.

    Raises:
        StageTimeout: a deadline passed.
    """
    write_stacks_when_asked(STDERR)
    try:
        yield
    except RayTaskError:
        raise
    except NoAnswer as error:
        raise StageTimeout(_explanation(error, num_ranks, stacks_path)) from error
    finally:
        faulthandler.unregister(STACK_SIGNAL)


def find_laggard(processes: Sequence[ProcessReport]) -> ProcessReport | None:
    """The process that the others wait for; None: all have done what they were asked for.

    One that cannot run comes first. Else it is the learner rank of least progress, as long as any
    is at work: it has entered or left fewer stages; where these are equal, it is the one that is in
    no call of torch.distributed, since in these a rank waits for others; then the one with fewer
    micro-batches. With no rank at work it is the engine whose last beat is oldest.
    """
    unable = [process for process in processes if process.state in UNABLE_STATES]
    if unable:
        return min(unable, key=lambda process: UNABLE_STATES.index(process.state))
    beating = [process for process in processes if process.beat is not None]
    ranks = [process for process in beating if process.name.startswith(LEARNER)]
    if any(_is_at_work(rank) for rank in ranks):
        return min(ranks, key=_progress)
    engines = [process for process in beating if process not in ranks and _is_at_work(process)]
    return max(engines, key=_seconds_since_beat, default=None)


def _is_at_work(process: ProcessReport) -> bool:
    return process.beat is not None and process.beat.is_inside


def _seconds_since_beat(process: ProcessReport) -> float:
    return 0.0 if process.beat is None else process.beat.seconds_ago


def _progress(process: ProcessReport) -> tuple[int, bool, int, bool]:
    beat = process.beat
    assert beat is not None
    is_waiting = any(place in process.stacks for place in WAITING_PLACES)
    is_kept_by_kernel = process.state == "disk-sleep"
    return 2 * beat.num_stages - beat.is_inside, is_waiting, beat.step, not is_kept_by_kernel


def _explanation(error: NoAnswer, num_ranks: int, stacks_path: Path) -> str:
    """One line: what was waited for, who lags, where the stacks are; writes these."""
    parts = [str(error) or "a deadline passed"]
    processes: list[ProcessReport] = []
    silent_nodes: list[str] = []
    try:
        processes, silent_nodes = _examine_run()
    except (RayError, RuntimeError, OSError, KeyError) as failure:  # Ray itself may be what hangs
        parts.append(f"processes could not be looked at: {type(failure).__name__}: {failure}")
    else:
        processes += _missing(processes, num_ranks, "unknown" if silent_nodes else "gone")
        laggard = find_laggard(processes)
        parts.append("no process lags" if laggard is None else f"it waits for {laggard}")
    if silent_nodes:
        parts.append(f"no answer from {', '.join(silent_nodes)}")
    try:
        _write_stacks(stacks_path, processes)
    except OSError as failure:
        parts.append(f"stacks could not be written: {failure}")
    else:
        parts.append(f"stacks of all processes: {stacks_path}")
    return "; ".join(parts)


def _missing(processes: Sequence[ProcessReport], num_ranks: int, state: str) -> list[ProcessReport]:
    """Reports of the learner ranks that were found on no node."""
    found = {process.name for process in processes}
    return [
        ProcessReport(name, node="", pid=0, state=state, beat=None, stacks="(none)")
        for name in map(learner_name, range(num_ranks))
        if name not in found
    ]


def _mark_of(node_id: str) -> str:
    """Tells this run's processes on this Ray node from all others on the machine."""
    return f"{ray.get_runtime_context().get_job_id()}/{node_id}"


def _examine_run() -> tuple[list[ProcessReport], list[str]]:
    """Reports of the workers on all nodes, and the nodes that did not answer in time."""
    own_node = current_node_id()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    # The other nodes first: they start while this one is looked at.
    examine = ray.remote(num_cpus=0, max_retries=0)(examine_processes)
    asked = {
        node_id: examine.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(_mark_of(node_id), address)
        for node_id, address in nodes.items()
        if node_id != own_node
    }
    processes = examine_processes(_mark_of(own_node), nodes[own_node])
    ready: list[Any] = []
    if asked:
        references = list(asked.values())
        ready, _ = ray.wait(references, num_returns=len(references), timeout=OTHER_NODES_SECONDS)
    silent_nodes = []
    for node_id, reference in asked.items():
        if reference not in ready:
            silent_nodes.append(nodes[node_id])
            continue
        try:
            processes += ray.get(reference)
        except RayError:
            silent_nodes.append(nodes[node_id])
    return processes, silent_nodes


def _write_stacks(path: Path, processes: Sequence[ProcessReport]) -> None:
    """One section per process, the driver's own last."""
    with path.open("w", encoding="utf-8") as file:
        for process in processes:
            file.write(f"=== {process}\n{process.stacks}\n")
        file.write(f"=== {DRIVER}\n")
        file.flush()  # what follows goes past the file object
        faulthandler.dump_traceback(file, all_threads=True)
