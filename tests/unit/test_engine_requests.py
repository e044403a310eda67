"""What an engine refuses, how a response is continued, and which version sampled its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.records import GenerationRequest
from r2vpo_megatron.rollout.engine import VersionSpans, check_request, continuation_seed
from r2vpo_megatron.rollout.sampling import SamplingSettings

SAMPLING = SamplingSettings(6, stop_token_ids=(9, 4))


def test_spans_stamp_each_token_with_its_version() -> None:
    spans = VersionSpans()
    assert spans.stamp(3, 5).tolist() == [5, 5, 5]
    spans.close(2, 5)
    spans.close(2, 6)  # a version that sampled nothing
    spans.close(4, 7)
    versions = spans.stamp(6, 9)
    assert versions.tolist() == [5, 5, 7, 7, 9, 9]
    assert versions.dtype == np.int64
    assert VersionSpans().stamp(0, 1).shape == (0,)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_spans_are_the_tokens_sampled_between_pushes(counts: list[int]) -> None:
    """Version v samples counts[v] tokens, then another one takes over."""
    spans = VersionSpans()
    sampled: list[int] = []
    for version, count in enumerate(counts):
        sampled += [version] * count
        if version < len(counts) - 1:
            spans.close(len(sampled), version)
    assert spans.stamp(len(sampled), len(counts) - 1).tolist() == sampled


@given(seed=st.integers(-(2**63), 2**63 - 1), num_partial_tokens=st.integers(1, 20000))
def test_a_continuation_draws_other_random_numbers(seed: int, num_partial_tokens: int) -> None:
    assert continuation_seed(seed, 0) == seed
    continued = continuation_seed(seed, num_partial_tokens)
    assert continued == continuation_seed(seed, num_partial_tokens)
    assert 0 <= continued < 2**32
    # Chance alone makes two of these equal in one case of 2^32 each.
    assert len({seed, continued, continuation_seed(seed, num_partial_tokens + 1)}) == 3


def test_seeds_of_one_prompts_responses_stay_different() -> None:
    seeds = {continuation_seed(seed, length) for seed in range(100) for length in range(100)}
    assert len(seeds) == 100 * 100


def test_requests_at_the_limits_are_taken() -> None:
    for request in (
        GenerationRequest("a", (0, 19, 1, 2), 0),
        GenerationRequest("a", (0, 9), 0, (1, 2, 3, 5, 6)),  # a stop token in the prompt is fine
    ):
        check_request(request, SAMPLING, max_model_len=10, vocab_size=20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": ()}, "request a: the prompt is empty"),
        (
            {"prompt_token_ids": (1,) * 5},
            r"request a: 5 prompt tokens \+ max_response_tokens=6 exceed max_model_len=10",
        ),
        ({"prompt_token_ids": (1, 20)}, "request a: token id 20: must be below 20"),
        ({"prompt_token_ids": (1, -1, 3)}, "request a: token id -1: must be below 20, from 0"),
        ({"partial_token_ids": (1, 21)}, "request a: token id 21"),
        (
            {"partial_token_ids": (1,) * 6},
            "request a: has 6 partial tokens: must be fewer than max_response_tokens=6",
        ),
        ({"partial_token_ids": (1, 9, 4)}, "request a: its partial tokens hold the stop token 4"),
    ],
)
def test_what_cannot_be_sampled_is_refused(fields: dict[str, Any], message: str) -> None:
    request = GenerationRequest(**{"sample_id": "a", "prompt_token_ids": (1,), "seed": 0, **fields})
    with pytest.raises(ValueError, match=message):
        check_request(request, SAMPLING, max_model_len=10, vocab_size=20)
