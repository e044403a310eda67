"""A reward that an untrained model earns half of the time, so that there is something to learn."""

from __future__ import annotations

from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards import RewardResult


def reward(prompt: Prompt, response: str) -> RewardResult:
    """+1 for a response with an even number of characters, else -1."""
    is_even = len(response) % 2 == 0
    return RewardResult(1.0 if is_even else -1.0, is_even, str(len(response)), True)
