"""Reward functions by name. Add yours to `registry.REWARDS`, or name "FILE.py:function"."""

from __future__ import annotations

from r2vpo_megatron.rewards.format_checks import FORMAT_CHECKS
from r2vpo_megatron.rewards.math_dapo import MathDapoReward
from r2vpo_megatron.rewards.overlong import overlong_penalty
from r2vpo_megatron.rewards.preflight import check_answer_form
from r2vpo_megatron.rewards.registry import REWARDS, load_reward, score_responses
from r2vpo_megatron.rewards.result import FAILURES, RewardFunction, RewardResult

__all__ = [
    "FAILURES",
    "FORMAT_CHECKS",
    "REWARDS",
    "MathDapoReward",
    "RewardFunction",
    "RewardResult",
    "check_answer_form",
    "load_reward",
    "overlong_penalty",
    "score_responses",
]
