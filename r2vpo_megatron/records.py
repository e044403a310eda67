"""What travels round the ring: prompts, generations, trajectories and packed batches.

    Prompt -> GenerationRequest -> Generation -> Trajectory -> PackedBatch

All records are frozen and hold plain Python values or numpy arrays, so they cross process
borders cheaply and know nothing of torch, Ray, Megatron or vLLM.

Shape legend: R response tokens of one sample, T tokens of one packed micro-batch (prompts and
responses), S sequences of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once; the engine and the learner get these very ids."""

    prompt_id: str
    token_ids: tuple[int, ...]  # chat template applied
    ground_truth: str
    text: str = ""  # the user's text, before the template
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """One response to sample. `seed` makes it independent of batching and completion order."""

    sample_id: str
    prompt_token_ids: tuple[int, ...]
    seed: int
    # What an aborted attempt has sampled; the response goes on after it and counts it in its limit.
    partial_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Generation:
    """What a rollout engine returns for one GenerationRequest: the tokens that it sampled."""

    sample_id: str
    token_ids: tuple[int, ...]  # [R], the stop token included where it was sampled
    rollout_logprobs: FloatArray  # [R] log-prob of each sampled token at the sampling temperature
    finish_reason: str  # "stop" | "length" | "abort"
    policy_versions: IntArray  # [R] version of the weights that sampled each token, ascending


@dataclass(frozen=True)
class Trajectory:
    """A scored response, as the replay buffer keeps it.

    `behavior_logprobs` is log pi_off of R2VPO (arXiv 2601.03320), the denominator of the
    importance ratio: fixed when the response was sampled, never recomputed with newer weights.
    A response that weights were pushed under has tokens of several versions, and each its own.
    """

    sample_id: str
    group_id: str
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]  # [R]
    behavior_logprobs: FloatArray  # [R]
    rollout_logprobs: FloatArray  # [R], as the engine reported them
    reward: float
    advantage: float
    finish_reason: str
    policy_versions: IntArray  # [R] version of the weights that sampled each token, ascending
    iteration: int  # the iteration that it is first learned in

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass over this sample processes."""
        return len(self.prompt_token_ids) + len(self.response_token_ids)


@dataclass(frozen=True)
class UpdateResult:
    """What came of one optimizer step, the same on every rank.

    Attributes:
        metrics: of the update; empty where it was not made.
        fault: why it was not made: what is not finite.
        sample_ids: of the samples at fault.
    """

    metrics: dict[str, float]
    fault: str = ""
    sample_ids: tuple[str, ...] = ()

    @property
    def is_made(self) -> bool:
        """Whether weights were changed."""
        return not self.fault


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: S sequences concatenated to T tokens, no padding between them.

    Position t predicts `target_ids[t]`, the next token of the same sequence. `response_mask[t]`
    says that this target is a response token; every other per-token array counts only there.
    """

    token_ids: IntArray  # [T]
    position_ids: IntArray  # [T], restarting at 0 for each sequence
    cumulative_lengths: IntArray  # [S + 1], starts with 0, ends with T
    target_ids: IntArray  # [T]
    response_mask: npt.NDArray[np.bool_]  # [T]
    behavior_logprobs: FloatArray  # [T]
    rollout_logprobs: FloatArray  # [T]
    policy_versions: IntArray  # [T]
    advantages: FloatArray  # [T], constant over a response
    sequence_ids: IntArray  # [T], 0..S-1; tail padding gets -1
    sample_ids: tuple[str, ...]  # [S], in order; tail padding has none
