"""Metrics of one iteration from its updates and trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from r2vpo_megatron.records import FloatArray, Trajectory

Metrics = dict[str, float]


def merge_updates(updates: Sequence[Metrics]) -> Metrics:
    """One value per metric over an iteration's updates: extremes of extremes, else the mean.

    Lambda is the one that the last update used.
    """
    if not updates:
        return {"updates/num": 0.0}
    merged: Metrics = {"updates/num": float(len(updates))}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        if name.endswith("/max"):
            merged[name] = max(values)
        elif name.endswith("/min"):
            merged[name] = min(values)
        elif name == "ratio/penalty":
            merged[name] = values[-1]
        else:
            merged[name] = float(np.mean(values))
    return merged


def logprob_gap(
    trajectories: Sequence[Trajectory], learner_logprobs: Mapping[str, FloatArray]
) -> Metrics:
    """How far the engine's log-probs are from the learner's of the same weights and tokens."""
    gaps = np.concatenate(
        [
            np.abs(trajectory.rollout_logprobs - learner_logprobs[trajectory.sample_id])
            for trajectory in trajectories
        ]
    )
    return {
        "logprob_gap/mean": float(gaps.mean()) if gaps.size else 0.0,
        "logprob_gap/max": float(gaps.max()) if gaps.size else 0.0,
    }


def throughput(metrics: Metrics) -> Metrics:
    """Response tokens generated per second of the whole iteration."""
    seconds = metrics.get("time/iteration_seconds", 0.0)
    tokens = metrics.get("response/num_tokens", 0.0)
    return {"throughput/tokens_per_second": tokens / seconds if seconds > 0 else 0.0}
