"""From responses to scores: the reward, what shapes it, and the metrics of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.iteration_metrics import Metrics
from r2vpo_megatron.records import Generation, Prompt
from r2vpo_megatron.rewards import (
    FORMAT_CHECKS,
    RewardFunction,
    RewardResult,
    overlong_penalty,
    score_responses,
)


def score_generations(
    config: RunConfig,
    reward: RewardFunction,
    prompts: Sequence[Prompt],
    generations: Sequence[Generation],
    texts: Sequence[str],
) -> tuple[list[RewardResult], Metrics]:
    """Judge every response and take the penalties that are on from its score.

    Args:
        config: `algorithm` names the penalties.
        reward: of the recipe.
        prompts: one per response.
        generations: for their lengths and ends.
        texts: the responses decoded, special tokens skipped.

    Returns:
        The verdicts with the scores that advantages are formed from, and metrics.
    """
    results = score_responses(reward, prompts, texts)
    metrics = _verdict_metrics(results)
    penalties = np.zeros(len(results))
    if config.algorithm.overlong_buffer_tokens:
        overlong = _overlong_penalties(config, generations)
        metrics["reward/overlong_penalty"] = float(overlong.mean())
        penalties += overlong
    if names := config.algorithm.format_check_names:
        faults = np.array([[not FORMAT_CHECKS[name](text) for name in names] for text in texts])
        for name, share in zip(names, faults.mean(axis=0), strict=True):
            metrics[f"reward/format_fault_fraction/{name}"] = float(share)
        penalties -= config.algorithm.format_penalty * faults.any(axis=1)
    shaped = [
        replace(result, score=result.score + float(penalty)) if penalty else result
        for result, penalty in zip(results, penalties, strict=True)
    ]
    mean = float(np.mean([result.score for result in shaped]))
    return shaped, metrics | {"reward/mean": mean}


def _verdict_metrics(results: Sequence[RewardResult]) -> Metrics:
    """Accuracy, unparsed answers and answers that the grader had to give up on."""
    failures = Counter(result.failure for result in results if result.failure)
    return {
        "reward/accuracy": float(np.mean([result.acc for result in results])),
        "reward/unparsed_fraction": 1.0 - float(np.mean([result.parsed for result in results])),
        "reward/grader_failures": float(failures.total()),
        **{f"reward/grader_failures/{kind}": float(n) for kind, n in sorted(failures.items())},
    }


def _overlong_penalties(
    config: RunConfig, generations: Sequence[Generation]
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(
        [
            overlong_penalty(
                len(generation.token_ids),
                max_tokens=config.rollout.max_response_tokens,
                buffer_tokens=config.algorithm.overlong_buffer_tokens,
            )
            for generation in generations
        ]
    )
