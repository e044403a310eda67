"""Skipped updates are written down and counted; a row of them ends the run; alarms ring once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from r2vpo_megatron.config import GuardConfig
from r2vpo_megatron.orchestration.guards import UpdateGuard
from r2vpo_megatron.records import Trajectory, UpdateResult

NONE = np.zeros(0, dtype=np.float32)


def sample(name: str, reward: float, advantage: float) -> Trajectory:
    return Trajectory(
        sample_id=name,
        group_id="g",
        prompt_token_ids=(1,),
        response_token_ids=(1, 2, 3),
        behavior_logprobs=NONE,
        rollout_logprobs=NONE,
        reward=reward,
        advantage=advantage,
        finish_reason="stop",
        policy_versions=np.zeros(0, dtype=np.int64),
        iteration=1,
    )


BATCH = [sample("a", 1.0, 0.5), sample("b", -1.0, float("nan")), sample("b", -1.0, float("nan"))]
MADE = UpdateResult({"optimizer/gradient_norm": 1.0, "ratio/second_moment": 0.01})
BAD = UpdateResult({}, "the loss is not finite", ("b",))


def guard_of(run_dir: Path, **limits: float) -> tuple[UpdateGuard, list[str]]:
    said: list[str] = []
    guard = UpdateGuard(GuardConfig(**limits), run_dir)  # type: ignore[arg-type]
    guard.on_alarm = said.append
    return guard, said


def test_a_skipped_update_is_written_down_with_its_samples(tmp_path: Path) -> None:
    guard, said = guard_of(tmp_path)
    assert guard.accept(MADE, BATCH, iteration=3)
    assert not guard.accept(BAD, BATCH, iteration=3)
    (line,) = (tmp_path / "skipped_updates.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "iteration": 3,
        "update": 2,
        "fault": "the loss is not finite",
        "samples": [
            {"sample_id": "b", "reward": "-1.0", "advantage": "nan", "num_response_tokens": 3}
        ],
    }
    assert len(said) == 1 and "update 2 was skipped" in said[0] and "samples b" in said[0]
    assert guard.metrics() == {"guard/skipped_updates": 1.0, "guard/alarms": 0.0}
    assert guard.metrics()["guard/skipped_updates"] == 0.0


def test_only_a_row_beyond_the_limit_ends_the_run_also_over_a_resume(tmp_path: Path) -> None:
    guard, _ = guard_of(tmp_path, max_skipped_updates=2)
    for result in (BAD, BAD, MADE, BAD, BAD):
        guard.accept(result, BATCH, 1)
    again, _ = guard_of(tmp_path, max_skipped_updates=2)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(
        RuntimeError, match=r"in a row: 3 \(guard.max_skipped_updates = 2\).*in samp"
    ):
        again.accept(BAD, BATCH, 2)
    assert again.num_updates == 6
    assert len((tmp_path / "skipped_updates.jsonl").read_text().splitlines()) == 5
    strict, _ = guard_of(tmp_path, max_skipped_updates=0)
    with pytest.raises(RuntimeError, match="in a row: 1 "):
        strict.accept(BAD, BATCH, 1)


def test_an_alarm_rings_once_an_iteration_for_each_limit(tmp_path: Path) -> None:
    guard, said = guard_of(tmp_path, gradient_norm_alarm=0.5, ratio_alarm=0.02)
    for _ in range(3):
        assert guard.accept(MADE, BATCH, 1)
    assert len(said) == 1 and "optimizer/gradient_norm is 1 (alarm above 0.5" in said[0]
    assert guard.accept(UpdateResult({"ratio/second_moment": 0.03}), BATCH, 1)
    assert len(said) == 2 and "guard.ratio_alarm" in said[1]
    assert guard.metrics()["guard/alarms"] == 2
    assert guard.accept(MADE, BATCH, 2)
    assert len(said) == 3
    off, silent = guard_of(tmp_path)
    assert off.accept(UpdateResult({"optimizer/gradient_norm": 1e9}), BATCH, 1) and not silent
