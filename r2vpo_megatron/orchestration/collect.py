"""One iteration's data: rollout -> reward -> advantage -> behaviour log-probs -> trajectories."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.chat import ChatTokenizer
from r2vpo_megatron.data.prompts import PromptStream
from r2vpo_megatron.orchestration.group_schedule import Group, GroupSchedule
from r2vpo_megatron.orchestration.iteration_metrics import Metrics
from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.logprob_gap import LogprobGap, gap_of_samples
from r2vpo_megatron.orchestration.parity import compare_responses
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.orchestration.scoring import score_generations
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt, Trajectory
from r2vpo_megatron.rewards import RewardFunction, RewardResult
from r2vpo_megatron.rl.advantages import group_advantages
from r2vpo_megatron.rollout.sampling import SamplingSettings


@dataclass(frozen=True)
class Collected:
    """What one iteration adds to the replay buffer."""

    trajectories: list[Trajectory]
    metrics: Metrics
    gap: LogprobGap  # between engines and learner, where both had the same weights


@dataclass
class Collector:
    """Keeps rollouts under way and turns them into scored trajectories that carry log pi_off."""

    config: RunConfig
    tokenizer: ChatTokenizer
    reward: RewardFunction
    prompts: PromptStream[Prompt]
    rollout: RolloutPool
    learner: LearnerGroup
    schedule: GroupSchedule = field(init=False)
    _newest: list[Trajectory] = field(init=False, default_factory=list)  # a few of the last ones

    def __post_init__(self) -> None:
        self.schedule = GroupSchedule(self.config)

    def collect(self, iteration: int) -> Collected:
        """Wait for the responses of an iteration, score them and attach advantages and log pi_off.

        Before it waits it starts what may run meanwhile: the iteration's own groups, and in
        asynchronous mode those of the next ones, which engines sample while this one is learned.

        Args:
            iteration: 1, 2, ...; it is learned from the weights of version `iteration` - 1.
        """
        gap_before = self._compare_while_idle()
        self._start_groups(iteration)
        start = time.perf_counter()
        groups = self.rollout.wait_for(lambda finished: self.schedule.choose(iteration, finished))
        waited = time.perf_counter() - start
        self.schedule.remove(groups)
        generations = self.rollout.take([name for group in groups for name in group.sample_ids])
        prompts = [group.prompt for group in groups for _ in group.sample_ids]
        texts = [self.tokenizer.decode_response(generation.token_ids) for generation in generations]
        results, scoring = score_generations(self.config, self.reward, prompts, generations, texts)
        size = self.config.train.responses_per_prompt
        trajectories = [
            trajectory
            for start_, group in zip(range(0, len(generations), size), groups, strict=True)
            for trajectory in self._trajectories(
                group,
                generations[start_ : start_ + size],
                results[start_ : start_ + size],
                iteration,
            )
        ]
        trajectories, gap = self._with_behavior_logprobs(trajectories, iteration - 1)
        self._newest = trajectories[: self.config.runtime.parity_samples]
        metrics = {
            **scoring,
            **_response_metrics(generations),
            **_staleness_metrics(trajectories, iteration - 1),
            **self.schedule.metrics(),
            "time/wait_rollout_seconds": waited,
        }
        return Collected(trajectories, metrics, LogprobGap(gap_before.sequences + gap.sequences))

    def state_dict(self) -> dict[str, Any]:
        """What was started, in JSON values; what has come in of it is not kept."""
        return {"prompts": self.prompts.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: what was under way is sampled again.

        Names and seeds are those of before, so that as far as weights and engines are the same the
        responses are.

        Raises:
            ValueError: the prompts are not those of before.
        """
        self.prompts.load_state_dict(state["prompts"])
        self.schedule.load_state_dict(
            state["schedule"],
            lambda number: (self.prompts.prompt_at(number), self._sample_ids(number)),
        )
        self._submit(self.schedule.under_way)

    def _compare_while_idle(self) -> LogprobGap:
        """Let engines that have run ahead of the learner and out of work score a few responses.

        What comes in next was then sampled by weights that the learner has left, and says nothing
        of how far both are apart. Engines that are busy are not made to wait for a comparison, nor
        the learner for them: tokens that they sample now can be compared.
        """
        if self.config.pipeline.mode == "synchronous" or not self.rollout.is_idle:
            return LogprobGap()
        # Scoring takes the place of one more token.
        longest = self.config.max_sequence_tokens - 1
        fitting = [sample for sample in self._newest if sample.num_tokens <= longest]
        return compare_responses(self.learner, self.rollout, fitting)

    def _start_groups(self, iteration: int) -> None:
        """Hand the engines what may be under way while this iteration is waited for."""
        num_before = len(self.schedule.under_way)
        for prompt in self.prompts.take(self.schedule.num_startable(iteration)):
            names = self._sample_ids(self.schedule.num_started)
            self.schedule.start(prompt, names, iteration)
        self._submit(self.schedule.under_way[num_before:])

    def _submit(self, groups: Sequence[Group]) -> None:
        requests = [
            GenerationRequest(
                sample_id=sample_id,
                prompt_token_ids=group.prompt.token_ids,
                seed=_request_seed(self.config.train.seed, sample_id),
            )
            for group in groups
            for sample_id in group.sample_ids
        ]
        self.rollout.submit(requests, self._sampling())

    def _sample_ids(self, number: int) -> tuple[str, ...]:
        """Names of a group's responses: its batch from 1 on, its place there, the response."""
        batch, index = divmod(number, self.config.train.prompts_per_iteration)
        return tuple(
            f"{batch + 1:06d}.{index:05d}.{response:03d}"
            for response in range(self.config.train.responses_per_prompt)
        )

    def _sampling(self) -> SamplingSettings:
        rollout = self.config.rollout
        return SamplingSettings.for_training(
            max_response_tokens=rollout.max_response_tokens,
            stop_token_ids=self.tokenizer.stop_token_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )

    def _trajectories(
        self,
        group: Group,
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
                prompt_token_ids=group.prompt.token_ids,
                response_token_ids=generation.token_ids,
                behavior_logprobs=generation.rollout_logprobs,
                rollout_logprobs=generation.rollout_logprobs,
                reward=result.score,
                advantage=advantage,
                finish_reason=generation.finish_reason,
                policy_versions=generation.policy_versions,
                iteration=iteration,
            )
            for generation, result, advantage in zip(generations, results, advantages, strict=True)
        ]

    def _with_behavior_logprobs(
        self, trajectories: list[Trajectory], version: int
    ) -> tuple[list[Trajectory], LogprobGap]:
        """Attach the learner's log-probs where they are the denominator; measure the gap.

        The learner's log-probs are compared with what the engines reported, token by token, where
        it still has the weights that sampled the token. If they are not needed for anything else,
        they are computed for a few samples only.
        """
        if self.config.algorithm.behavior_logprobs == "rollout":
            current = [t for t in trajectories if (t.policy_versions == version).any()]
            probe = current[: self.config.runtime.parity_samples]
            computed = self.learner.compute_logprobs(probe) if probe else {}
            return trajectories, gap_of_samples(probe, computed, version)
        computed = self.learner.compute_logprobs(trajectories)
        return [
            replace(trajectory, behavior_logprobs=computed[trajectory.sample_id])
            for trajectory in trajectories
        ], gap_of_samples(trajectories, computed, version)


def _request_seed(seed: int, sample_id: str) -> int:
    """A 32-bit seed of one response, whatever engine samples it and when."""
    place = [int(part) for part in sample_id.split(".")]
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


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


def _staleness_metrics(trajectories: Sequence[Trajectory], version: int) -> Metrics:
    """How many versions behind the learner the new tokens are, and how many responses mix some."""
    versions = [sample.policy_versions for sample in trajectories if sample.policy_versions.size]
    staleness = version - np.concatenate(versions)
    assert staleness.min() >= 0, f"a token of a version after {version}"
    return {
        "pipeline/staleness_mean": float(staleness.mean()),
        "pipeline/staleness_max": float(staleness.max()),
        "pipeline/mixed_fraction": float(np.mean([v[0] != v[-1] for v in versions])),
    }
