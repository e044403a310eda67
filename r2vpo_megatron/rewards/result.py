"""What a reward function takes and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from r2vpo_megatron.records import Prompt

# Why there is no verdict by comparison; such an answer counts as wrong.
FAILURES = ("timeout", "memory", "crash", "too_long")


@dataclass(frozen=True)
class RewardResult:
    """The verdict on one response."""

    score: float  # what the advantages are computed from
    acc: bool  # counted as right; accuracy is its mean
    pred: str | None  # the extracted answer, for logs
    parsed: bool  # an answer was found at all
    failure: str = ""  # one of FAILURES where the answer could not be judged


@dataclass(frozen=True)
class Equivalence:
    """Whether two answers denote the same."""

    equal: bool
    failure: str = ""  # one of FAILURES; then `equal` is False
    is_lasting: bool = True  # the same pair would get the same verdict again


# (prompt, response text with special tokens skipped) -> verdict
RewardFunction = Callable[[Prompt, str], RewardResult]
