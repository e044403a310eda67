"""Accuracy on held-out prompts while training, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from r2vpo_megatron.data.chat import ChatTokenizer
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt
from r2vpo_megatron.rewards import RewardFunction, score_responses
from r2vpo_megatron.rollout.sampling import SamplingSettings


class Generator(Protocol):
    """What samples responses: one engine or a group of them."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """One response per request, in the order of the requests."""
        ...


@dataclass(frozen=True)
class HeldOutSet:
    """Prompts that are never trained on, with the reward's verdict as accuracy."""

    prompts: Sequence[Prompt]
    tokenizer: ChatTokenizer
    reward: RewardFunction
    max_response_tokens: int
    seed: int

    def evaluate(self, generator: Generator) -> dict[str, float]:
        """Accuracy of one response per prompt at temperature 1."""
        return {"evaluation/accuracy": self._accuracy(generator, greedy=False)}

    def evaluate_both(self, generator: Generator) -> dict[str, float]:
        """Accuracy at temperature 1 and greedy."""
        greedy = {"evaluation/accuracy_greedy": self._accuracy(generator, greedy=True)}
        return self.evaluate(generator) | greedy

    def _accuracy(self, generator: Generator, *, greedy: bool) -> float:
        # The same seeds each time: two evaluations differ by the weights alone.
        requests = [
            GenerationRequest(f"held-out.{index:05d}", prompt.token_ids, self.seed + index)
            for index, prompt in enumerate(self.prompts)
        ]
        sampling = SamplingSettings(
            max_response_tokens=self.max_response_tokens,
            stop_token_ids=self.tokenizer.stop_token_ids,
        )
        generations = generator.generate(requests, replace(sampling, greedy=greedy))
        texts = [self.tokenizer.decode_response(generation.token_ids) for generation in generations]
        results = score_responses(self.reward, self.prompts, texts)
        return float(np.mean([result.acc for result in results]))
