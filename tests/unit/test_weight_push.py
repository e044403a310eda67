"""The order of calls in a weight push, with fakes of the learner's ranks and the engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from r2vpo_megatron.orchestration.push_targets import TargetsLost
from r2vpo_megatron.orchestration.weight_push import push_weights
from r2vpo_megatron.rollout.weight_receiver import INTERRUPTED
from r2vpo_megatron.rollout.weight_updates import WeightTransferInterrupted

NUM_BUCKETS = 4


class Bucket:
    def __init__(self, index: int) -> None:
        self.index = index


class FakeLearner:
    """Ranks that answer when they are waited for; `breaks` at a bucket, once."""

    def __init__(self, log: list[str], *, connects: bool, breaks_at: int | None = None) -> None:
        self.log, self._connects, self.breaks_at = log, connects, breaks_at
        self.connected_members: tuple[str, ...] = ()
        self.is_open = False
        self._next = 0

    def offer_weight_connection(self, size: int) -> str | None:
        self.log.append(f"offer {size}")
        return "there" if self._connects else None

    def begin_joining(self) -> str:
        self.log.append("join")
        return "joining"

    def finish_joining(self, reference: str) -> None:
        assert reference == "joining"
        self.log.append("joined")

    def begin_weight_push(self, version: int) -> None:
        assert not self.is_open
        self.is_open, self._next = True, 0
        self.log.append(f"gather {version}")

    def ask_for_bucket(self) -> int:
        self._next += 1
        self.log.append(f"ask {self._next - 1}")
        return self._next - 1

    def await_bucket(self, index: int) -> Bucket | None:
        if index == self.breaks_at:
            self.breaks_at = None
            raise WeightTransferInterrupted("a receiver has gone")
        self.log.append(f"get {index}")
        return Bucket(index) if index < NUM_BUCKETS else None

    def finish_weight_push(self) -> tuple[int, dict[str, float]]:
        self.is_open = False
        return 77, {"weight_sync/num_buckets": float(NUM_BUCKETS)}

    def abandon_weight_push(self) -> None:
        assert self.is_open
        self.is_open = False
        self.log.append("abandon")


class FakeTargets:
    """Two engines of two workers each; the first loads in 1 s, the second in 2 s."""

    workers_per_engine = 2

    def __init__(self, log: list[str], members: tuple[str, ...] = ("e0", "e1")) -> None:
        self.log, self.membership = log, members
        self.interrupted_at: int | None = None
        self.lost_at: int | None = None
        self.lost_in: str | None = None

    def start(self, method: str, *args: Any) -> Any:
        return self.start_each(method, [args] * len(self.membership))

    def start_each(self, method: str, args: list[Any]) -> Any:
        shown = [[a.index if isinstance(a, Bucket) else a for a in each] for each in args]
        self.log.append(f"{method} {shown[0] if shown[0] == shown[-1] else shown}")
        return method, args

    def finish(self, pending: Any) -> list[Any]:
        method, args = pending
        if method == self.lost_in:
            raise TargetsLost("no engine is left")
        if method != "load_weight_bucket":
            return [{f"weight_sync/{method}": i} for i, _ in enumerate(self.membership)]
        index = args[0][0].index
        self.log.append(f"loaded {index}")
        if index == self.lost_at:
            raise TargetsLost("no engine is left")
        if index == self.interrupted_at:
            self.interrupted_at, self.membership = None, self.membership[1:]
            return [{INTERRUPTED: 1.0}]
        return [{"weight_sync/load_seconds": 1.0 + i} for i, _ in enumerate(self.membership)]


class FakePool:
    def __init__(self, targets: FakeTargets) -> None:
        self._targets = targets
        self.replacements: list[FakeTargets] = []

    @contextmanager
    def pushing(self, version: int, only_waiting: bool = False) -> Iterator[FakeTargets]:
        log = self._targets.log
        log.append(f"rest {version} {only_waiting}")
        try:
            yield self._targets
        except TargetsLost:
            if not self.replacements:  # no restart is left
                raise RuntimeError("rollout.max_restarts") from None
            self._targets = self.replacements.pop()
            raise
        log.append("resume")


def push(
    learner: Any, targets: Any, version: int, replacement: Any = None, **options: bool
) -> dict[str, float]:
    learner.log.clear()
    pool: Any = FakePool(targets)
    pool.replacements += [replacement] if replacement is not None else []
    return push_weights(learner, pool, version, **options)


def test_a_bucket_is_gathered_while_the_one_before_is_loaded_and_no_earlier() -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=False), FakeTargets(log)
    metrics = push(learner, targets, 5)
    assert log == [
        "rest 5 False",
        "begin_weight_update [5]",
        "offer 5",
        "gather 5",
        "ask 0",
        "get 0",
        *(
            step
            for i in range(NUM_BUCKETS)
            for step in (f"load_weight_bucket [{i}]", f"ask {i + 1}", f"loaded {i}", f"get {i + 1}")
        ),
        "finish_weight_update [5, 77]",
        "resume",
    ]
    assert metrics.pop("weight_sync/push_seconds") > 0
    assert metrics == {
        "weight_sync/num_buckets": NUM_BUCKETS,
        "weight_sync/load_seconds": 2.0 * NUM_BUCKETS,  # the slowest engine's, summed
        "weight_sync/finish_weight_update": 1,
    }


def test_engines_are_connected_once_and_again_when_their_processes_change() -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=True), FakeTargets(log)
    push(learner, targets, 1)
    first = log[:7]
    assert first[2:] == [
        "offer 5",  # the sender and two engines of two workers
        "join",
        "connect_weight_transfer [['there', 1], ['there', 3]]",
        "joined",
        "gather 1",
    ]
    push(learner, targets, 2)
    assert "join" not in log
    targets.membership = ("e0", "e2")
    push(learner, targets, 3, only_waiting=True)
    assert log.count("join") == 1 and log[0] == "rest 3 True"
    assert learner.connected_members == ("e0", "e2")


@pytest.mark.parametrize("who", ["sender", "engine"])
def test_a_broken_connection_is_made_anew_for_those_that_are_left(who: str) -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=True), FakeTargets(log)
    if who == "sender":
        learner.breaks_at = 2
    else:
        targets.interrupted_at = 1
    push(learner, targets, 4)
    assert log.count("abandon") == 1
    again = log[log.index("abandon") + 1 :]
    size = 5 if who == "sender" else 3
    assert again[:3] == ["begin_weight_update [4]", f"offer {size}", "join"]
    assert again[-2:] == ["finish_weight_update [4, 77]", "resume"]
    assert sum(step.startswith("loaded") for step in again) == NUM_BUCKETS


def test_a_connection_that_breaks_twice_ends_the_push() -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=True), FakeTargets(log)
    learner.breaks_at = 0
    targets.interrupted_at = 0
    with pytest.raises(WeightTransferInterrupted, match="bucket 0 did not reach every engine"):
        push(learner, targets, 4)
    assert log.count("abandon") == 2 and "resume" not in log
    assert not learner.is_open


def test_without_engines_the_learners_ranks_are_left_in_step() -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=False), FakeTargets(log)
    targets.lost_at = 1
    with pytest.raises(RuntimeError, match="max_restarts"):
        push(learner, targets, 4)
    assert log[-1] == "abandon" and not learner.is_open


def test_engines_that_replace_those_lost_in_a_push_get_it() -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=False), FakeTargets(log)
    targets.lost_at = 1
    metrics = push(learner, targets, 4, replacement=FakeTargets(log, ("e2",)))
    abandoned = log.index("abandon")
    assert [line for line in log[:abandoned] if line.startswith("loaded")] == [
        "loaded 0",
        "loaded 1",
    ]
    again = log[abandoned + 1 :]
    assert again[:2] == ["rest 4 False", "begin_weight_update [4]"]
    assert [line for line in again if line.startswith("loaded")] == [
        f"loaded {index}" for index in range(NUM_BUCKETS)
    ]
    assert again[-1] == "resume"
    assert metrics["weight_sync/num_buckets"] == NUM_BUCKETS


def test_a_connection_that_engines_were_lost_in_is_not_taken_for_that_of_before() -> None:
    log: list[str] = []
    learner, targets = FakeLearner(log, connects=True), FakeTargets(log)
    push(learner, targets, 1)
    restarted = FakeTargets(log, ("e2",))
    restarted.lost_in = "connect_weight_transfer"
    with pytest.raises(TargetsLost):
        push(learner, restarted, 1, replacement=restarted, only_waiting=True)
    push(learner, targets, 2)  # to those of the first push, whose connection rank 0 has left
    assert "offer 5" in log
