"""What the replay buffer draws: the rules of dealing out, and the whole against a naive model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.records import Trajectory
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.replay.draws import deal_out, draw_with_replacement
from tests.replay_samples import (
    assert_same,
    batch,
    draw_batch,
    names,
    sample,
    through_json_and_arrays,
)


def spread(counts: Counter[str], stored: Sequence[str]) -> int:
    """Uses of the most used sample minus those of the least used one."""
    uses = [counts[name] for name in stored]
    return max(uses) - min(uses)


def assert_dealt_out(mini_batches: Sequence[Sequence[str]], stored: Sequence[str]) -> None:
    """The rules, as `deal_out` states them."""
    so_far: Counter[str] = Counter()
    for mini_batch in mini_batches:
        within = Counter(mini_batch)
        if len(mini_batch) <= len(stored):
            assert max(within.values(), default=0) <= 1
        assert spread(within, stored) <= 1
        so_far += within
        assert spread(so_far, stored) <= 1


@given(
    num_stored=st.integers(1, 9),
    num_updates=st.integers(0, 6),
    size=st.integers(0, 25),
    seed=st.integers(0, 99),
)
def test_no_sample_twice_before_all_were_used_nor_within_an_update(
    num_stored: int, num_updates: int, size: int, seed: int
) -> None:
    picks = deal_out(np.random.default_rng(seed), num_stored, num_updates, size)
    assert picks.shape == (num_updates, size)
    stored = [str(index) for index in range(num_stored)]
    assert_dealt_out([[str(pick) for pick in update] for update in picks.tolist()], stored)


@pytest.mark.parametrize("draw", [deal_out, draw_with_replacement])
def test_every_sample_is_as_likely_in_every_update(draw: Callable[..., Any]) -> None:
    """5 samples in updates of 3: the second goes on from one shuffle to the next."""
    generator = np.random.default_rng(0)
    counts = np.zeros((3, 5), dtype=np.int64)
    for _ in range(4000):
        for update, picks in enumerate(draw(generator, 5, 3, 3)):
            counts[update] += np.bincount(picks, minlength=5)
    # 2,400 expected of each; a standard deviation is 31 dealt out, 44 with replacement.
    assert np.abs(counts - 2400).max() < 5 * 44


def test_a_draw_with_replacement_is_independent_of_the_others() -> None:
    picks = draw_with_replacement(np.random.default_rng(0), 2, 400, 2)
    num_pairs = Counter(map(tuple, picks.tolist()))
    # 100 expected of each of the four pairs; a standard deviation is 8.7.
    assert set(num_pairs) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(abs(count - 100) < 44 for count in num_pairs.values())


def test_draws_are_uniform_over_samples_not_over_iterations() -> None:
    for with_replacement in (False, True):
        buffer = ReplayBuffer(2, seed=0)
        buffer.add(0, batch(0, 9))
        buffer.add(1, batch(1, 1))
        uses: Counter[str] = Counter()
        for _ in range(4000):
            uses.update(names(draw_batch(buffer, 3, with_replacement=with_replacement)))
        # 1,200 expected of each; five standard deviations are 165 at most.
        assert all(abs(uses[name] - 1200) < 165 for name in names(batch(0, 9) + batch(1, 1)))


def test_mini_batches_are_drawn_at_once_and_made_one_by_one() -> None:
    buffer = ReplayBuffer(1, seed=0)
    buffer.add(0, batch(0, 4))
    mini_batches = buffer.mini_batches(2, 3)
    assert buffer.metrics()["replay/realized_utd"] == 6 / 4
    buffer.add(1, batch(1, 4))
    drawn = list(mini_batches)
    assert [len(mini_batch) for mini_batch in drawn] == [3, 3]
    assert {s.iteration for mini_batch in drawn for s in mini_batch} == {0}
    for mini_batch in drawn:
        for each in mini_batch:
            assert_same(each, sample(0, int(each.sample_id[-3:])))


class NaiveBuffer:
    """The buffer as one would first write it down; told what was drawn, it keeps the accounts."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.stored: dict[int, list[Trajectory]] = {}
        self.uses: Counter[str] = Counter()
        self.added = self.drawn = 0
        self.evicted: list[str] = []
        self.sampled_ages: list[int] = []

    def add(self, iteration: int, trajectories: list[Trajectory]) -> None:
        self.stored[iteration] = trajectories
        self.added += len(trajectories)
        if len(self.stored) > self.capacity:
            self.evicted += names(self.stored.pop(min(self.stored)))

    def stored_samples(self) -> dict[str, Trajectory]:
        return {s.sample_id: s for samples in self.stored.values() for s in samples}

    def count(self, drawn: list[Trajectory]) -> None:
        self.uses.update(names(drawn))
        self.drawn += len(drawn)
        # Ages are those at the time of the draw.
        newest = max(self.stored, default=0)
        self.sampled_ages = [newest - s.iteration for s in drawn]

    def metrics(self) -> dict[str, float]:
        newest = max(self.stored, default=0)
        stored = self.stored_samples()
        ages = [newest - s.iteration for s in stored.values()]
        uses = [self.uses[name] for name in stored]
        evicted_uses = [self.uses[name] for name in self.evicted]

        def share(values: list[int], wanted: int, last: int) -> float:
            found = [min(value, last) == wanted for value in values]
            return sum(found) / len(found) if found else 0.0

        def mean(values: list[int]) -> float:
            return sum(values) / len(values) if values else 0.0

        expected = {
            "size": len(stored),
            "num_iterations": len(self.stored),
            "age_mean": mean(ages),
            "uses_mean": mean(uses),
            "sampled_age_mean": mean(self.sampled_ages),
            "sampled_age_max": max(self.sampled_ages, default=0),
            "evicted_unused_fraction": mean([count == 0 for count in evicted_uses]),
            "evicted_uses_mean": mean(evicted_uses),
            "evicted_early_iterations": 0,
            "realized_utd": self.drawn / self.added if self.added else 0.0,
            "uses_4_or_more": share(uses, 4, 4),
            **{f"uses_{n}": share(uses, n, 4) for n in range(4)},
        }
        for age in range(self.capacity):
            expected[f"age_fraction_{age}"] = share(ages, age, self.capacity - 1)
            expected[f"sampled_age_fraction_{age}"] = share(
                self.sampled_ages, age, self.capacity - 1
            )
        return {f"replay/{name}": value for name, value in expected.items()}


