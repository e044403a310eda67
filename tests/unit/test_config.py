from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReplayConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    WeightSyncConfig,
)
from recipes.tiny_cpu import RECIPES, r2vpo_off_policy


def make_config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(testbed="pangu"),
        rollout=RolloutConfig(max_prompt_tokens=10, max_response_tokens=20),
        train=TrainConfig(prompts_per_iteration=6, responses_per_prompt=4, mini_batch_samples=16),
        replay=ReplayConfig(capacity_iterations=4, update_to_data=2.0),
        parallel=ParallelConfig(tensor=2, pipeline=3, data=4, max_tokens_per_micro_batch=30),
    )


def test_derived_counts() -> None:
    config = make_config()
    assert config.samples_per_iteration == 24
    assert config.updates_per_iteration == 3  # 2 x 24 / 16
    assert config.max_sequence_tokens == 30
    assert config.parallel.num_ranks == 24
    config.validate()


@given(
    ratio=st.fractions(min_value="1/50", max_value=8, max_denominator=60),
    batch=st.integers(1, 60),
)
def test_updates_of_any_iterations_keep_the_utd(ratio: Fraction, batch: int) -> None:
    """After every iteration as many whole updates were made as the ratio has room for."""
    config = replace(
        make_config(),
        replay=ReplayConfig(capacity_iterations=8, update_to_data=str(ratio)),
        train=TrainConfig(
            prompts_per_iteration=6, responses_per_prompt=4, mini_batch_samples=batch
        ),
    )
    updates = [config.updates_in_iteration(iteration) for iteration in range(1, 40)]
    assert max(updates) - min(updates) <= 1
    for iterations in range(1, 40):
        behind = ratio * 24 * iterations - batch * sum(updates[:iterations])
        assert 0 <= behind < batch
    assert config.updates_per_iteration == ratio * 24 / batch


@pytest.mark.parametrize("value", [1.5, "1.5", "3/2", "6/4"])
def test_the_utd_is_a_number_or_a_ratio(value: float | str) -> None:
    config = replace(make_config(), replay=ReplayConfig(update_to_data=value))
    config.validate()
    assert config.replay.update_to_data_ratio == Fraction(3, 2)
    # 36 samples an iteration in updates of 16.
    assert [config.updates_in_iteration(iteration) for iteration in (1, 2, 3, 4)] == [2, 2, 2, 3]


def test_a_decimal_utd_is_what_it_says() -> None:
    assert ReplayConfig(update_to_data=0.1).update_to_data_ratio == Fraction(1, 10)


@pytest.mark.parametrize(
    ("sizes", "multiple"),
    [
        ({}, 1),
        ({"tensor": 4}, 1),
        ({"tensor": 4, "sequence_parallel": True}, 4),
        ({"context": 3, "tensor": 4}, 6),
        ({"context": 2, "tensor": 2, "sequence_parallel": True}, 8),
    ],
)
def test_micro_batches_divide_into_what_their_ranks_hold(
    sizes: dict[str, int], multiple: int
) -> None:
    parallel = ParallelConfig(**sizes, data=2, max_tokens_per_micro_batch=24)
    assert parallel.tokens_multiple == multiple
    tensor, context = sizes.get("tensor", 1), sizes.get("context", 1)
    assert parallel.num_ranks == tensor * context * 2


