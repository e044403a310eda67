"""Rewards by name: our own, an importable function, or a function in a file of the user's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from r2vpo_megatron.config.user_file import import_user_file
from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards.math_dapo import MathDapoReward
from r2vpo_megatron.rewards.result import RewardFunction, RewardResult

REWARDS: dict[str, RewardFunction] = {
    "math_dapo": MathDapoReward("symbolic"),
    "math_dapo_minerva": MathDapoReward("minerva"),
    "math_dapo_boxed_fallback": MathDapoReward("boxed_fallback"),
    "math_dapo_strict_box": MathDapoReward("strict_box"),
}


def load_reward(name: str) -> RewardFunction:
    """Return the reward function `name` stands for.

    Args:
        name: A key of `REWARDS`, or "package.module:function" or "path/to/file.py:function" of a
            function (prompt: Prompt, response_text: str) -> RewardResult.

    Raises:
        ValueError: Nothing callable has this name, or its file raises; names file and line.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, separator, function_name = name.rpartition(":")
    if not (separator and module_name and function_name):
        raise ValueError(
            f"reward {name!r} is unknown; valid: {', '.join(REWARDS)}, or "
            f"'package.module:function' or 'path/to/file.py:function'"
        )
    if module_name.endswith(".py"):
        module = _import_file(name, Path(module_name))
    else:
        module = _import_module(name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"reward {name!r}: {module_name!r} has no function {function_name!r}; "
            f"it has: {', '.join(sorted(public)) or 'none'}"
        )
    reward: RewardFunction = function
    return reward


def score_responses(
    reward: RewardFunction, prompts: Sequence[Prompt], response_texts: Sequence[str]
) -> list[RewardResult]:
    """Judge responses in their order, all at once where the reward has `score_batch`.

    Args:
        reward: Of `load_reward`.
        prompts: One a response; a prompt with 8 responses stands here 8 times.
        response_texts: Decoded, special tokens skipped.

    Raises:
        ValueError: The reward gave another number of results than there are responses, or one
            that is no `RewardResult` with a finite score.
    """
    if len(prompts) != len(response_texts):
        raise ValueError(f"{len(prompts)} prompts for {len(response_texts)} responses")
    score_batch = getattr(reward, "score_batch", None)
    if score_batch is None:
        results = [reward(*pair) for pair in zip(prompts, response_texts, strict=True)]
    else:
        results = list(score_batch(prompts, response_texts))
    if len(results) != len(prompts):
        raise ValueError(f"score_batch gave {len(results)} results for {len(prompts)} responses")
    for prompt, result in zip(prompts, results, strict=True):
        _check_result(prompt, result)
    return results


def _check_result(prompt: Prompt, result: object) -> None:
    """A user's reward is not type checked, and one NaN would end up in every weight."""
    where = f"the reward of prompt {prompt.prompt_id!r}"
    if not isinstance(result, RewardResult):
        raise ValueError(f"{where} returned {type(result).__name__}, not a RewardResult")
    if not math.isfinite(result.score):
        raise ValueError(f"{where} has the score {result.score}: must be finite")


def _import_module(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"reward {name!r}: cannot import {module_name!r}: {error}") from error


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"reward {name!r}: no such file {str(path)!r}")
    return import_user_file(path, "reward")
