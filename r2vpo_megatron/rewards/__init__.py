"""Reward functions by name. Add yours to REWARDS, or name it "package.module:function"."""

from __future__ import annotations

import importlib
from functools import partial

from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards.extraction import INVALID
from r2vpo_megatron.rewards.math_dapo import compute_score
from r2vpo_megatron.rewards.overlong import overlong_penalty
from r2vpo_megatron.rewards.result import RewardFunction, RewardResult

__all__ = [
    "REWARDS",
    "RewardFunction",
    "RewardResult",
    "load_reward",
    "math_dapo_reward",
    "overlong_penalty",
]


def math_dapo_reward(prompt: Prompt, response_text: str, mode: str = "minerva") -> RewardResult:
    """Judge one response by math_dapo; see `math_dapo.compute_score` for the modes."""
    verdict = compute_score(response_text, prompt.ground_truth, mode)
    return RewardResult(
        score=verdict["score"],
        acc=verdict["acc"],
        pred=verdict["pred"],
        parsed=verdict["pred"] not in (None, INVALID),
    )


REWARDS: dict[str, RewardFunction] = {
    "math_dapo": math_dapo_reward,
    "math_dapo_boxed_fallback": partial(math_dapo_reward, mode="boxed_fallback"),
    "math_dapo_strict_box": partial(math_dapo_reward, mode="strict_box"),
}


def load_reward(name: str) -> RewardFunction:
    """Return the reward function `name` stands for.

    Args:
        name: A key of `REWARDS`, or "package.module:function" of an importable function
            (prompt: Prompt, response_text: str) -> RewardResult.

    Raises:
        ValueError: Nothing callable has this name.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, separator, function_name = name.partition(":")
    if not (separator and module_name and function_name):
        raise ValueError(
            f"reward {name!r} is unknown; valid: {', '.join(REWARDS)}, or 'package.module:function'"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"reward {name!r}: {module_name!r} has no function {function_name!r}; "
            f"it has: {', '.join(sorted(public)) or 'none'}"
        )
    reward: RewardFunction = function
    return reward
