"""What the paper's runs have in common, whatever their model (arXiv 2601.03320)."""

from __future__ import annotations

from r2vpo_megatron.config.algorithm import AlgorithmConfig
from r2vpo_megatron.config.ring import ReplayConfig, RolloutConfig, WeightSyncConfig
from r2vpo_megatron.config.run import RunConfig
from r2vpo_megatron.config.sections import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from r2vpo_megatron.config.survival import CheckpointConfig


def paper_settings() -> RunConfig:
    """Algorithm 2 on DAPO-Math-17k: 128 prompts x 8 responses, 16,384 tokens, rate 1e-6.

    Lambda is 0.04 and fixed; replay of 4 iterations, UTD 2. Model, layout and engines are missing.
    The paper does not say how many iterations it trains, nor its mini-batch: 8 updates of 256
    responses an iteration are ours.
    """
    return RunConfig(
        model=ModelConfig(path="models/MODEL"),
        data=DataConfig(train_prompts="data/dapo.parquet", reward="math_dapo"),
        rollout=RolloutConfig(max_prompt_tokens=2048, max_response_tokens=16384),
        algorithm=AlgorithmConfig(objective="r2vpo", ratio_penalty=0.04),
        replay=ReplayConfig(capacity_iterations=4, update_to_data=2.0),
        train=TrainConfig(
            num_iterations=200,
            prompts_per_iteration=128,
            responses_per_prompt=8,
            mini_batch_samples=256,
        ),
        optimizer=OptimizerConfig(lr=1e-6),
        weight_sync=WeightSyncConfig(backend="auto"),
        evaluation=EvaluationConfig(every_iterations=10),
        checkpoint=CheckpointConfig(every_iterations=5, keep_every_iterations=50),
    )
