"""Checkpoints of the loop: left at any place and taken up from disk, it does what it would have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.checkpoint.run_folder import (
    newest_sound,
)
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration.checkpoints import restore
from r2vpo_megatron.orchestration.interrupts import StopRequested
from r2vpo_megatron.orchestration.loop import Ring, train
from tests.fake_ring import (
    FakeRollout,
    make_ring,
    push,
    reward,
)
from tests.saved_ring import (
    SavedLearner,
    Stopping,
    checkpoints_of,
    config_of,
    evaluated,
    parts_of,
    turn,
    without,
)

__all__ = ["push"]  # the fixture that stands in for weight pushes


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize(
    "where",
    [f"update {n}" for n in range(1, 17)] + ["wait 2", "wait 4", "evaluation 2"],
)
def test_left_anywhere_it_goes_on_as_if_it_had_not_been(
    mode: str, where: str, tmp_path: Path
) -> None:
    config, (kind, number) = config_of(mode), where.split()
    straight = SavedLearner()
    expected = turn(evaluated(config, straight, Stopping(), tmp_path), config)

    first, rollout = SavedLearner(), Stopping()
    rollout.stop_at = kind, int(number)
    ring = evaluated(config, first, rollout, tmp_path)
    begun = turn(ring, config, stop_after=int(number) if kind == "update" else 0)
    root = tmp_path / "checkpoints"
    assert checkpoints_of(ring, first, root, []).save(wait=True)

    manifest = newest_sound(root, pytest.fail)
    assert manifest is not None
    second, rollout = SavedLearner(), Stopping()
    second.num_before = json.loads((manifest.folder / "learner" / "learner.json").read_text())
    rollout.version = ring.rollout.version  # type: ignore[attr-defined]
    ring = evaluated(config, second, rollout, tmp_path)
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


def test_an_iteration_that_is_taken_up_again_has_taken_as_long_as_both_parts(
    tmp_path: Path,
) -> None:
    config, now = config_of("synchronous"), [100.0]
    learner = SavedLearner()

    def ring_at(learner: Any) -> Ring:
        ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
        return replace(ring, timers=StageTimers(lambda: now[0]))

    def update_for(seconds: float, num: int) -> Any:
        def on_update(number: int, metrics: Any) -> None:
            now[0] += seconds
            if number == num:
                raise StopRequested

        return on_update

    ring = ring_at(learner)
    with pytest.raises(StopRequested):
        list(train(config, ring, update_for(2.0, num=3)))
    with checkpoints_of(ring, learner, tmp_path / "checkpoints", []) as checkpoints:
        assert checkpoints.save(wait=True)
    manifest = newest_sound(tmp_path / "checkpoints", pytest.fail)
    assert manifest is not None
    now[0] += 1000.0  # between the two processes
    second = SavedLearner(num_before=3)
    ring = ring_at(second)
    now[0] += 50.0  # starting
    restore(manifest.folder, ring.replay, parts_of(ring), ring.progress)
    metrics, _ = next(iter(train(config, ring, update_for(4.0, num=0))))
    assert metrics["time/learn_seconds"] == metrics["time/iteration_seconds"] == 3 * 2.0 + 4.0
    ring = ring_at(SavedLearner())
    now[0] += 50.0  # a run that begins: the time before is none of iteration 1
    metrics, _ = next(iter(train(config, ring, update_for(4.0, num=0))))
    assert metrics["time/iteration_seconds"] == 4 * 4.0
