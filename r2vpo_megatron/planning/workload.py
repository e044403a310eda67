"""What one iteration has to do: how many responses, how long, how often they are learned from."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.config.checks import require


@dataclass(frozen=True)
class Workload:
    """One iteration.

    Attributes:
        num_prompts: that are sampled from.
        responses_per_prompt: of each.
        prompt_tokens: of a prompt, on average.
        response_tokens: of a response, on average.
        longest_response: in tokens.
        updates: optimizer steps, on average over iterations.
        samples_per_update: responses of one of them.
    """

    num_prompts: int
    responses_per_prompt: int
    prompt_tokens: float
    response_tokens: float
    longest_response: int
    updates: float
    samples_per_update: int

    @classmethod
    def of(
        cls,
        config: RunConfig,
        *,
        prompt_tokens: float | None = None,
        response_tokens: float | None = None,
    ) -> Workload:
        """Read a run's configuration.

        Args:
            config: of the run.
            prompt_tokens: mean length of a prompt; an eighth of the longest if None.
            response_tokens: mean length of a response; half of the longest if None.

        Raises:
            ValueError: a mean that is not between 0 and the longest.
        """
        rollout, train = config.rollout, config.train
        if prompt_tokens is None:
            prompt_tokens = rollout.max_prompt_tokens / 8
        if response_tokens is None:
            response_tokens = rollout.max_response_tokens / 2
        for flag, mean, longest in (
            ("--mean-prompt-tokens", prompt_tokens, rollout.max_prompt_tokens),
            ("--mean-response-tokens", response_tokens, rollout.max_response_tokens),
        ):
            require(0 < mean <= longest, flag, mean, f"above 0 and at most the longest, {longest}")
        return cls(
            num_prompts=train.prompts_per_iteration,
            responses_per_prompt=train.responses_per_prompt,
            prompt_tokens=prompt_tokens,
            response_tokens=response_tokens,
            longest_response=rollout.max_response_tokens,
            updates=float(config.updates_per_iteration),
            samples_per_update=train.mini_batch_samples,
        )

    @property
    def num_responses(self) -> int:
        """Sampled in an iteration."""
        return self.num_prompts * self.responses_per_prompt

    @property
    def sequence_tokens(self) -> float:
        """Of prompt and response, on average."""
        return self.prompt_tokens + self.response_tokens

    @property
    def attended_tokens(self) -> float:
        """E[s^2] / E[s] of the length s of a sequence: the length of the one a token is in."""
        lengths = [self.prompt_tokens + length for length in self.response_lengths(256)]
        return sum(length**2 for length in lengths) / sum(lengths)

    def response_lengths(self, count: int) -> list[float]:
        """Lengths of `count` responses in tokens, descending: exponential, cut at the longest.

        Quantiles of the density exp(-rate x) on 0..longest with the mean that is wanted: even
        where the mean is half of the longest, and with a long tail below.
        """
        longest = self.longest_response
        rate = _rate_of_mean(round(self.response_tokens / longest, 6))
        shares = ((index + 0.5) / count for index in reversed(range(count)))
        return [max(1.0, longest * _quantile(share, rate)) for share in shares]


def _quantile(share: float, rate: float) -> float:
    """Of the density exp(-rate x) on 0..1."""
    if abs(rate) < 1e-6:
        return share
    return -math.log1p(-share * -math.expm1(-rate)) / rate


@functools.lru_cache(maxsize=64)
def _rate_of_mean(mean: float) -> float:
    """The rate at which the density on 0..1 has this mean, by halving."""
    low, high = -500.0, 500.0
    for _ in range(80):
        rate = (low + high) / 2
        if abs(rate) < 1e-6:
            found = 0.5
        elif rate > 0:
            found = 1 / rate - math.exp(-rate) / -math.expm1(-rate)
        else:
            found = 1 + 1 / rate + math.exp(rate) / -math.expm1(rate)
        low, high = (rate, high) if found > mean else (low, rate)
    return (low + high) / 2
