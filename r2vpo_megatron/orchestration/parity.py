"""Do engines and learner compute the same log-probs from the same weights?

A conversion that swaps two matrices, a stale cache or another rotary base trains without an error
and wrong. So after the first push both score the same token ids at temperature 1, and a run whose
engines do not reproduce the learner ends there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from r2vpo_megatron.orchestration.logprob_gap import LogprobGap, gap_of_scores
from r2vpo_megatron.records import FloatArray, Prompt, Trajectory

# Largest mean |difference| of a sequence's log-probs, in nats: a tenth of what another model gives,
# and several times what rounding does (fp32: 1e-5, bf16: 0.03).
MAX_MEAN_GAP = {"float32": 1e-3, "bfloat16": 0.15}


class Scorer(Protocol):
    """The learner, as far as it is compared."""

    def compute_logprobs(
        self, trajectories: Sequence[Trajectory], temperature: float | None = None
    ) -> dict[str, FloatArray]:
        """sample id -> [R] fp32 log-probs of the current weights."""
        ...


class EngineScorers(Protocol):
    """The engines, as far as they are compared."""

    def score_on_each(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        """Each engine's log-probs of all sequences' tokens but the first, at temperature 1."""
        ...


def compare_responses(
    learner: Scorer, rollout: EngineScorers, trajectories: Sequence[Trajectory]
) -> LogprobGap:
    """Let the learner and every engine score responses anew and compare their log-probs."""
    if not trajectories:
        return LogprobGap()
    logprobs = learner.compute_logprobs(trajectories, temperature=1.0)
    scores = rollout.score_on_each(
        [(*sample.prompt_token_ids, *sample.response_token_ids) for sample in trajectories]
    )
    return gap_of_scores(trajectories, logprobs, scores)


def require_parity(
    learner: Scorer, rollout: EngineScorers, prompts: Sequence[Prompt], dtype: str
) -> LogprobGap:
    """Compare the log-probs of prompts' tokens; stop a run whose parts are not one model.

    Args:
        learner: with the weights that were pushed.
        rollout: the engines that got them.
        prompts: to compare; one of a single token says nothing and is left out.
        dtype: of the weights, "float32" or "bfloat16".

    Raises:
        RuntimeError: with a table, where the mean difference of any prompt on any engine is too
            large or not a number.
    """
    allowed = MAX_MEAN_GAP[dtype]
    sequences = [_as_response(prompt) for prompt in prompts if len(prompt.token_ids) > 1]
    gap = compare_responses(learner, rollout, sequences)
    if all(of_prompt.mean <= allowed for of_prompt in gap.sequences):
        return gap
    raise RuntimeError(
        f"engines and learner compute different log-probs from the same weights (allowed: a mean "
        f"difference of {allowed:g} nats in {dtype}). The worst prompts:\n{gap.table()}"
    )


def _as_response(prompt: Prompt) -> Trajectory:
    """A prompt's tokens but the first as a response to that one, for scoring alone."""
    response = prompt.token_ids[1:]
    zeros = np.zeros(len(response), dtype=np.float32)
    return Trajectory(
        sample_id=prompt.prompt_id,
        group_id=prompt.prompt_id,
        prompt_token_ids=prompt.token_ids[:1],
        response_token_ids=response,
        behavior_logprobs=zeros,
        rollout_logprobs=zeros,
        reward=0.0,
        advantage=0.0,
        finish_reason="stop",
        policy_versions=np.zeros(len(response), dtype=np.int64),
        iteration=0,
    )
