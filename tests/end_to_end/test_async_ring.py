"""Rollout and learner side by side as a user runs them, and how a run survives losing an engine."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.end_to_end.ring_runs import read_iterations

NUM_SAMPLES, CAPACITY = 24, 4  # of an iteration, and iterations of the buffer
# Few responses at a time and long ones: the engines have some under way at every push.
LONG_ROLLOUT = {
    "train.num-iterations": "4",
    "train.mini-batch-samples": "24",
    "rollout.num-engines": "2",
    "rollout.max-num-seqs": "2",
    "rollout.max-response-tokens": "48",
    "rollout.slice-seconds": "0.05",
    "evaluation.every-iterations": "0",
    "parallel.tensor": "1",
}


def assert_complete(lines: list[dict], num_iterations: int) -> None:
    """Every iteration has its samples, none older than allowed, and each is used twice."""
    assert [line["iteration"] for line in lines] == list(range(num_iterations + 1))
    for iteration, line in enumerate(lines[1:], 1):
        assert line["replay/size"] == NUM_SAMPLES * min(iteration, CAPACITY)
        assert line["updates/num"] == 2
        assert line["pipeline/staleness_max"] <= 1
        # Of tokens of the same weights, where there are any.
        assert line.get("logprob_gap/max", 0.0) < 1e-3
    assert "logprob_gap/max" in lines[1]
    assert lines[-1]["replay/realized_utd"] == 2.0


@pytest.mark.parametrize(
    ("in_flight", "backend"),
    [
        ("keep", "shared_memory"),
        pytest.param("abort", "gloo", marks=pytest.mark.slow),
        pytest.param("drain", "shared_memory", marks=pytest.mark.slow),
    ],
)
def test_engines_sample_while_the_learner_learns(start, tmp_path, in_flight, backend):
    fields = {"pipeline.in-flight": in_flight, "weight-sync.backend": backend}
    run = start("r2vpo_off_policy_async", **LONG_ROLLOUT, **fields)
    assert run.process.wait(timeout=240) == 0, run.text()
    run.assert_nothing_left()
    lines = read_iterations(tmp_path / "run")
    assert_complete(lines, 4)
    assert lines[1]["pipeline/staleness_max"] == 0
    assert "staleness_1/tokens" not in lines[1]
    for line in lines[2:]:
        assert line["pipeline/staleness_max"] == 1
        assert line["staleness_1/tokens"] > 0
        assert 0 < line["staleness_1/second_moment"] < 1
        fractions = [line.get(f"staleness_{age}/token_fraction", 0.0) for age in range(4)]
        assert sum(fractions) == pytest.approx(1.0)
    # A response that went on after a push has tokens of two versions; one that was waited for not.
    mixed = [line["pipeline/mixed_fraction"] for line in lines[1:]]
    assert (max(mixed) == 0) if in_flight == "drain" else (max(mixed[2:]) > 0)
    assert sum(line["rollout/num_restarts"] for line in lines[1:]) == 0


@pytest.mark.slow
def test_slow_groups_are_carried_over(start, tmp_path):
    fields = {
        **LONG_ROLLOUT,
        "pipeline.mode": "synchronous",
        "pipeline.carry-over-fraction": "0.5",
        "pipeline.max-staleness": "1",
        "algorithm.behavior-logprobs": "rollout",
        "rollout.num-engines": "1",
        "rollout.max-num-seqs": "32",
    }
    run = start("r2vpo_off_policy", **fields)
    assert run.process.wait(timeout=240) == 0, run.text()
    run.assert_nothing_left()
    lines = read_iterations(tmp_path / "run")
    assert_complete(lines, 4)
    # Three of nine groups go on after the push, and nothing is started for after the end.
    assert [line["pipeline/groups_under_way"] for line in lines[1:]] == [3, 3, 3, 0]
    assert [line["pipeline/staleness_max"] for line in lines[1:3]] == [0, 1]


@pytest.mark.parametrize(
    ("num_engines", "num_iterations"),
    # The only engine must come back, and get the current weights, for the run to go on at all.
    [pytest.param(2, 6, id="two"), pytest.param(1, 4, id="the only one")],
)
@pytest.mark.slow
def test_a_run_survives_an_engine_that_is_killed(start, tmp_path, num_engines, num_iterations):
    fields = {
        **LONG_ROLLOUT,
        "train.num-iterations": str(num_iterations),
        "rollout.num-engines": str(num_engines),
    }
    run = start("r2vpo_off_policy_async", **fields)
    run.wait_for(f"iteration 2/{num_iterations}", seconds=240)
    os.kill(run.workers("RolloutWorker")[0], signal.SIGKILL)
    assert run.process.wait(timeout=240) == 0, run.text()
    run.assert_nothing_left()
    assert re.search(r"engine [01] was lost \(.*\); [1-9]\d* requests are sent anew", run.text())
    lines = read_iterations(tmp_path / "run")
    assert_complete(lines, num_iterations)
    assert sum(line["rollout/num_restarts"] for line in lines[1:]) == 1
    assert sum(line["rollout/num_resent"] for line in lines[1:]) > 0


@pytest.mark.slow
def test_the_self_test_passes_in_both_modes_and_leaves_nothing(start):
    run = start(
        "self_test",
        command="doctor",
        flags=["--self-test"],
        **{"train.num-iterations": "3", "parallel.tensor": "1"},
    )
    assert run.process.wait(timeout=240) == 0, run.text()
    run.assert_nothing_left()
    rows = [line.split() for line in run.text().splitlines() if line.endswith("passed")]
    assert [(row[0], row[1]) for row in rows] == [("synchronous", "3"), ("asynchronous", "3")]
    folders = {Path(name).parent for name in re.findall(r"/\S+/self-test-\w+", run.text())}
    assert len(folders) == 1
    assert not any(folder.exists() for folder in folders)
