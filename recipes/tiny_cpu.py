"""A tiny openPangu-shaped model on one machine's CPU: the whole ring in minutes.

The same parts as on a cluster: Megatron-core ranks with tensor parallelism, vLLM, Ray, replay.
"""

from __future__ import annotations

from dataclasses import replace

from r2vpo_megatron.config import (
    AlgorithmConfig,
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
    variants,
)


def r2vpo_off_policy() -> RunConfig:
    """Algorithm 2: FIFO replay of 4 iterations, uniform mini-batches, UTD 2."""
    return RunConfig(
        model=ModelConfig(testbed="pangu", dtype="float32"),
        rollout=RolloutConfig(
            max_prompt_tokens=64,
            max_response_tokens=96,
            max_num_seqs=256,
            kv_cache_bytes=64 << 20,
        ),
        algorithm=AlgorithmConfig(objective="r2vpo"),
        replay=ReplayConfig(capacity_iterations=4, update_to_data=2.0),
        train=TrainConfig(
            num_iterations=30,
            prompts_per_iteration=64,
            responses_per_prompt=8,
            mini_batch_samples=256,
        ),
        optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.0),
        parallel=ParallelConfig(tensor=2, max_tokens_per_micro_batch=8192),
        weight_sync=WeightSyncConfig(bucket_bytes=4 << 20),
        evaluation=EvaluationConfig(every_iterations=5, num_prompts=256),
        runtime=RuntimeConfig(timeout_seconds=300.0),
    )


def self_test() -> RunConfig:
    """Two small iterations, for `r2vpo_megatron.cli.doctor --self-test`, which sets the rate to 0.

    `--train.num-iterations 50` shows that nothing drifts.
    """
    base = r2vpo_off_policy()
    return replace(
        base,
        train=replace(base.train, num_iterations=2, prompts_per_iteration=8, mini_batch_samples=32),
        evaluation=replace(base.evaluation, num_prompts=8),
    )


def r2vpo_off_policy_dual() -> RunConfig:
    """Algorithm 2 with a lambda that steers the ratio's second moment to its target.

    Small steps and large mini-batches: with those of `r2vpo_off_policy` a single token, whose ratio
    is 30, can make an update's second moment ten times the target. The target is half of what a
    weak lambda leaves after 40 updates, so it binds to the end.
    """
    base = r2vpo_off_policy()
    return replace(
        base,
        algorithm=replace(
            base.algorithm,
            dual_controller="multiplicative",
            dual_target=3e-4,
            ratio_penalty=2.0,
        ),
        optimizer=replace(base.optimizer, lr=3e-5),
        replay=replace(base.replay, update_to_data=4.0),
        train=replace(base.train, num_iterations=50, mini_batch_samples=1024),
    )


RECIPES = variants(r2vpo_off_policy)
