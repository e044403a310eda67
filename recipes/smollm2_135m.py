"""SmolLM2-135M-Instruct on one machine's CPU: a real model, small enough to watch it learn.

Its weights are looked for in models/SmolLM2-135M-Instruct (--model.path), its problems in
data/gsm8k.parquet (`tools/prepare_data.py --source gsm8k`; --data.train-prompts).
"""

from __future__ import annotations

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
    TrainConfig,
    WeightSyncConfig,
    variants,
)


def r2vpo_off_policy() -> RunConfig:
    """Algorithm 2: FIFO replay of 4 iterations, UTD 2, lambda 0.04; 9 heads, 3 KV heads."""
    return RunConfig(
        model=ModelConfig(path="models/SmolLM2-135M-Instruct", dtype="float32"),
        data=DataConfig(train_prompts="data/gsm8k.parquet"),
        rollout=RolloutConfig(
            max_prompt_tokens=256,
            max_response_tokens=256,
            max_num_seqs=64,
            kv_cache_bytes=1 << 30,
        ),
        algorithm=AlgorithmConfig(objective="r2vpo", ratio_penalty=0.04),
        replay=ReplayConfig(capacity_iterations=4, update_to_data=2.0),
        train=TrainConfig(
            num_iterations=50,
            prompts_per_iteration=16,
            responses_per_prompt=8,
            mini_batch_samples=64,
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        parallel=ParallelConfig(pipeline=2, max_tokens_per_micro_batch=2048),
        weight_sync=WeightSyncConfig(bucket_bytes=16 << 20),
        evaluation=EvaluationConfig(every_iterations=10, num_prompts=64),
    )


RECIPES = variants(r2vpo_off_policy)