def test_both_algorithms_of_the_paper() -> None:
    off_policy, on_policy = r2vpo_off_policy(), RECIPES["r2vpo_on_policy"]()
    off_policy.validate()
    on_policy.validate()
    assert off_policy.replay == ReplayConfig(capacity_iterations=4, update_to_data=2.0)
    # Algorithm 1: every response used once, in 4 mini-batches, then discarded.
    assert on_policy.replay == ReplayConfig(capacity_iterations=1, update_to_data=1.0)
    assert on_policy.updates_per_iteration == 4
    assert on_policy.train.mini_batch_samples * 4 == on_policy.samples_per_iteration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": AlgorithmConfig(overlong_buffer_tokens=21)},
            "algorithm.overlong_buffer_tokens = 21 .* at most rollout.max_response_tokens = 20",
        ),
        (
            {
                "train": TrainConfig(num_iterations=3, mini_batch_samples=49),
                "replay": ReplayConfig(update_to_data="1/64"),
            },
            "train.mini_batch_samples = 49 .* at most 48, .* for one update",
        ),
        (
            {"train": TrainConfig(mini_batch_samples=4097)},
            "train.mini_batch_samples = 4097 .* at most the 4096 samples of the full buffer",
        ),
        (
            {"replay": ReplayConfig(capacity_iterations=1, update_to_data="3/2")},
            r"replay.update_to_data = '3/2' .* at most replay.capacity_iterations \(1\)",
        ),
        (
            {"replay": ReplayConfig(capacity_iterations=1, update_to_data=2.0)},
            r"replay.update_to_data = 2.0 .* at most replay.capacity_iterations \(1\)",
        ),
        (
            {"parallel": ParallelConfig(max_tokens_per_micro_batch=29)},
            "max_tokens_per_micro_batch = 29 .* = 30",
        ),
        ({"model": ModelConfig()}, "model.path = '' .*exactly one"),
        ({"model": ModelConfig(path="a", testbed="llama")}, "model.path = 'a' .*exactly one"),
        ({"model": ModelConfig(path="a")}, "data.train_prompts = ''"),
    ],
)
def test_what_spans_sections_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make_config(), **changes).validate()


