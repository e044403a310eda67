"""Checkpoints of the loop: left at any place and taken up from disk, it does what it would have."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.checkpoint.run_folder import (
    list_checkpoints,
    newest_sound,
    verify_checkpoint,
)
from r2vpo_megatron.config import PipelineConfig, ReplayConfig, RunConfig
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration.checkpoints import RunCheckpoints, restore
from r2vpo_megatron.orchestration.interrupts import StopRequested
from r2vpo_megatron.orchestration.loop import Ring, train
from tests.fake_ring import FakeLearner, FakeRollout, make_config, make_ring, push, reward

__all__ = ["push"]  # the fixture that stands in for weight pushes

MOMENTS = [0.0, 0.03, 0.045, 0.05, 0.01, 0.2, 0.07]
INCIDENTAL = ("time/", "throughput/", "pipeline/learner_wait_fraction", "memory/")


@dataclass
class SavedLearner(FakeLearner):
    """Its state is how many updates it has made; it writes that in the background."""

    num_before: int = 0
    release: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    may_write: bool = True
    error: OSError | None = None

    def update(self, *args: Any, **kwargs: Any) -> Any:
        result = super().update(*args, **kwargs)
        moment = MOMENTS[(self.num_before + len(self.penalties) - 1) % len(MOMENTS)]
        return replace(result, metrics=result.metrics | {"ratio/second_moment": moment})

    def begin_save_state(self, folder: Path) -> None:
        state = json.dumps(self.num_before + len(self.penalties))

        def write() -> None:
            self.release.wait(10)
            (folder / "learner.json").write_text(state)

        self.thread = threading.Thread(target=write)
        self.thread.start()
        if self.may_write:
            self.release.set()

    def is_state_saved(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def finish_save_state(self) -> None:
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            raise self.error


class Stopping(FakeRollout):
    """Has its wait broken off once, before the responses of an iteration."""

    stop_at = 0  # iteration
    num_waits = 0

    def wait_for(self, condition: Any) -> Any:
        self.num_waits += 1
        if self.num_waits == self.stop_at:
            raise StopRequested
        return super().wait_for(condition)


def config_of(mode: str) -> RunConfig:
    config = make_config(
        mini_batch_samples=4,
        pipeline=PipelineConfig(mode=mode),
        dual_controller="multiplicative",
        behavior_logprobs="rollout",
        filter_zero_advantage_groups=mode == "asynchronous",
    )
    return replace(
        config,
        replay=ReplayConfig(capacity_iterations=2, update_to_data=2),
        train=replace(config.train, num_iterations=4),
    )


def parts_of(ring: Ring) -> dict[str, Any]:
    return {"collector": ring.collector, "dual": ring.dual, "guard": ring.guard}


def checkpoints_of(
    ring: Ring, learner: Any, folder: Path, said: list[str], **fields: Any
) -> RunCheckpoints:
    config = replace(config_of("synchronous").checkpoint, **fields)
    return RunCheckpoints(
        config, folder, {}, learner, ring.replay, parts_of(ring), ring.progress, said.append
    )


def without(records: list[Any], prefixes: tuple[str, ...]) -> list[Any]:
    return [
        {name: value for name, value in record.items() if not name.startswith(prefixes)}
        for record in records
    ]


def turn(ring: Ring, config: RunConfig, stop_after: int = 0) -> tuple[list[Any], list[Any]]:
    """Iterations' and updates' metrics until the end, or an update's number."""
    records: list[Any] = []
    updates: list[Any] = []

    def on_update(number: int, metrics: Any) -> None:
        updates.append((number, metrics))
        if number == stop_after:
            raise StopRequested

    try:
        for record, _ in train(config, ring, StageTimers(), on_update):
            records += without([record], INCIDENTAL)
    except StopRequested:
        pass
    return records, updates


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("where", [f"update {n}" for n in range(1, 17)] + ["wait 2", "wait 4"])
def test_left_anywhere_it_goes_on_as_if_it_had_not_been(
    mode: str, where: str, tmp_path: Path
) -> None:
    config, (kind, number) = config_of(mode), where.split()
    straight = SavedLearner()
    expected = turn(make_ring(config, straight, FakeRollout(), reward, tmp_path), config)

    first, rollout = SavedLearner(), Stopping()
    rollout.stop_at = int(number) if kind == "wait" else 0
    ring = make_ring(config, first, rollout, reward, tmp_path)
    begun = turn(ring, config, stop_after=int(number) if kind == "update" else 0)
    root = tmp_path / "checkpoints"
    assert checkpoints_of(ring, first, root, []).save(wait=True)

    manifest = newest_sound(root, pytest.fail)
    assert manifest is not None
    second, rollout = SavedLearner(), Stopping()
    second.num_before = json.loads((manifest.folder / "learner" / "learner.json").read_text())
    rollout.version = ring.rollout.version  # type: ignore[attr-defined]
    ring = make_ring(config, second, rollout, reward, tmp_path)
    restore(manifest.folder, ring.replay, parts_of(ring), ring.progress)
    rest = turn(ring, config)

    assert begun[1] + rest[1] == expected[1]
    if kind == "wait" and mode == "asynchronous":  # by newer weights than in the other run
        ages = ("pipeline/staleness", "logprob_gap/")
        assert without(begun[0] + rest[0], ages) == without(expected[0], ages)
    else:
        assert begun[0] + rest[0] == expected[0]
    learned = [*first.mini_batches, *second.mini_batches]
    names = [[sample.sample_id for sample in batch] for batch in learned]
    assert names == [[sample.sample_id for sample in batch] for batch in straight.mini_batches]
    assert first.penalties + second.penalties == straight.penalties


