"""What the self-test of a learning rate of 0 takes for a fault."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.cli import doctor
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.observability import MetricsWriter
from r2vpo_megatron.orchestration.self_test import judge_run, run_self_test, self_test_config
from recipes import tiny_cpu


def records(moments: list[float], staleness: float = 1.0) -> list[dict[str, float]]:
    return [
        {
            "iteration": index + 1,
            "ratio/second_moment": moment,
            "pipeline/staleness_max": staleness,
            "replay/sampled_age_max": float(min(index, 3)),
            "logprob_gap/mean": 1e-5,
        }
        for index, moment in enumerate(moments)
    ]


def test_rounding_passes() -> None:
    result = judge_run(records([2e-10, 4e-10] * 5), "asynchronous", "float32")
    assert result.faults == ()
    assert (result.mean, result.max) == pytest.approx((3e-10, 4e-10))
    assert (result.staleness, result.age, result.num_iterations) == (1, 3, 10)
    assert result.row().endswith("passed")


@pytest.mark.parametrize(
    ("moments", "dtype", "fault"),
    [
        ([1e-10] * 9 + [2e-8], "float32", "is 2.0e-08 at iteration 10, above the noise floor"),
        ([1e-10, float("nan")] + [1e-10] * 8, "float32", "is nan at iteration 2"),
        ([1e-3] * 9 + [3e-2], "bfloat16", "is 3.0e-02 at iteration 10"),
        ([1e-11] * 8 + [6e-11] * 2, "float32", "it grew 6.0 times over the run"),
        ([1e-4] * 8 + [6e-4] * 2, "bfloat16", "it grew 6.0 times over the run"),
    ],
)
def test_what_is_no_rounding_fails(moments: list[float], dtype: str, fault: str) -> None:
    result = judge_run(records(moments), "asynchronous", dtype)
    assert fault in "; ".join(result.faults)
    assert "FAILED" in result.row()


def test_growth_that_single_tokens_make_is_none() -> None:
    assert judge_run(records([1e-13] * 8 + [9e-12] * 2), "synchronous", "float32").faults == ()


def test_an_iteration_without_updates_counts_for_its_samples_alone() -> None:
    some = records([1e-10] * 3 + [9e-8])
    del some[1]["ratio/second_moment"]
    result = judge_run(some, "synchronous", "float32")
    assert (result.num_iterations, result.age) == (4, 3)
    assert "is 9.0e-08 at iteration 4" in result.faults[0]


def test_an_asynchronous_run_without_overlap_proves_nothing() -> None:
    fresh = records([1e-10] * 5, staleness=0.0)
    assert judge_run(fresh, "synchronous", "float32").faults == ()
    assert "did not overlap" in judge_run(fresh, "asynchronous", "float32").faults[0]


def test_each_mode_is_run_with_a_rate_of_0_on_the_engines_logprobs(tmp_path: Path) -> None:
    configs: list[RunConfig] = []

    def train(config: RunConfig) -> Path:
        config.validate()
        configs.append(config)
        folder = tmp_path / config.output.run_name
        with MetricsWriter(folder, tensorboard=False) as writer:
            writer.write(0, {"evaluation/accuracy": 0.5})
            for record in records([1e-10] * 4):
                writer.write(int(record["iteration"]), record)
        return folder

    results = run_self_test(tiny_cpu.self_test(), train)
    assert [result.mode for result in results] == ["synchronous", "asynchronous"]
    assert [result.num_iterations for result in results] == [4, 4]
    assert [config.optimizer.lr for config in configs] == [0.0, 0.0]
    assert [config.pipeline.mode for config in configs] == ["synchronous", "asynchronous"]
    assert {config.algorithm.behavior_logprobs for config in configs} == {"rollout"}


def test_the_dual_recipe_can_be_tested() -> None:
    for mode in ("synchronous", "asynchronous"):
        self_test_config(tiny_cpu.r2vpo_off_policy_dual(), mode).validate()


def test_a_recipe_that_one_mode_does_not_take_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Carried-over groups take a staleness of 2 in asynchronous mode.
    fields = ["--algorithm.behavior-logprobs", "rollout", "--pipeline.carry-over-fraction", "0.5"]
    assert doctor.main(["--self-test", *fields]) == 2
    assert "pipeline.max_staleness = 1" in capsys.readouterr().err
    assert list(tmp_path.glob("r2vpo-*")) == []  # torch may make a folder of its own


def test_a_wrong_field_is_refused(capsys: Any) -> None:
    assert doctor.main(["--self-test", "--train.num-iterationz", "2"]) == 2
    assert "num-iterationz" in capsys.readouterr().err
