"""openPangu-Embedded-7B with the settings of the paper, on 32 devices: 16 learn, 16 sample.

Names without a suffix are laid out for NPUs of 64 GB, those with `_gpu80` for GPUs of 80 GB. Where
model and prompts lie is said by --model.path, --data.train-prompts and --data.held-out-prompts.
"""

from __future__ import annotations

from dataclasses import replace

from r2vpo_megatron.config import ModelConfig, ParallelConfig, RunConfig, variants
from r2vpo_megatron.config.paper import paper_settings


def r2vpo_off_policy() -> RunConfig:
    """Algorithm 2: FIFO replay of 4 iterations, UTD 2, lambda 0.04."""
    base = paper_settings()
    return replace(
        base,
        model=ModelConfig(path="models/openPangu-Embedded-7B"),
        data=replace(base.data, thinking="slow"),
        # 8 KV heads: a tensor parallel group fills a node. Whole layers are recomputed: of a
        # micro-batch, two of the longest samples, only their inputs stay.
        parallel=ParallelConfig(
            tensor=8,
            data=2,
            sequence_parallel=True,
            max_tokens_per_micro_batch=2 * base.max_sequence_tokens,
            recompute="full",
        ),
        rollout=replace(base.rollout, num_engines=16),
    )


def r2vpo_off_policy_gpu80() -> RunConfig:
    """The same on GPUs of 80 GB: fewer ranks share a layer, more share the samples."""
    base = r2vpo_off_policy()
    return replace(base, parallel=replace(base.parallel, tensor=4, data=4))


RECIPES = variants(r2vpo_off_policy) | variants(r2vpo_off_policy_gpu80, "_gpu80")
