"""Trajectories -> balanced, packed micro-batches for every data-parallel rank.

Packing never drops, cuts or repeats a sample, and every rank gets the same number of
micro-batches, so collectives inside a micro-batch always meet their counterparts.

Shape legend: R response tokens and P prompt tokens of one sample, T tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from r2vpo_megatron.data.partition import partition_balanced
from r2vpo_megatron.records import FloatArray, IntArray, PackedBatch, Trajectory

PADDING_TOKEN_ID = 0
PADDING_SEQUENCE_ID = -1


def pack_trajectories(
    trajectories: Sequence[Trajectory],
    *,
    max_tokens_per_micro_batch: int,
    num_data_parallel_ranks: int,
    pad_to_multiple_of: int = 1,
) -> list[list[PackedBatch]]:
    """Split the samples of one optimizer step into micro-batches for all data-parallel ranks.

    Uses the smallest number of micro-batches that respects the budget, and balances tokens over
    micro-batches and ranks. The result depends on the samples, not on their order.

    Args:
        trajectories: All samples of the step; the same sample may occur more than once.
        max_tokens_per_micro_batch: Budget in tokens, tail padding included.
        num_data_parallel_ranks: Ranks to serve.
        pad_to_multiple_of: A micro-batch is padded to a multiple of this, for sequence and
            context parallelism.

    Returns:
        [rank][micro-batch]. Micro-batches of the same index are of similar size on all ranks. With
        fewer samples than micro-batches some are `dummy_batch`.

    Raises:
        ValueError: A setting is out of range, a sample does not fit into the budget or its arrays
            do not match its response.
    """
    settings = {
        "max_tokens_per_micro_batch": max_tokens_per_micro_batch,
        "num_data_parallel_ranks": num_data_parallel_ranks,
        "pad_to_multiple_of": pad_to_multiple_of,
    }
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}: {value}; valid: 1 or more")
    budget = max_tokens_per_micro_batch // pad_to_multiple_of * pad_to_multiple_of
    if budget == 0:
        raise ValueError(
            f"max_tokens_per_micro_batch: {max_tokens_per_micro_batch}; valid: at least "
            f"pad_to_multiple_of, {pad_to_multiple_of}"
        )
    for sample in trajectories:
        _check_sample(sample, budget)
    ordered = sorted(trajectories, key=_sample_key)
    bins = partition_balanced(
        [sample.num_tokens for sample in ordered],
        capacity=budget,
        num_ranks=num_data_parallel_ranks,
    )
    return [
        [
            pack([ordered[index] for index in members], pad_to_multiple_of=pad_to_multiple_of)
            for members in bins_of_rank
        ]
        for bins_of_rank in bins
    ]


def pack(samples: Sequence[Trajectory], *, pad_to_multiple_of: int = 1) -> PackedBatch:
    """Concatenate samples to one micro-batch; see `PackedBatch` for what lies where.

    The log-prob of response token i is predicted at position P - 1 + i of its sequence, so that is
    where its mask, log-probs, version and advantage are. Tail padding is a sequence of its own: it
    then cannot attend to a sample, nor a sample to it.

    Args:
        samples: In the order wanted; empty gives a dummy of one padding sequence.
        pad_to_multiple_of: T becomes a multiple of this.
    """
    lengths = [sample.num_tokens for sample in samples]
    num_padding = -sum(lengths) % pad_to_multiple_of
    if not samples:
        num_padding = pad_to_multiple_of
    if num_padding:
        lengths.append(num_padding)
    cumulative_lengths = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    num_tokens = int(cumulative_lengths[-1])

    token_ids = np.full(num_tokens, PADDING_TOKEN_ID, dtype=np.int64)
    target_ids = np.full(num_tokens, PADDING_TOKEN_ID, dtype=np.int64)
    sequence_ids = np.full(num_tokens, PADDING_SEQUENCE_ID, dtype=np.int64)
    response_mask: npt.NDArray[np.bool_] = np.zeros(num_tokens, dtype=np.bool_)
    behavior_logprobs: FloatArray = np.zeros(num_tokens, dtype=np.float32)
    rollout_logprobs: FloatArray = np.zeros(num_tokens, dtype=np.float32)
    policy_versions: IntArray = np.zeros(num_tokens, dtype=np.int64)
    advantages: FloatArray = np.zeros(num_tokens, dtype=np.float32)
    for index, sample in enumerate(samples):
        start, end = int(cumulative_lengths[index]), int(cumulative_lengths[index + 1])
        token_ids[start:end] = sample.prompt_token_ids + sample.response_token_ids
        target_ids[start : end - 1] = token_ids[start + 1 : end]
        sequence_ids[start:end] = index
        first = start + len(sample.prompt_token_ids) - 1
        predicting = slice(first, first + len(sample.response_token_ids))
        response_mask[predicting] = True
        behavior_logprobs[predicting] = sample.behavior_logprobs
        rollout_logprobs[predicting] = sample.rollout_logprobs
        policy_versions[predicting] = sample.policy_versions
        advantages[predicting] = sample.advantage
    return PackedBatch(
        token_ids=token_ids,
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cumulative_lengths=cumulative_lengths,
        target_ids=target_ids,
        response_mask=response_mask,
        behavior_logprobs=behavior_logprobs,
        rollout_logprobs=rollout_logprobs,
        policy_versions=policy_versions,
        advantages=advantages,
        sequence_ids=sequence_ids,
        sample_ids=tuple(sample.sample_id for sample in samples),
    )


def dummy_batch(pad_to_multiple_of: int = 1) -> PackedBatch:
    """A micro-batch without samples: one padding sequence, nothing in the mask.

    A rank without work runs it to take part in the collectives of the others.
    """
    return pack([], pad_to_multiple_of=pad_to_multiple_of)


def packing_statistics(
    batches: Sequence[Sequence[PackedBatch]], max_tokens_per_micro_batch: int
) -> dict[str, float]:
    """Describe one packed optimizer step.

    Args:
        batches: [rank][micro-batch], as `pack_trajectories` gives them.
        max_tokens_per_micro_batch: The budget they were packed for.

    Returns:
        `packing/budget_use`: share of the budget filled with sample tokens;
        `packing/rank_imbalance`: (largest - mean) / mean of the tokens per rank;
        `packing/micro_batch_imbalance`: the same over micro-batches; `packing/num_micro_batches`
        per rank; `packing/num_dummies`.
    """
    tokens = np.array([[(b.sequence_ids >= 0).sum() for b in rank] for rank in batches], np.float64)
    per_rank = tokens.sum(axis=1)
    return {
        "packing/budget_use": float(tokens.mean() / max_tokens_per_micro_batch),
        "packing/rank_imbalance": _imbalance(per_rank),
        "packing/micro_batch_imbalance": _imbalance(tokens.ravel()),
        "packing/num_micro_batches": float(tokens.shape[1]),
        "packing/num_dummies": float((tokens == 0).sum()),
    }


def _imbalance(loads: npt.NDArray[np.float64]) -> float:
    mean = float(loads.mean())
    return float(loads.max()) / mean - 1.0 if mean else 0.0


def _sample_key(sample: Trajectory) -> tuple[int, str, int]:
    """Order of the samples: longest first, then by identity, whatever order they came in."""
    return (-sample.num_tokens, sample.sample_id, sample.iteration)


def _check_sample(sample: Trajectory, budget: int) -> None:
    num_prompt, num_response = len(sample.prompt_token_ids), len(sample.response_token_ids)
    if num_prompt == 0:
        raise ValueError(
            f"sample {sample.sample_id!r}: empty prompt; valid: at least one token, "
            "which predicts the first response token"
        )
    if sample.num_tokens > budget:
        raise ValueError(
            f"sample {sample.sample_id!r}: {sample.num_tokens} tokens ({num_prompt} prompt + "
            f"{num_response} response) exceed the {budget} of a micro-batch; valid: a larger "
            "max_tokens_per_micro_batch or shorter responses"
        )
    for name in ("behavior_logprobs", "rollout_logprobs", "policy_versions"):
        shape = getattr(sample, name).shape
        if shape != (num_response,):
            raise ValueError(
                f"sample {sample.sample_id!r}: {name} has shape {shape}; valid: ({num_response},), "
                "one per response token"
            )
