"""The gap between engines and learner, by hand, and the gate that it must pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.config import ModelConfig, RunConfig
from r2vpo_megatron.orchestration import run as run_module
from r2vpo_megatron.orchestration.logprob_gap import (
    LogprobGap,
    SequenceGap,
    gap_of_samples,
    gap_of_scores,
)
from r2vpo_megatron.orchestration.parity import compare_responses, require_parity
from r2vpo_megatron.records import FloatArray, Prompt, Trajectory


def sample(name: str, logprobs: Sequence[float], versions: Sequence[int]) -> Trajectory:
    values = np.array(logprobs, dtype=np.float32)
    return Trajectory(
        sample_id=name,
        group_id=name,
        prompt_token_ids=(1, 2, 3),
        response_token_ids=tuple(range(len(values))),
        behavior_logprobs=values,
        rollout_logprobs=values,
        reward=0.0,
        advantage=0.0,
        finish_reason="stop",
        policy_versions=np.array(versions, dtype=np.int64),
        iteration=1,
    )


def array(*values: float) -> FloatArray:
    return np.array(values, dtype=np.float32)


def test_only_tokens_of_the_learners_version_are_compared() -> None:
    samples = [sample("a", [-1, -2, -3], [3, 4, 4]), sample("b", [-1], [3])]
    computed = {"a": array(-9, -2.5, -3.25), "b": array(-7)}
    gap = gap_of_samples(samples, computed, version=4)
    assert gap.sequences == (SequenceGap("a", 2, 0.375, 0.5),)
    assert gap.metrics() == {"logprob_gap/mean": 0.375, "logprob_gap/max": 0.5}
    assert gap_of_samples(samples, computed, version=5).metrics() == {}
    assert gap_of_samples(samples, computed, version=5).mean == 0.0


def test_the_mean_is_over_tokens_and_the_worst_come_first() -> None:
    gap = LogprobGap(tuple(SequenceGap(f"s{n}", n, 0.1 * n, float(n % 5)) for n in range(1, 8)))
    assert gap.mean == pytest.approx(sum(0.1 * n * n for n in range(1, 8)) / 28)
    assert [of.name for of in gap.worst()] == ["s4", "s3", "s2", "s7", "s1"]
    assert gap.summary() == "s4: 4.00e+00, s3: 3.00e+00, s2: 2.00e+00, s7: 2.00e+00, s1: 1.00e+00"
    lines = gap.table().splitlines()
    assert len(lines) == 5
    assert lines[0].split() == ["s4", "4", "tokens", "mean", "4.00e-01", "max", "4.00e+00"]


def test_what_is_not_a_number_is_the_worst() -> None:
    gaps = (SequenceGap("a", 1, 1.0, 9.0), SequenceGap("b", 1, float("nan"), float("nan")))
    assert LogprobGap(gaps).worst()[0].name == "b"
    assert np.isnan(LogprobGap(gaps).metrics()["logprob_gap/max"])


class Model:
    """Scores token t as -t / 10, plus what is wrong with it; as a learner and as two engines."""

    def __init__(self, faults: Sequence[float] = (0.0, 0.0)) -> None:
        self.faults = faults
        self.temperatures: list[float | None] = []

    def compute_logprobs(
        self, trajectories: Sequence[Trajectory], temperature: float | None = None
    ) -> dict[str, Any]:
        self.temperatures.append(temperature)
        return {
            t.sample_id: -np.array(t.response_token_ids, dtype=np.float32) / 10
            for t in trajectories
        }

    def score_on_each(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        return [
            [
                -np.array(ids[1:], dtype=np.float32) / 10 + np.float32(fault)
                for ids in token_id_lists
            ]
            for fault in self.faults
        ]


def test_responses_are_scored_behind_their_prompts_on_every_engine() -> None:
    samples = [sample("a", [-5, -5], [0, 0]), sample("b", [-5, -5, -5], [1, 1, 1])]
    model = Model(faults=(0.0, 0.25))
    gap = compare_responses(model, model, samples)
    assert [of.name for of in gap.sequences] == [
        "a (engine 0)",
        "b (engine 0)",
        "a (engine 1)",
        "b (engine 1)",
    ]
    assert [of.max for of in gap.sequences] == pytest.approx([0, 0, 0.25, 0.25], abs=1e-6)
    assert [of.num_tokens for of in gap.sequences] == [2, 3, 2, 3]
    assert model.temperatures == [1.0]
    assert compare_responses(model, model, []).sequences == ()


PROMPTS = [Prompt("p0", (4, 5, 6), ""), Prompt("p1", (7,), ""), Prompt("p2", (8, 9), "")]


def test_engines_that_agree_pass_the_gate() -> None:
    model = Model(faults=(0.0, 5e-4))
    gap = require_parity(model, model, PROMPTS, "float32")
    assert {of.name for of in gap.sequences} == {
        f"{prompt} (engine {engine})" for prompt in ("p0", "p2") for engine in (0, 1)
    }


@pytest.mark.parametrize(("fault", "dtype"), [(2e-3, "float32"), (0.2, "bfloat16")])
def test_an_engine_that_is_another_model_stops_the_run_with_a_table(
    fault: float, dtype: str
) -> None:
    model = Model(faults=(0.0, fault))
    with pytest.raises(RuntimeError) as error:
        require_parity(model, model, PROMPTS, dtype)
    message = str(error.value)
    assert "engines and learner compute different log-probs from the same weights" in message
    assert f"p2 (engine 1)       1 tokens  mean {fault:9.2e}" in message
    assert len(message.splitlines()) == 1 + 4


def test_an_engine_that_gives_no_numbers_stops_the_run() -> None:
    model = Model(faults=(float("nan"), 0.0))
    with pytest.raises(RuntimeError, match="p0 .engine 0."):
        require_parity(model, model, PROMPTS, "bfloat16")


def test_scores_begin_behind_the_prompt() -> None:
    trajectory = sample("a", [-1, -1], [0, 0])
    gap = gap_of_scores([trajectory], {"a": array(-1, -2)}, [[array(-8, -8, -1, -2.5)]])
    assert gap.sequences == (SequenceGap("a (engine 0)", 2, 0.25, 0.5),)


def test_what_happens_to_engines_before_there_is_a_progress_line_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def push_weights(_: Any, rollout: Any, version: int) -> None:
        rollout.on_event("engine 1 was lost")

    monkeypatch.setattr(run_module, "push_weights", push_weights)
    config = RunConfig(model=ModelConfig(testbed="pangu", dtype="float32"))
    run: Any = SimpleNamespace(config=config, train_prompts=[])
    rollout: Any = SimpleNamespace(on_event=lambda event: None, score_on_each=lambda ids: [])
    model: Any = Model()
    run_module._first_push(run, model, rollout, 0)
    assert capsys.readouterr().out == "engine 1 was lost\n"
