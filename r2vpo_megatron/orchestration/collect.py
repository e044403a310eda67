"""One iteration's data: rollout -> reward -> advantage -> behaviour log-probs -> trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.chat import ChatTokenizer
from r2vpo_megatron.orchestration.groups import LearnerGroup, RolloutGroup
from r2vpo_megatron.orchestration.iteration_metrics import Metrics, logprob_gap
from r2vpo_megatron.orchestration.scoring import score_generations
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt, Trajectory
from r2vpo_megatron.rewards import RewardFunction, RewardResult
from r2vpo_megatron.rl.advantages import group_advantages
from r2vpo_megatron.rollout.sampling import SamplingSettings


@dataclass(frozen=True)
class Collector:
    """Turns prompts into scored trajectories that carry log pi_off."""

    config: RunConfig
    tokenizer: ChatTokenizer
    reward: RewardFunction
    rollout: RolloutGroup
    learner: LearnerGroup

    def collect(
        self, prompts: Sequence[Prompt], iteration: int
    ) -> tuple[list[Trajectory], Metrics]:
        """Sample G responses to each prompt, score them and attach advantages and log pi_off.

        The learner's log-probs of these samples are always computed, before any update: they
        are the behaviour log-probs (`algorithm.behavior_logprobs: learner`) or show how far the
        engine's are off.

        Args:
            prompts: of this iteration.
            iteration: 1, 2, ...; part of every sample id and seed.
        """
        num_responses = self.config.train.responses_per_prompt
        requests = [
            GenerationRequest(
                sample_id=f"{iteration:06d}.{index:05d}.{response:03d}",
                prompt_token_ids=prompt.token_ids,
                seed=_request_seed(self.config.train.seed, iteration, index, response),
            )
            for index, prompt in enumerate(prompts)
            for response in range(num_responses)
        ]
        generations = self.rollout.generate(requests, self._sampling())
        # Weights are pushed as version `iteration` at the end of each, 0 being the checkpoint.
        assert {generation.policy_version for generation in generations} == {iteration - 1}
        repeated = [prompt for prompt in prompts for _ in range(num_responses)]
        texts = [self.tokenizer.decode_response(generation.token_ids) for generation in generations]
        results, scoring = score_generations(self.config, self.reward, repeated, generations, texts)
        trajectories = [
            trajectory
            for start in range(0, len(requests), num_responses)
            for trajectory in self._group(
                repeated[start : start + num_responses],
                generations[start : start + num_responses],
                results[start : start + num_responses],
                iteration,
            )
        ]
        trajectories, gap = self._with_behavior_logprobs(trajectories)
        return trajectories, scoring | _response_metrics(generations) | gap

    def _sampling(self) -> SamplingSettings:
        rollout = self.config.rollout
        return SamplingSettings.for_training(
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=self.tokenizer.stop_token_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )

    def _group(
        self,
        prompts: Sequence[Prompt],
        generations: Sequence[Generation],
        results: Sequence[RewardResult],
        iteration: int,
    ) -> list[Trajectory]:
        """The G trajectories of one prompt, their advantages relative to each other."""
        advantages = group_advantages(
            [result.score for result in results],
            normalize_by_std=self.config.algorithm.advantage == "group_normalized",
        )
        return [
            Trajectory(
                sample_id=generation.sample_id,
                group_id=generation.sample_id.rpartition(".")[0],
                prompt_token_ids=prompt.token_ids,
                response_token_ids=generation.token_ids,
                behavior_logprobs=generation.rollout_logprobs,
                rollout_logprobs=generation.rollout_logprobs,
                reward=result.score,
                advantage=advantage,
                finish_reason=generation.finish_reason,
                policy_version=generation.policy_version,
                iteration=iteration,
            )
            for prompt, generation, result, advantage in zip(
                prompts, generations, results, advantages, strict=True
            )
        ]

    def _with_behavior_logprobs(
        self, trajectories: list[Trajectory]
    ) -> tuple[list[Trajectory], Metrics]:
        """Attach the learner's log-probs where they are the denominator; report the gap."""
        computed = self.learner.compute_logprobs(trajectories)
        metrics = logprob_gap(trajectories, computed)
        if self.config.algorithm.behavior_logprobs == "rollout":
            return trajectories, metrics
        return [
            replace(trajectory, behavior_logprobs=computed[trajectory.sample_id])
            for trajectory in trajectories
        ], metrics


def _request_seed(seed: int, iteration: int, index: int, response: int) -> int:
    """A 32-bit seed of one response, whatever engine samples it and when."""
    return int(np.random.SeedSequence([seed, iteration, index, response]).generate_state(1)[0])


def _response_metrics(generations: Sequence[Generation]) -> Metrics:
    """Lengths and ends of one iteration's responses."""
    lengths = [len(generation.token_ids) for generation in generations]
    truncated = [generation.finish_reason == "length" for generation in generations]
    return {
        "response/mean_tokens": float(np.mean(lengths)),
        "response/max_tokens": float(max(lengths)),
        "response/truncated_fraction": float(np.mean(truncated)),
        "response/num_tokens": float(sum(lengths)),
    }
