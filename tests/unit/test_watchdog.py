"""Which process is said to lag, and what the error says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.exceptions import GetTimeoutError, RaySystemError, RayTaskError

from r2vpo_megatron.observability.heartbeat import Beat
from r2vpo_megatron.observability.stacks import ProcessReport
from r2vpo_megatron.orchestration import watchdog
from r2vpo_megatron.orchestration.cluster import NoAnswer, get_in_time, wait_for
from r2vpo_megatron.orchestration.watchdog import (
    ENGINE,
    StageTimeout,
    explain_timeouts,
    find_laggard,
    learner_name,
)

IN_COLLECTIVE = '  File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce\n'
# As faulthandler shows one that waits in Work.wait, which is C++.
IN_RECEIVING = (
    '  File "/x/megatron/core/pipeline_parallel/p2p_communication.py", line 1 in recv_forward\n'
    '  File "/x/megatron/core/pipeline_parallel/schedules.py", line 1 in forward_backward\n'
)
IN_MODEL = '  File "/x/r2vpo_megatron/models/attention.py", line 1 in forward\n'


def process(
    name: str | int,
    num_stages: int = 7,
    step: int = 2,
    *,
    inside: bool = True,
    state: str = "sleeping",
    ago: float = 5.0,
    stacks: str = "",
) -> ProcessReport:
    """A learner rank, by its number, or an engine."""
    label = name if isinstance(name, str) else learner_name(name)
    beat = Beat("update", num_stages, step, inside, ago)
    return ProcessReport(label, "node-a", 100, state, beat, stacks)


ENGINE_AT_WORK = process(ENGINE, num_stages=1, step=0, ago=99.0)


@pytest.mark.parametrize(
    ("processes", "laggard"),
    [
        pytest.param([process(0), process(1, step=1)], 1, id="fewer micro-batches"),
        pytest.param([process(0), process(1, num_stages=6, step=9)], 1, id="an earlier stage"),
        pytest.param(
            [process(0), process(1, num_stages=6, step=9, inside=False)], 1, id="never began"
        ),
        pytest.param([process(0, step=9), process(1, inside=False)], 0, id="the other has ended"),
        pytest.param(
            [process(0, stacks=IN_MODEL), process(1, step=1, stacks=IN_COLLECTIVE)],
            0,
            id="the other waits in a collective",
        ),
        pytest.param(
            [process(0, step=1, stacks=IN_MODEL), process(1, stacks=IN_RECEIVING)],
            0,
            id="the other waits for an earlier pipeline stage",
        ),
        pytest.param([process(0), process(1, state="disk-sleep")], 1, id="kept by the kernel"),
        pytest.param(
            [process(0, step=1), process(1, state="disk-sleep")], 0, id="progress says more"
        ),
        pytest.param(
            [process(0, step=1), process(1, num_stages=9, state="stopped")], 1, id="stopped"
        ),
        pytest.param(
            [process(0, state="stopped"), process(1, state="gone")], 1, id="gone before stopped"
        ),
        pytest.param([ENGINE_AT_WORK, process(0), process(1, step=1)], 1, id="ranks first"),
        pytest.param(
            [process(ENGINE, state="stopped"), process(0), process(1)], ENGINE, id="stopped engine"
        ),
        pytest.param(
            [process(0, inside=False), process(ENGINE, ago=1.0), ENGINE_AT_WORK],
            ENGINE,
            id="the quieter engine, where no rank is at work",
        ),
    ],
)
@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_laggard(processes, laggard, is_reversed):
    found = find_laggard(processes[::-1] if is_reversed else processes)
    assert found is not None
    assert found.name == (laggard if isinstance(laggard, str) else learner_name(laggard))
    if found is not None and laggard == ENGINE and len(processes) == 3:
        assert found.state == "stopped" or found.beat == ENGINE_AT_WORK.beat


def test_nobody_lags_when_all_are_idle():
    idle = [process(0, inside=False), process(1, inside=False), process(ENGINE, inside=False)]
    assert find_laggard(idle) is None
    assert find_laggard([replace(process(0), beat=None)]) is None
    assert find_laggard([]) is None


def give(monkeypatch: pytest.MonkeyPatch, processes: list[ProcessReport], silent: list[str]):
    monkeypatch.setattr(watchdog, "_examine_run", lambda: (list(processes), silent))


def test_the_error_names_stage_laggard_and_file(monkeypatch, tmp_path):
    ranks = [process(0, stacks="stack of 0"), process(1, step=1, stacks="stack of 1")]
    give(monkeypatch, ranks, [])
    path = tmp_path / "stacks.txt"
    cause = NoAnswer("update: no answer in 20 s")
    with pytest.raises(StageTimeout) as raised, explain_timeouts(2, path):
        raise cause
    assert raised.value.__cause__ is cause
    assert str(raised.value) == (
        "update: no answer in 20 s; it waits for learner rank 1 (pid 100 on node-a, sleeping): "
        f"in update (its stage 7, step 1), last beat 5.0 s ago; stacks of all processes: {path}"
    )
    text = path.read_text()
    assert text.startswith(
        "=== learner rank 0 (pid 100 on node-a, sleeping): in update (its stage 7, step 2), "
        "last beat 5.0 s ago\nstack of 0\n=== learner rank 1 ("
    )
    assert text.index("stack of 1") < text.index("=== driver\n") < text.index("in _write_stacks")


@pytest.mark.parametrize(
    ("silent", "expected", "state"),
    [
        ([], "it waits for learner rank 1 (gone); stacks", "gone"),
        # It may be well, and its node too busy to say so.
        (["10.0.0.2"], "it waits for learner rank 0 (pid 100 on node-a, sleeping): ", "unknown"),
    ],
)
def test_a_rank_that_no_node_knows_is_gone_if_all_have_answered(
    monkeypatch, tmp_path, silent, expected, state
):
    give(monkeypatch, [process(0, step=1)], silent)
    with pytest.raises(StageTimeout) as raised, explain_timeouts(2, tmp_path / "stacks.txt"):
        raise NoAnswer
    assert str(raised.value).startswith(f"a deadline passed; {expected}")
    assert all(f"no answer from {node}" in str(raised.value) for node in silent)
    assert f"=== learner rank 1 ({state})\n" in (tmp_path / "stacks.txt").read_text()


def test_where_ray_does_not_answer_the_stage_and_the_drivers_stacks_are_kept(monkeypatch, tmp_path):
    def fail() -> None:
        raise RaySystemError("the control store does not answer")

    monkeypatch.setattr(watchdog, "_examine_run", fail)
    with pytest.raises(StageTimeout) as raised, explain_timeouts(2, tmp_path / "stacks.txt"):
        raise NoAnswer("update: no answer in 20 s")
    assert str(raised.value).startswith("update: no answer in 20 s; processes could not be looked")
    assert "in _write_stacks" in (tmp_path / "stacks.txt").read_text()


def test_a_full_disk_does_not_hide_the_laggard(monkeypatch):
    give(monkeypatch, [process(0), process(1, step=1)], [])
    with pytest.raises(StageTimeout) as raised, explain_timeouts(2, Path("/dev/full")):
        raise NoAnswer("update")
    assert "it waits for learner rank 1 (" in str(raised.value)
    assert "stacks could not be written: [Errno 28]" in str(raised.value)


def test_other_errors_pass(monkeypatch, tmp_path):
    give(monkeypatch, [], [])
    of_worker = RayTaskError("update", "traceback", TimeoutError("a lock")).as_instanceof_cause()
    assert isinstance(of_worker, TimeoutError)
    for error in (of_worker, KeyError("x")):
        with pytest.raises(type(error)) as raised, explain_timeouts(2, tmp_path / "stacks.txt"):
            raise error
        assert raised.value is error
    assert not list(tmp_path.iterdir())


class Clock:
    """Stands for Ray: its waits take time, in which answers may come and the driver may stop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.answers: dict[str, float] = {}  # when they come
        self.stopped_seconds = 0.0  # of the next wait
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(ray, "wait", self.wait)

    def get(self, references: str | list[str], timeout: float = 0.0) -> str | list[str]:
        asked = [references] if isinstance(references, str) else references
        if len(self.ready(asked, timeout)) < len(asked):
            raise GetTimeoutError
        return references

    def wait(
        self, references: list[str], num_returns: int, timeout: float
    ) -> tuple[list[str], list[str]]:
        ready = self.ready(references, timeout)[:num_returns]
        return ready, [reference for reference in references if reference not in ready]

    def ready(self, references: list[str], timeout: float) -> list[str]:
        comes = [self.answers.get(reference, float("inf")) for reference in references]
        if max(comes) > self.now:
            self.now += max(timeout, self.stopped_seconds)
            self.stopped_seconds = 0.0
        return [name for name in references if self.answers.get(name, float("inf")) <= self.now]


