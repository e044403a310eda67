"""Trajectories as columns: JSON values and flat numpy arrays, for checkpoints without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from r2vpo_megatron.records import Trajectory

_JSON_FIELDS = ("sample_id", "group_id", "finish_reason", "policy_version", "iteration")
_FLOAT64_FIELDS = ("reward", "advantage")
_TOKEN_FIELDS = ("prompt_token_ids", "response_token_ids")
_LOGPROB_FIELDS = ("behavior_logprobs", "rollout_logprobs")


def to_columns(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Return {field: list or array}; what has a length per sample is laid end to end.

    `prompt_lengths` and `response_lengths` [num samples] int64 say where it is to be cut. Numbers
    keep their bits.
    """
    columns: dict[str, Any] = {}
    for name in _JSON_FIELDS:
        columns[name] = [getattr(sample, name) for sample in trajectories]
    for name in _FLOAT64_FIELDS:
        columns[name] = np.array([getattr(sample, name) for sample in trajectories], np.float64)
    for name in _TOKEN_FIELDS:
        flat = [token for sample in trajectories for token in getattr(sample, name)]
        columns[name] = np.array(flat, dtype=np.int64)
    for name in _LOGPROB_FIELDS:
        parts = [np.zeros(0, np.float32), *(getattr(sample, name) for sample in trajectories)]
        columns[name] = np.concatenate(parts).astype(np.float32, copy=False)
    for name, tokens in (("prompt", "prompt_token_ids"), ("response", "response_token_ids")):
        lengths = [len(getattr(sample, tokens)) for sample in trajectories]
        columns[f"{name}_lengths"] = np.array(lengths, dtype=np.int64)
    return columns


def from_columns(columns: dict[str, Any]) -> list[Trajectory]:
    """Invert `to_columns`."""
    prompt_bounds = _bounds(columns["prompt_lengths"])
    response_bounds = _bounds(columns["response_lengths"])
    trajectories = []
    for index in range(len(columns["sample_id"])):
        prompt, response = prompt_bounds[index], response_bounds[index]
        fields: dict[str, Any] = {name: columns[name][index] for name in _JSON_FIELDS}
        fields |= {name: float(columns[name][index]) for name in _FLOAT64_FIELDS}
        fields |= {name: columns[name][response].copy() for name in _LOGPROB_FIELDS}
        fields["prompt_token_ids"] = tuple(columns["prompt_token_ids"][prompt].tolist())
        fields["response_token_ids"] = tuple(columns["response_token_ids"][response].tolist())
        trajectories.append(Trajectory(**fields))
    return trajectories


def _bounds(lengths: Sequence[int]) -> list[slice]:
    ends = list(accumulate(int(length) for length in lengths))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