def test_training_goes_on_while_a_checkpoint_is_written_and_a_second_one_waits(
    tmp_path: Path,
) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    learner.may_write = False
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=3)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(ring, learner, root, said)
    checkpoints.save()
    num_updates = len(learner.penalties)
    turn(ring, config, stop_after=6)
    checkpoints.poll()
    assert list_checkpoints(root) == [] and said == []
    threading.Timer(0.2, learner.release.set).start()
    learner.may_write = True
    assert checkpoints.save(wait=True)
    newest, before = list_checkpoints(root)
    assert before.name == "iteration-000000-update-003"
    assert newest.name == "iteration-000001-update-002"
    assert json.loads((before / "learner" / "learner.json").read_text()) == num_updates
    state = json.loads((before / "run_state.json").read_text())
    assert state["guard"]["num_updates"] == num_updates
    assert len(said) == 2 and str(before) in said[0] and str(newest) in said[1]
    assert checkpoints.metrics()["time/checkpoint_seconds"] > 0.1
    assert checkpoints.metrics()["time/checkpoint_seconds"] == 0
    checkpoints.save(wait=True)  # of this place there is one already
    assert len(said) == 2
    checkpoints.close()


def test_what_cannot_be_written_is_said_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(ring, learner, root, said)
    assert checkpoints.save(wait=True)
    turn(ring, config, stop_after=2)
    learner.error = OSError(28, "No space left on device")
    assert not checkpoints.save(wait=True)
    assert "iteration-000000-update-002 was not written" in said[-1] and "No space" in said[-1]
    assert [folder.name for folder in list_checkpoints(root)] == ["iteration-000000-update-001"]
    verify_checkpoint(list_checkpoints(root)[0])
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    learner.error = None
    assert checkpoints.save(wait=True)
    assert len(list_checkpoints(root)) == 2
    checkpoints.close()


def test_a_rank_that_does_not_answer_ends_the_run_and_is_no_full_disk(tmp_path: Path) -> None:
    config, learner = config_of("synchronous"), SavedLearner()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    checkpoints = checkpoints_of(ring, learner, tmp_path / "checkpoints", [])
    learner.error = TimeoutError("finish_save_state: no answer in 5 s")
    with pytest.raises(TimeoutError, match="no answer"):
        checkpoints.save(wait=True)
    checkpoints.close()
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_the_newest_are_kept_and_those_of_every_other_iteration(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(
        ring, learner, root, said, every_iterations=1, keep_last=1, keep_every_iterations=2
    )
    for _ in train(config, ring, StageTimers(), lambda number, metrics: None):
        checkpoints.after_iteration()
    assert checkpoints.save(wait=True)
    names = [folder.name for folder in list_checkpoints(root)]
    assert names == ["iteration-000004", "iteration-000002"]
    checkpoints.close()


def test_weights_that_are_not_finite_end_the_run_and_leave_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    config, learner = config_of("synchronous"), SavedLearner()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(ring, learner, root, [])
    assert checkpoints.save(wait=True)
    turn(ring, config, stop_after=2)

    def refuse(folder: Path) -> None:
        raise FloatingPointError("weight x is not finite")

    learner.begin_save_state = refuse  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError):
        checkpoints.save(wait=True)
    (kept,) = root.iterdir() if not (root / "latest").exists() else list_checkpoints(root)
    verify_checkpoint(kept)
    checkpoints.close()
