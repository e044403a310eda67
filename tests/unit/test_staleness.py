"""Statistics by the age of tokens: sums that add, and what is read off them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.rl.staleness import (
    buckets_from_sums,
    merge_staleness,
    staleness_metrics,
    staleness_sums,
)

Tokens = list[tuple[float, float, int]]  # rho, advantage, version


def sums_of(tokens: Tokens, policy_version: int) -> torch.Tensor:
    rho, advantages, versions = zip(*tokens, strict=True) if tokens else ((), (), ())
    return staleness_sums(
        torch.tensor(rho) - 1.0,
        torch.tensor(advantages),
        torch.tensor(versions, dtype=torch.int64),
        policy_version,
    )


def metrics_of(sums: torch.Tensor) -> dict[str, float]:
    return staleness_metrics(buckets_from_sums(sums.double()))


def test_sums_by_hand() -> None:
    tokens = [(1.5, 2.0, 7), (0.5, -1.0, 7), (3.0, 1.0, 6), (1.0, 0.5, 3), (2.0, 0.25, 0)]
    assert sums_of(tokens, 7).tolist() == [
        [2, 0, 0.5, 1],
        [1, 2, 4, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [2, 1, 1, 0.75],  # 4 and 7 versions behind
    ]
    # Two versions later all of them are older, and the oldest are where they were.
    older = sums_of(tokens, 9).tolist()
    assert older == [[0] * 4, [0] * 4, [2, 0, 0.5, 1], [1, 2, 4, 1], [2, 1, 1, 0.75]]
    # A token of a version that is not out yet counts as fresh.
    assert sums_of(tokens, 6).tolist()[0] == [3, 2, 4.5, 2]


def test_metrics_by_hand() -> None:
    tokens = [(1.5, 2.0, 7), (0.5, -1.0, 7), (3.0, 1.0, 6), (1.0, 0.5, 3), (2.0, 0.25, 0)]
    metrics = metrics_of(sums_of(tokens, 7))
    assert metrics == pytest.approx(
        {
            "staleness_0/tokens": 2,
            "staleness_0/token_fraction": 0.4,
            "staleness_0/mean_ratio": 1.0,
            "staleness_0/second_moment": 0.25,
            "staleness_0/effective_sample_size": 4 / (2 * 2.5),
            "staleness_0/mean_advantage": 0.5,
            "staleness_1/tokens": 1,
            "staleness_1/token_fraction": 0.2,
            "staleness_1/mean_ratio": 3.0,
            "staleness_1/second_moment": 4.0,
            "staleness_1/effective_sample_size": 1.0,
            "staleness_1/mean_advantage": 1.0,
            "staleness_4_or_more/tokens": 2,
            "staleness_4_or_more/token_fraction": 0.4,
            "staleness_4_or_more/mean_ratio": 1.5,
            "staleness_4_or_more/second_moment": 0.5,
            "staleness_4_or_more/effective_sample_size": 9 / (2 * 5),
            "staleness_4_or_more/mean_advantage": 0.375,
        }
    )


def test_no_tokens_are_no_metrics() -> None:
    assert sums_of([], 3).tolist() == [[0.0] * 4] * 5
    assert metrics_of(sums_of([], 3)) == {}
    assert merge_staleness([]) == {}
    assert merge_staleness([{"ratio/tokens": 0.0}]) == {}


def test_a_token_that_is_not_a_number_stays_in_its_bucket() -> None:
    sums = sums_of([(float("nan"), 1.0, 2), (1.5, 1.0, 1)], 2)
    assert sums[0, 1:3].isnan().all()
    assert sums[1].tolist() == [1, 0.5, 0.25, 1]


def test_the_only_token_of_its_age_may_have_a_ratio_of_0_in_fp32() -> None:
    sums = sums_of([(1.0, 1.0, 2), (0.0, 1.0, 1)], 2)
    metrics = metrics_of(sums)
    assert metrics["staleness_1/mean_ratio"] == 0.0
    assert metrics["staleness_1/effective_sample_size"] == 1.0
    merged = merge_staleness([metrics, metrics])
    assert merged["staleness_1/effective_sample_size"] == 1.0


TOKEN = st.tuples(
    st.floats(0.125, 4.0, width=32), st.floats(-2.0, 2.0, width=32), st.integers(0, 8)
)
UPDATES = st.lists(st.lists(TOKEN, max_size=12), min_size=1, max_size=4)


@settings(deadline=None)  # torch's first call takes its time
@given(updates=UPDATES)
def test_any_split_has_the_sums_of_the_whole(updates: list[Tokens]) -> None:
    together = [token for update in updates for token in update]
    parts = torch.stack([sums_of(update, 8).double() for update in updates]).sum(dim=0)
    torch.testing.assert_close(parts, sums_of(together, 8).double(), rtol=1e-5, atol=1e-5)


@settings(deadline=None)  # torch's first call takes its time
@given(updates=UPDATES)
def test_an_iteration_has_the_statistics_of_all_its_tokens(updates: list[Tokens]) -> None:
    """As if all its updates had been one; but for the number of tokens, which is a mean."""
    sums = [sums_of(update, 8).double() for update in updates]
    expected = metrics_of(torch.stack(sums).sum(dim=0))
    merged = merge_staleness([{"ratio/mean": 3.0, **metrics_of(each)} for each in sums])
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        wanted = value / len(updates) if name.endswith("/tokens") else value
        assert merged[name] == pytest.approx(wanted, rel=1e-6, abs=1e-9), name
    fractions = [value for name, value in merged.items() if name.endswith("/token_fraction")]
    assert sum(fractions) == pytest.approx(1.0 if any(updates) else 0.0)


def test_a_rare_age_counts_by_its_tokens() -> None:
    """One token in an update and 99 in another: the mean of the two means would be half."""
    rare = metrics_of(sums_of([(3.0, 1.0, 0)], 1))
    common = metrics_of(sums_of([(1.0, 0.0, 0)] * 99, 1))
    merged = merge_staleness([rare, common])
    assert merged["staleness_1/second_moment"] == pytest.approx(4 / 100)
    assert merged["staleness_1/mean_advantage"] == pytest.approx(1 / 100)
    rho = np.array([3.0] + [1.0] * 99)
    size = rho.sum() ** 2 / (100 * (rho**2).sum())
    assert merged["staleness_1/effective_sample_size"] == pytest.approx(size)