def test_answers_that_come_in_time_are_given(monkeypatch):
    clock = Clock(monkeypatch)
    clock.answers = {"a": 7.0, "b": 3.0}
    assert get_in_time(["a", "b"], 8.0, "update") == ["a", "b"]
    assert get_in_time("a", 8.0, "update") == "a"
    assert clock.now == 7.0


def test_the_deadline_is_what_was_asked_for(monkeypatch):
    clock = Clock(monkeypatch)
    clock.answers = {"a": 9.0, "b": 0.0}
    message = re.escape("update: no answer in 8 s (runtime.timeout_seconds)")
    with pytest.raises(TimeoutError, match=message):
        get_in_time(["a", "b"], 8.0, "update")
    assert clock.now == 8.0


def test_time_in_which_the_driver_was_stopped_does_not_count(monkeypatch):
    for wait in (
        lambda: get_in_time("a", 8.0, "update"),
        lambda: wait_for("a", [], 8.0, "update"),
    ):
        clock = Clock(monkeypatch)
        clock.answers, clock.stopped_seconds = {"a": 1007.0}, 1000.0
        assert wait() == "a"
        clock = Clock(monkeypatch)
        clock.answers, clock.stopped_seconds = {"a": 1008.0}, 1000.0
        with pytest.raises(TimeoutError, match="update"):
            wait()