ADD = st.tuples(st.just("add"), st.integers(0, 6), st.integers(1, 3))  # samples, iterations on
DRAW = st.tuples(st.just("draw"), st.integers(0, 3), st.integers(0, 9), st.booleans())
RESUME = st.tuples(st.just("resume"))


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.one_of(ADD, DRAW, RESUME), max_size=12),
    capacity=st.integers(1, 3),
    random=st.randoms(use_true_random=False),
)
def test_any_life_of_a_buffer_is_that_of_the_naive_model(
    steps: list[Any], capacity: int, random: Random
) -> None:
    """And of another one, which gets samples in another order and is resumed on the way."""
    model = NaiveBuffer(capacity)
    buffer, other = (ReplayBuffer(capacity, seed=5) for _ in range(2))
    iteration = 0
    for kind, *values in steps:
        if kind == "add":
            count, later = values
            iteration += later
            samples = [sample(iteration, i, (i * i + later) % 5) for i in range(count)]
            for each in (model, buffer, other):
                each.add(iteration, random.sample(samples, count))
        elif kind == "draw" and model.stored_samples():
            num_updates, size, with_replacement = values
            drawn, twins = (
                list(each.mini_batches(num_updates, size, with_replacement=with_replacement))
                for each in (buffer, other)
            )
            stored = model.stored_samples()
            for mini_batch, twin_batch in zip(drawn, twins, strict=True):
                for one, twin in zip(mini_batch, twin_batch, strict=True):
                    assert_same(one, stored[one.sample_id])
                    assert_same(one, twin)
            if not with_replacement:
                assert_dealt_out([names(mini_batch) for mini_batch in drawn], list(stored))
            model.count([s for mini_batch in drawn for s in mini_batch])
        elif kind == "resume":
            state = through_json_and_arrays(other.state_dict())
            other = ReplayBuffer(capacity, seed=99)
            other.load_state_dict(state)
        metrics = buffer.metrics()
        assert other.metrics() == metrics
        assert (metrics.pop("replay/memory_bytes") > 0) == bool(model.stored)
        assert metrics == pytest.approx(model.metrics())
