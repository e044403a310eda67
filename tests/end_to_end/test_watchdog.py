"""A run whose worker hangs: it ends, names the worker and leaves every process's stacks."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from r2vpo_megatron.config import ParallelConfig, RunConfig, RuntimeConfig
from r2vpo_megatron.observability.heartbeat import read_beat
from r2vpo_megatron.observability.stacks import STACK_SIGNAL
from r2vpo_megatron.orchestration.cluster import get_in_time, ray_session
from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.watchdog import (
    StageTimeout,
    announce,
    explain_timeouts,
    learner_name,
)


def sections(text: str) -> dict[str, str]:
    """Name of the process -> its section of stacks.txt."""
    parts = re.split(r"^=== ", text, flags=re.MULTILINE)[1:]
    return {re.split(r" \(|\n", part, maxsplit=1)[0]: part for part in parts}


class HangingRank:
    """What a learner's Ray actor is to the watchdog."""

    def __init__(self, rank: int) -> None:
        self._heartbeat = announce(learner_name(rank))

    def pid(self) -> int:
        return os.getpid()

    def wait_for_others(self) -> None:
        with self._heartbeat.stage("update"):
            self._heartbeat.step(2)
            threading.Event().wait()

    def hold_the_gil(self) -> None:
        with self._heartbeat.stage("update"):
            self._heartbeat.step(1)
            ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)


def is_at_work(pid: int) -> bool:
    beat = read_beat(pid)
    return beat is not None and beat.step > 0


def time_out_on_two_nodes(stacks_path: Path) -> tuple[str, list[int]]:
    """The error's message, and the ranks' process ids."""
    cluster = Cluster()
    for number in range(2):
        name = {f"node{number}": 1}
        cluster.add_node(num_cpus=1, resources=name, object_store_memory=80 << 20)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        worker: Any = ray.remote(HangingRank)
        ranks = [worker.options(resources={f"node{n}": 1}).remote(n) for n in range(2)]
        pids = ray.get([rank.pid.remote() for rank in ranks], timeout=60)
        with pytest.raises(StageTimeout) as raised, explain_timeouts(2, stacks_path):
            calls = [ranks[0].wait_for_others.remote(), ranks[1].hold_the_gil.remote()]
            while not all(map(is_at_work, pids)):
                time.sleep(0.01)
            get_in_time(calls, 0.5, "update")
        for rank in ranks:
            ray.kill(rank, no_restart=True)
        return str(raised.value), pids
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_rank_of_another_node_that_holds_the_gil_is_named(tmp_path):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        message, pids = pool.submit(time_out_on_two_nodes, tmp_path / "stacks").result(timeout=120)
    assert message.startswith("update: no answer in 0.5 s (runtime.timeout_seconds); it waits for ")
    assert f"for learner rank 1 (pid {pids[1]} on " in message
    assert "sleeping): in update (its stage 1, step 1), last beat " in message
    found = sections((tmp_path / "stacks").read_text())
    assert list(found) == ["learner rank 0", "learner rank 1", "driver"]
    assert "in wait_for_others" in found["learner rank 0"]
    assert "in hold_the_gil" in found["learner rank 1"]
    assert "in time_out_on_two_nodes" in found["driver"]
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=20)[1] == []


def leave_a_joined_cluster_with_a_stopped_rank(folder: Path) -> list[str]:
    """What is left of the ranks while the cluster that they were in lives on."""
    cluster = Cluster()
    cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    config = RunConfig(
        parallel=ParallelConfig(tensor=2),
        runtime=RuntimeConfig(device="cpu", ray_address=cluster.address),
    )
    try:
        with ray_session(config, {"CPU": 2}):
            learner = LearnerGroup(config, folder)
            learner.memory_metrics()  # all are there
            workers = [
                process
                for process in psutil.Process().children(recursive=True)
                if "ray::LearnerWorker" in " ".join(process.cmdline())
            ]
            assert len(workers) == 2
            workers[1].suspend()
        return [str(process) for process in psutil.wait_procs(workers, timeout=20)[1]]
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_stopped_rank_does_not_outlive_its_run_in_a_cluster(tmp_path):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        left = pool.submit(leave_a_joined_cluster_with_a_stopped_rank, tmp_path).result(timeout=120)
    assert left == []


@pytest.mark.slow
def test_a_signal_has_the_driver_write_its_stacks_and_go_on(start):
    run = start("r2vpo_off_policy")
    run.wait_for("iteration 1/2", seconds=240)
    os.kill(run.process.pid, STACK_SIGNAL)
    assert run.process.wait(timeout=240) == 0, run.text()
    assert "most recent call first" in run.text()
    assert "in run_training" in run.text()
    run.assert_nothing_left()
