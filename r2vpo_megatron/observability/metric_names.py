"""Names of the metrics that the progress line and the figures read."""

from __future__ import annotations

REWARD_MEAN = "reward/mean"
EVALUATION_ACCURACY = "evaluation/accuracy"
RESPONSE_TOKENS_MEAN = "response/mean_tokens"
RATIO_SECOND_MOMENT = "ratio/second_moment"
"""E[(rho - 1)^2] over the tokens of an iteration's updates."""
RATIO_TARGET = "ratio/target"
"""Delta, what a dual controller steers the second moment to; absent when lambda is fixed."""
RATIO_PENALTY = "ratio/penalty"
"""Lambda."""
TOKENS_PER_SECOND = "throughput/tokens_per_second"
