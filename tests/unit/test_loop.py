"""The loop and its collector with stand-ins for engines and learner: what reaches an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.config import (
    PipelineConfig,
    RunConfig,
)
from r2vpo_megatron.orchestration.loop import make_dual
from r2vpo_megatron.records import (
    GenerationRequest,
    Prompt,
    Trajectory,
)
from r2vpo_megatron.rewards import FORMAT_CHECKS, RewardResult, overlong_penalty
from tests.fake_ring import (
    FakeLearner,
    FakeRollout,
    make_config,
    push,
    run_loop,
)

__all__ = ["push"]  # the fixture that stands in for weight pushes


def groups_of(mini_batch: Sequence[Trajectory]) -> list[str]:
    return sorted({trajectory.group_id.rpartition(".")[2] for trajectory in mini_batch})


def test_groups_of_equal_rewards_are_left_out_where_asked() -> None:
    learner = FakeLearner()
    run_loop(make_config(), learner)
    assert [groups_of(batch) for batch in learner.mini_batches] == [["00000", "00001"]] * 2
    assert [len(batch) for batch in learner.mini_batches] == [8, 8]

    learner = FakeLearner()
    run_loop(make_config(filter_zero_advantage_groups=True), learner)
    assert [groups_of(batch) for batch in learner.mini_batches] == [["00000"]] * 2
    assert [len(batch) for batch in learner.mini_batches] == [4, 4]


def test_a_mini_batch_that_the_filter_leaves_empty_is_no_update() -> None:
    learner = FakeLearner()
    config = make_config(mini_batch_samples=1, filter_zero_advantage_groups=True)
    metrics, updates = run_loop(config, learner)
    assert [len(batch) for batch in learner.mini_batches] == [1] * 8
    assert [record["updates/num"] for record in metrics] == [4.0, 4.0]
    assert [number for number, _ in updates] == list(range(1, 9))


def test_lambda_follows_every_update_and_is_reported_as_it_was_used() -> None:
    moments = [0.0, 0.03, 0.045, 0.05]
    learner = FakeLearner(moments)
    config = make_config(mini_batch_samples=4, dual_controller="multiplicative")
    metrics, updates = run_loop(config, learner)

    dual, expected = make_dual(config.algorithm), []
    for moment in moments:
        expected.append(dual.value)
        dual.step(moment)
    assert learner.penalties == expected
    assert len(set(expected)) == 4
    assert [update["ratio/penalty"] for _, update in updates] == expected
    assert [update["ratio/second_moment"] for _, update in updates] == moments
    assert [update["iteration"] for _, update in updates] == [1, 1, 2, 2]
    assert [record["ratio/penalty"] for record in metrics] == [expected[1], expected[3]]


def test_a_skipped_update_moves_no_lambda_and_is_no_update(tmp_path: Path) -> None:
    learner = FakeLearner([0.0, float("nan"), 0.045, 0.05])
    config = make_config(mini_batch_samples=4, dual_controller="multiplicative")
    metrics, updates = run_loop(config, learner, run_dir=tmp_path)
    dual, expected = make_dual(config.algorithm), []
    for moment in (0.0, None, 0.045, 0.05):
        expected.append(dual.value)
        if moment is not None:
            dual.step(moment)
    assert learner.penalties == expected and expected[1] == expected[2] != expected[3]
    assert [record["updates/num"] for record in metrics] == [1.0, 2.0]
    assert [record["guard/skipped_updates"] for record in metrics] == [1.0, 0.0]
    assert [(number, update["guard/skipped"]) for number, update in updates] == [
        (1, 0.0),
        (2, 1.0),
        (3, 0.0),
        (4, 0.0),
    ]


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(0, 0.0), (75, 0.0), (76, 0.0), (77, -1 / 24), (88, -0.5), (99, -23 / 24), (100, -1.0)],
)
def test_the_overlong_penalty_at_its_edges(num_tokens: int, expected: float) -> None:
    penalty = overlong_penalty(num_tokens, max_tokens=100, buffer_tokens=24)
    assert penalty == pytest.approx(expected, abs=1e-15)
    assert overlong_penalty(num_tokens, max_tokens=100, buffer_tokens=0) == 0.0
    assert overlong_penalty(1000, max_tokens=100, buffer_tokens=24) == -1.0


def test_a_buffer_as_long_as_the_limit_counts_every_token() -> None:
    assert overlong_penalty(25, max_tokens=100, buffer_tokens=100) == -0.25


def test_overlong_responses_are_worth_less_before_advantages_are_formed() -> None:
    learner = FakeLearner()
    config = make_config(overlong_buffer_tokens=4, advantage="group_centered")
    metrics, _ = run_loop(config, learner)
    # Lengths 3, 10, 8 and 5 of at most 10, with a buffer of 4: 0, -1, -0.5 and 0.
    rewards = np.array([1.0, -2.0, 0.5, -1.0])
    first = sorted(learner.mini_batches[0], key=lambda trajectory: trajectory.sample_id)
    assert [trajectory.reward for trajectory in first] == [*rewards, 1.0, 1.0, 1.0, 1.0]
    advantages = [trajectory.advantage for trajectory in first]
    assert advantages == pytest.approx([*(rewards - rewards.mean()), 0.0, 0.0, 0.0, 0.0])
    assert metrics[0]["reward/overlong_penalty"] == pytest.approx(-1.5 / 8)
    assert metrics[0]["reward/mean"] == pytest.approx((rewards.sum() + 4) / 8)
    assert metrics[0]["reward/accuracy"] == 6 / 8

    without = FakeLearner()
    metrics, _ = run_loop(
        replace(config, algorithm=replace(config.algorithm, overlong_buffer_tokens=0)), without
    )
    assert "reward/overlong_penalty" not in metrics[0]
    assert {trajectory.reward for trajectory in without.mini_batches[0]} == {1.0, -1.0}


def test_a_response_out_of_form_is_worth_less_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMAT_CHECKS, "is_right", lambda text: text == "right")
    monkeypatch.setitem(FORMAT_CHECKS, "never", lambda _: False)
    learner = FakeLearner()
    config = make_config(format_checks="is_right, never", format_penalty=0.25)
    metrics, _ = run_loop(config, learner)
    first = sorted(learner.mini_batches[0], key=lambda trajectory: trajectory.sample_id)
    # Both checks fail for a wrong response: the penalty is taken once.
    assert [trajectory.reward for trajectory in first] == [0.75, -1.25, 0.75, -1.25] + [0.75] * 4
    assert metrics[0]["reward/format_fault_fraction/is_right"] == 2 / 8
    assert metrics[0]["reward/format_fault_fraction/never"] == 1.0

    reported = FakeLearner()
    metrics, _ = run_loop(make_config(format_checks="never"), reported)
    assert metrics[0]["reward/format_fault_fraction/never"] == 1.0
    assert {trajectory.reward for trajectory in reported.mini_batches[0]} == {1.0, -1.0}


def test_what_the_grader_gave_up_on_is_counted() -> None:
    def judge(_: Prompt, text: str) -> RewardResult:
        failure = "" if text == "right" else "timeout"
        return RewardResult(-1.0, acc=False, pred="x", parsed=True, failure=failure)

    metrics, _ = run_loop(make_config(), FakeLearner(), judge)
    assert metrics[0]["reward/grader_failures"] == 2.0
    assert metrics[0]["reward/grader_failures/timeout"] == 2.0
    assert "reward/grader_failures/memory" not in metrics[0]


def test_in_turn_every_sample_is_of_the_weights_that_it_is_learned_from() -> None:
    learner, rollout = FakeLearner(), FakeRollout()
    metrics, _ = run_loop(make_config(), learner, rollout=rollout)
    assert [version for version, _ in rollout.submitted] == [0] * 8 + [1] * 8
    assert learner.versions == [0, 1]
    assert [record["pipeline/staleness_max"] for record in metrics] == [0.0, 0.0]
    assert [record["logprob_gap/max"] for record in metrics] == [0.0, 0.0]
    for mini_batch, version in zip(learner.mini_batches, (0, 1), strict=True):
        assert {v for sample in mini_batch for v in sample.policy_versions} == {version}


def test_side_by_side_the_next_iteration_is_under_way_while_one_is_learned() -> None:
    learner, rollout = FakeLearner(), FakeRollout()
    pipeline = PipelineConfig(mode="asynchronous", max_staleness=1)
    config = make_config(pipeline=pipeline, behavior_logprobs="rollout")
    metrics, _ = run_loop(config, learner, rollout=rollout)
    # All 16 are begun before anything is learned; the second half is one version old by then.
    assert [version for version, _ in rollout.submitted] == [0] * 16
    assert [record["pipeline/staleness_max"] for record in metrics] == [0.0, 1.0]
    assert [record["pipeline/groups_under_way"] for record in metrics] == [2.0, 0.0]
    iterations = [{s.iteration for s in mini_batch} for mini_batch in learner.mini_batches]
    assert iterations == [{1}, {2}]
    names = [{s.sample_id[:6] for s in mini_batch} for mini_batch in learner.mini_batches]
    assert names == [{"000001"}, {"000002"}]
    assert {v for sample in learner.mini_batches[1] for v in sample.policy_versions} == {0}


def test_ids_and_seeds_do_not_depend_on_the_pipeline() -> None:
    def requests(config: RunConfig) -> dict[str, int]:
        seen: dict[str, int] = {}

        class Recording(FakeRollout):
            def submit(self, requests: Sequence[GenerationRequest], sampling: Any) -> None:
                seen.update({request.sample_id: request.seed for request in requests})
                super().submit(requests, sampling)

        run_loop(config, FakeLearner(), rollout=Recording())
        return seen

    pipeline = PipelineConfig(mode="asynchronous", max_staleness=1)
    in_turn = requests(make_config())
    assert requests(make_config(pipeline=pipeline, behavior_logprobs="rollout")) == in_turn
    assert len(set(in_turn.values())) == 16


@dataclass
class ScoringRollout(FakeRollout):
    """Idle or not as told; notes what it is to score."""

    is_idle: bool
    scored: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def score_on_each(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[Any]]:
        self.scored.append([len(token_ids) for token_ids in token_id_lists])
        return super().score_on_each(token_id_lists)


SIDE_BY_SIDE = PipelineConfig(mode="asynchronous", max_staleness=1)


def test_engines_that_have_run_out_of_work_score_a_few_of_the_last_responses_again() -> None:
    # One token of prompt and responses of 3, 10, 8, 5 and 2: the second fills the engine to the
    # end, and scoring takes the place of one more token.
    config = make_config(pipeline=SIDE_BY_SIDE, behavior_logprobs="rollout")
    config = replace(config, rollout=replace(config.rollout, max_prompt_tokens=1))
    rollout = ScoringRollout(is_idle=True)
    metrics, _ = run_loop(config, FakeLearner(), rollout=rollout)
    assert rollout.scored == [[4, 9, 6]]  # before iteration 2; before 1 there was nothing to score
    assert [record["logprob_gap/max"] for record in metrics] == [0.0, 0.0]


def test_engines_that_are_at_work_are_not_asked_to_score() -> None:
    config = make_config(pipeline=SIDE_BY_SIDE, behavior_logprobs="rollout")
    rollout = ScoringRollout(is_idle=False)
    metrics, _ = run_loop(config, FakeLearner(), rollout=rollout)
    assert rollout.scored == []
    # The first iteration's tokens are of the learner's weights, the second's are not.
    assert ["logprob_gap/max" in record for record in metrics] == [True, False]


def test_in_turn_the_engines_logprobs_are_compared_as_they_were_sampled() -> None:
    class Apart(FakeLearner):
        def compute_logprobs(self, trajectories: Any, temperature: Any = None) -> dict[str, Any]:
            assert temperature is None and len(trajectories) == 4  # runtime.parity_samples of 8
            return {t.sample_id: np.full(len(t.response_token_ids), -1.5) for t in trajectories}

    rollout = ScoringRollout(is_idle=True)
    metrics, _ = run_loop(make_config(behavior_logprobs="rollout"), Apart(), rollout=rollout)
    assert rollout.scored == []
    assert [record["logprob_gap/mean"] for record in metrics] == [0.5, 0.5]
