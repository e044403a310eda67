"""Packing: where every number of a sample lies, and what balancing may never break."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.data.packing import (
    dummy_batch,
    pack,
    pack_trajectories,
    packing_statistics,
)
from r2vpo_megatron.data.partition import _fullest_bin_with_room, partition_balanced
from r2vpo_megatron.records import PackedBatch, Trajectory


def sample(name: str, num_prompt: int, num_response: int, advantage: float = 1.0) -> Trajectory:
    """Every number of it is unique to (name, position)."""
    base = 1000 * (int(name) + 1)
    logprobs = -np.arange(base, base + num_response, dtype=np.float32) / 7
    return Trajectory(
        sample_id=name,
        group_id="g",
        prompt_token_ids=tuple(range(base, base + num_prompt)),
        response_token_ids=tuple(range(base + num_prompt, base + num_prompt + num_response)),
        behavior_logprobs=logprobs,
        rollout_logprobs=logprobs - 1,
        reward=1.0,
        advantage=advantage,
        finish_reason="stop",
        policy_versions=np.arange(base, base + num_response) // 2,
        iteration=0,
    )


def test_layout_of_two_samples_and_padding_by_hand() -> None:
    first = sample("0", 2, 3, advantage=0.5)  # tokens 1000 1001 | 1002 1003 1004
    second = sample("1", 1, 2, advantage=-2.0)  # tokens 2000 | 2001 2002
    batch = pack([first, second], pad_to_multiple_of=5)
    b, r = first.behavior_logprobs, second.behavior_logprobs
    expected = {
        "token_ids": [1000, 1001, 1002, 1003, 1004, 2000, 2001, 2002, 0, 0],
        "target_ids": [1001, 1002, 1003, 1004, 0, 2001, 2002, 0, 0, 0],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 0, 1],
        "sequence_ids": [0, 0, 0, 0, 0, 1, 1, 1, -1, -1],
        "response_mask": [0, 1, 1, 1, 0, 1, 1, 0, 0, 0],
        "advantages": [0, 0.5, 0.5, 0.5, 0, -2, -2, 0, 0, 0],
        "behavior_logprobs": [0, b[0], b[1], b[2], 0, r[0], r[1], 0, 0, 0],
        "rollout_logprobs": [0, b[0] - 1, b[1] - 1, b[2] - 1, 0, r[0] - 1, r[1] - 1, 0, 0, 0],
        "policy_versions": [0, 500, 500, 501, 0, 1000, 1000, 0, 0, 0],
        "cumulative_lengths": [0, 5, 8, 10],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(batch, name), values, err_msg=name)
    assert batch.sample_ids == ("0", "1")
    floats = ("advantages", "behavior_logprobs", "rollout_logprobs")
    assert {getattr(batch, name).dtype for name in floats} == {np.dtype(np.float32)}
    integers = expected.keys() - {*floats, "response_mask"}
    assert {getattr(batch, name).dtype for name in integers} == {np.dtype(np.int64)}
    assert batch.response_mask.dtype == np.dtype(np.bool_)


def test_no_padding_sequence_where_none_is_needed() -> None:
    batch = pack([sample("0", 2, 2)], pad_to_multiple_of=4)
    assert batch.cumulative_lengths.tolist() == [0, 4]
    dummy = dummy_batch(4)
    assert dummy.cumulative_lengths.tolist() == [0, 4]
    assert dummy.sequence_ids.tolist() == [-1] * 4
    assert dummy.sample_ids == ()
    assert not dummy.response_mask.any()
    assert dummy.policy_versions.tolist() == [0] * 4


def response_tokens(batches: Sequence[Sequence[PackedBatch]]) -> Counter[tuple[float, ...]]:
    """Multiset of (token, behaviour, rollout, version, advantage) over all response tokens."""
    found: Counter[tuple[float, ...]] = Counter()
    for batch in (batch for rank in batches for batch in rank):
        mask = batch.response_mask
        logprobs = (batch.behavior_logprobs, batch.rollout_logprobs)
        columns = (batch.target_ids, *logprobs, batch.policy_versions, batch.advantages)
        found.update(zip(*(column[mask].tolist() for column in columns), strict=True))
    return found


LENGTHS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 20)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    num_ranks=st.integers(1, 5),
    pad=st.sampled_from([1, 2, 3, 8]),
    slack=st.integers(0, 60),
    data=st.data(),
)
def test_nothing_is_lost_and_all_ranks_have_the_same_number_of_micro_batches(
    lengths: list[tuple[int, int]],
    num_ranks: int,
    pad: int,
    slack: int,
    data: st.DataObject,
) -> None:
    samples = [
        sample(str(index), prompt, response, advantage=index / 8)
        for index, (prompt, response) in enumerate(lengths)
    ]
    longest = max((s.num_tokens for s in samples), default=1)
    budget = -(-longest // pad) * pad + slack
    options = {
        "max_tokens_per_micro_batch": budget,
        "num_data_parallel_ranks": num_ranks,
        "pad_to_multiple_of": pad,
    }
    batches = pack_trajectories(samples, **options)

    assert len(batches) == num_ranks
    counts = {len(rank) for rank in batches}
    assert len(counts) == 1
    flat = [batch for rank in batches for batch in rank]
    assert sorted(i for b in flat for i in b.sample_ids) == sorted(s.sample_id for s in samples)
    if len(samples) >= len(flat):
        assert all(batch.sample_ids for batch in flat)
    for batch in flat:
        num_tokens = len(batch.token_ids)
        assert 0 < num_tokens <= budget
        assert num_tokens % pad == 0
        assert batch.cumulative_lengths[-1] == num_tokens
        assert (np.diff(batch.cumulative_lengths) > 0).all()

    expected: Counter[tuple[float, ...]] = Counter()
    for s in samples:
        arrays = [s.behavior_logprobs, s.rollout_logprobs, s.policy_versions]
        advantage = float(np.float32(s.advantage))
        expected.update(
            (token, *values, advantage)
            for token, *values in zip(
                s.response_token_ids, *(array.tolist() for array in arrays), strict=True
            )
        )
    assert response_tokens(batches) == expected

    shuffled = pack_trajectories(data.draw(st.permutations(samples)), **options)
    for one, other in zip(flat, [b for rank in shuffled for b in rank], strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        assert one.sample_ids == other.sample_ids


def test_a_sample_drawn_twice_is_packed_twice() -> None:
    twice = [sample("0", 1, 3)] * 2
    batches = pack_trajectories(twice, max_tokens_per_micro_batch=4, num_data_parallel_ranks=1)
    assert [batch.sample_ids for batch in batches[0]] == [("0",), ("0",)]


def test_ranks_without_a_sample_get_dummies() -> None:
    batches = pack_trajectories(
        [sample("0", 1, 3)],
        max_tokens_per_micro_batch=8,
        num_data_parallel_ranks=3,
        pad_to_multiple_of=2,
    )
    assert [[len(b.token_ids) for b in rank] for rank in batches] == [[4], [2], [2]]
    statistics = packing_statistics(batches, 8)
    assert statistics["packing/num_dummies"] == 2
    assert statistics["packing/num_micro_batches"] == 1
    assert statistics["packing/budget_use"] == pytest.approx(4 / 24)
    assert statistics["packing/rank_imbalance"] == pytest.approx(2.0)


def test_ranks_are_balanced_row_by_row() -> None:
    samples = [sample(str(i), 1, length - 1) for i, length in enumerate((9, 6, 5, 2))]
    batches = pack_trajectories(samples, max_tokens_per_micro_batch=9, num_data_parallel_ranks=2)
    assert [[len(b.token_ids) for b in rank] for rank in batches] == [[9, 2], [6, 5]]


def test_the_fullest_bin_with_room_leaves_no_bin_empty() -> None:
    weights = (5, 5, 4, 3, 3)

    def bins(num_bins: int) -> list[int] | None:
        found = _fullest_bin_with_room(weights, range(5), num_bins, capacity=10)
        return None if found is None else found.tolist()

    assert bins(2) == [0, 0, 1, 1, 1]
    assert bins(3) == [0, 0, 1, 1, 2]
    assert bins(1) is None


def test_exchanges_find_what_no_single_pass_does() -> None:
    # Heaviest first into the emptier of two bins: 9 6 6 and 8 7 4, an overflow; into the fuller
    # one with room: 9 8 and 7 6 6, and the 4 has no place. Exchanging 9 and 8 fills both.
    weights = [9, 8, 7, 6, 6, 4]
    assert partition_balanced(weights, capacity=20, num_ranks=1) == [[[1, 3, 4], [0, 2, 5]]]


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    num_ranks=st.integers(1, 6),
    slack=st.integers(0, 60),
)
def test_bins_fit_and_none_is_empty_without_need(
    weights: list[int], num_ranks: int, slack: int
) -> None:
    capacity = max(weights) + slack
    ranks = partition_balanced(weights, capacity=capacity, num_ranks=num_ranks)
    assert len(ranks) == num_ranks
    assert len({len(bins) for bins in ranks}) == 1
    flat = [members for bins in ranks for members in bins]
    assert sorted(index for members in flat for index in members) == list(range(len(weights)))
    assert all(sum(weights[index] for index in members) <= capacity for members in flat)
    assert all(flat) or len(weights) < len(flat)
    for bins in ranks:
        loads = [sum(weights[index] for index in members) for members in bins]
        assert loads == sorted(loads, reverse=True)


@pytest.mark.parametrize(
    ("trajectory", "options", "message"),
    [
        (sample("7", 3, 6), {}, "sample '7': 9 tokens .3 prompt . 6 response. exceed the 8"),
        (sample("7", 3, 5), {"pad_to_multiple_of": 3}, "exceed the 6"),
        (sample("7", 0, 5), {}, "sample '7': empty prompt"),
        (sample("7", 1, 1), {"pad_to_multiple_of": 9}, "max_tokens_per_micro_batch: 8; valid"),
        (sample("7", 1, 1), {"num_data_parallel_ranks": 0}, "num_data_parallel_ranks: 0; valid"),
    ],
)
def test_what_cannot_be_packed_is_named(
    trajectory: Trajectory, options: dict[str, int], message: str
) -> None:
    arguments = {"max_tokens_per_micro_batch": 8, "num_data_parallel_ranks": 1, **options}
    with pytest.raises(ValueError, match=message):
        pack_trajectories([trajectory], **arguments)


@pytest.mark.parametrize("name", ["behavior_logprobs", "rollout_logprobs", "policy_versions"])
def test_arrays_must_match_the_response(name: str) -> None:
    good = sample("7", 1, 2)
    bad = Trajectory(**{**vars(good), name: np.zeros(3, getattr(good, name).dtype)})
    with pytest.raises(ValueError, match=rf"{name} has shape \(3,\); valid: \(2,\)"):
        pack_trajectories([bad], max_tokens_per_micro_batch=8, num_data_parallel_ranks=1)


def long_tailed_lengths(seed: int, num_samples: int, median: int) -> list[int]:
    """Prompts of 100 to 300 tokens, log-normal responses cut at 16,384."""
    generator = np.random.default_rng(seed)
    responses = generator.lognormal(np.log(median), 1.0, num_samples).clip(1, 16384).astype(int)
    return [int(n) for n in responses + generator.integers(100, 301, num_samples)]


@pytest.mark.parametrize("budget", [18432, 32768, 65536])
@pytest.mark.parametrize("num_ranks", [1, 4, 8, 64])
def test_long_tailed_lengths_fill_the_budget_evenly(budget: int, num_ranks: int) -> None:
    for seed in range(3):
        lengths = long_tailed_lengths(seed, num_samples=1024, median=2000)
        ranks = partition_balanced(lengths, capacity=budget, num_ranks=num_ranks)
        # Of what the sum of the lengths alone demands: one micro-batch in a hundred more.
        num_minimal = -(-sum(lengths) // (budget * num_ranks))
        assert num_minimal <= len(ranks[0]) <= num_minimal * 1.01 + (num_ranks == 1)
        loads = [sum(lengths[index] for members in bins for index in members) for bins in ranks]
        assert max(loads) <= 1.002 * np.mean(loads)


def test_ranks_are_even_where_the_longest_sample_makes_micro_batches_uneven() -> None:
    # Two micro-batches a rank of 1,000 tokens each on average, but one sample of 1,800.
    lengths = [1800] + [100] * 142
    ranks = partition_balanced(lengths, capacity=1800, num_ranks=8)
    loads = [[sum(lengths[index] for index in members) for members in bins] for bins in ranks]
    assert {len(bins) for bins in ranks} == {2}
    assert max(map(max, loads)) == 1800
    assert [sum(bins) for bins in loads] == [2000] * 8