def test_a_value_at_its_limit_is_valid() -> None:
    replace(
        make_config(), replay=ReplayConfig(capacity_iterations=2, update_to_data=2.0)
    ).validate()
    replace(
        make_config(),
        replay=ReplayConfig(capacity_iterations=1, update_to_data=2.0, with_replacement=True),
    ).validate()
    replace(
        make_config(), model=ModelConfig(path="a"), data=DataConfig(train_prompts="p.jsonl")
    ).validate()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {"testbed": "gpt"}, "model.testbed = 'gpt' .*'pangu', 'qwen2', 'llama'"),
        (ModelConfig, {"dtype": "fp8"}, "model.dtype = 'fp8' .*'float32', 'bfloat16'"),
        (RolloutConfig, {"num_engines": 0}, "rollout.num_engines = 0"),
        (RolloutConfig, {"max_response_tokens": 0}, "rollout.max_response_tokens = 0"),
        (RolloutConfig, {"memory_fraction": 1.5}, "rollout.memory_fraction = 1.5 .*0 and 1"),
        (AlgorithmConfig, {"dual_gain": 0.0}, "algorithm.dual_gain = 0.0 .*above 0"),
        (AlgorithmConfig, {"ratio_penalty": math.inf}, "algorithm.ratio_penalty = inf .*finite"),
        (
            AlgorithmConfig,
            {"dual_controller": "multiplicative", "ratio_penalty": 5e3},
            "algorithm.ratio_penalty = 5000.0 .*0.001 to 1000",
        ),
        (
            AlgorithmConfig,
            {"objective": "grpo", "dual_controller": "paper"},
            "algorithm.dual_controller = 'paper' .*'grpo' has no lambda",
        ),
        (TrainConfig, {"seed": -1}, "train.seed = -1 .*at least 0"),
        (OptimizerConfig, {"beta1": 2.0}, "optimizer.beta1 = 2.0 .*below 1"),
        (ParallelConfig, {"context": 0}, "parallel.context = 0"),
        (
            ParallelConfig,
            {"context": 2, "max_tokens_per_micro_batch": 6},
            "parallel.max_tokens_per_micro_batch = 6 .*multiple of 4 .2 x parallel.context",
        ),
        (
            ParallelConfig,
            {"tensor": 2, "sequence_parallel": True, "max_tokens_per_micro_batch": 7},
            "parallel.max_tokens_per_micro_batch = 7 .*multiple of 2",
        ),
        (RolloutConfig, {"temperature": 0.0}, "rollout.temperature = 0.0 .*0.01 to 2"),
        (RolloutConfig, {"top_p": 0.9}, "rollout.top_p = 0.9 .*1.0 in training"),
        (RolloutConfig, {"top_k": 5}, "rollout.top_k = 5 .*0 .off. in training"),
        (AlgorithmConfig, {"advantage": "gae"}, "algorithm.advantage = 'gae'"),
        (
            AlgorithmConfig,
            {"truncated_importance_cap": 0.5},
            r"algorithm.truncated_importance_cap = 0.5 .*at least 1",
        ),
        (
            AlgorithmConfig,
            {"truncated_importance_cap": 2.0, "behavior_logprobs": "rollout"},
            r"algorithm.truncated_importance_cap = 2.0 .*0 with algorithm.behavior_logprobs",
        ),
        (AlgorithmConfig, {"overlong_buffer_tokens": -1}, "algorithm.overlong_buffer_tokens = -1"),
        (AlgorithmConfig, {"format_penalty": -1.0}, "algorithm.format_penalty = -1.0 .*0 or above"),
        (
            AlgorithmConfig,
            {"format_penalty": 0.5, "format_checks": " , "},
            "algorithm.format_penalty = 0.5 .*0 without algorithm.format_checks",
        ),
        (AlgorithmConfig, {"dual_controller": "x"}, "algorithm.dual_controller = 'x' .*'paper'"),
        (AlgorithmConfig, {"ratio_penalty": -0.1}, "algorithm.ratio_penalty = -0.1"),
        (AlgorithmConfig, {"dual_target": 0.0}, "algorithm.dual_target = 0.0"),
        (AlgorithmConfig, {"ratio_penalty_min": 1e4}, "algorithm.ratio_penalty_min = 10000.0"),
        (ReplayConfig, {"capacity_iterations": 0}, "replay.capacity_iterations = 0"),
        (ReplayConfig, {"update_to_data": 0.0}, "replay.update_to_data = 0.0 .*above 0"),
        (ReplayConfig, {"update_to_data": "-1/2"}, "replay.update_to_data = '-1/2' .*above 0"),
        (ReplayConfig, {"update_to_data": "1/0"}, "replay.update_to_data = '1/0' .*'3/2'"),
        (ReplayConfig, {"update_to_data": "twice"}, "replay.update_to_data = 'twice' .*a number"),
        (ReplayConfig, {"update_to_data": math.inf}, "replay.update_to_data = inf .*a number"),
        (ReplayConfig, {"max_memory_bytes": -1}, "replay.max_memory_bytes = -1 .*at least 0"),
        (TrainConfig, {"num_iterations": 0}, "train.num_iterations = 0"),
        (TrainConfig, {"responses_per_prompt": 1}, "train.responses_per_prompt = 1 .*at least 2"),
        (OptimizerConfig, {"lr": -1.0}, "optimizer.lr = -1.0"),
        (OptimizerConfig, {"max_gradient_norm": -1.0}, "optimizer.max_gradient_norm = -1.0"),
        (ParallelConfig, {"pipeline": 0}, "parallel.pipeline = 0"),
        (ParallelConfig, {"recompute": "some"}, "parallel.recompute = 'some'"),
        (WeightSyncConfig, {"bucket_bytes": 0}, "weight_sync.bucket_bytes = 0"),
        (EvaluationConfig, {"num_prompts": 0}, "evaluation.num_prompts = 0"),
        (RuntimeConfig, {"device": "tpu"}, "runtime.device = 'tpu' .*'auto', 'cpu'"),
    ],
)
def test_each_section_checks_its_own_fields(
    section: type, values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        section(**values)


def test_to_dict_is_plain_and_complete() -> None:
    as_dict = make_config().to_dict()
    assert as_dict["rollout"]["max_response_tokens"] == 20
    assert as_dict["model"] == {
        "path": "",
        "testbed": "pangu",
        "weights": "",
        "dtype": "bfloat16",
    }
    assert list(as_dict) == list(RunConfig.__dataclass_fields__)
