"""Metrics of one iteration from those of its updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r2vpo_megatron.rl.staleness import STALENESS_PREFIX, merge_staleness

Metrics = dict[str, float]


def merge_updates(updates: Sequence[Metrics]) -> Metrics:
    """One value per metric over an iteration's updates: extremes of extremes, else the mean.

    Lambda is the one that the last update used. In the statistics by staleness every token counts
    as much: few updates have many tokens of the rare ages.
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
        elif not name.startswith(STALENESS_PREFIX):
            merged[name] = float(np.mean(values))
    return merged | merge_staleness(updates)


def throughput(metrics: Metrics) -> Metrics:
    """Response tokens learned from, per second of the whole iteration, and how much was waiting.

    The engines' share of waiting is `rollout/idle_fraction`.
    """
    seconds = metrics.get("time/iteration_seconds", 0.0)
    if seconds <= 0:
        return {"throughput/tokens_per_second": 0.0, "pipeline/learner_wait_fraction": 0.0}
    waited = metrics.get("time/wait_rollout_seconds", 0.0)
    return {
        "throughput/tokens_per_second": metrics.get("response/num_tokens", 0.0) / seconds,
        "pipeline/learner_wait_fraction": waited / seconds,
    }
