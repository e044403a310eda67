"""What a reward function takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from r2vpo_megatron.records import Prompt


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one response."""

    score: float  # what the advantages are computed from
    acc: bool  # counted as right; accuracy is its mean
    pred: str | None  # the extracted answer, for logs
    parsed: bool  # an answer was found at all


# (prompt, response text with special tokens skipped) -> verdict
RewardFunction = Callable[[Prompt, str], RewardResult]
