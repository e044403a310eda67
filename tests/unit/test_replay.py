"""The replay buffer: eviction, memory, accounting, resuming to the bit.

What it may draw is `test_replay_draws`'s.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.records import Trajectory
from r2vpo_megatron.replay import ReplayBuffer
from tests.replay_samples import (
    assert_same,
    batch,
    draw_batch,
    names,
    sample,
    through_json_and_arrays,
)


def test_oldest_iteration_is_evicted_first() -> None:
    buffer = ReplayBuffer(capacity_iterations=2, seed=0)
    for iteration, count in ((0, 3), (1, 2), (5, 4)):
        buffer.add(iteration, batch(iteration, count))
    assert sorted(names(draw_batch(buffer, 6))) == sorted(names(batch(1, 2) + batch(5, 4)))
    assert len(buffer) == 6


def test_draws_do_not_depend_on_the_order_of_completion() -> None:
    draws = []
    for order in (1, -1):
        buffer = ReplayBuffer(2, seed=3)
        buffer.add(0, batch(0, 20)[::order])
        draws.append(names(draw_batch(buffer, 10)))
    assert draws[0] == draws[1]
    other_seed = ReplayBuffer(2, seed=4)
    other_seed.add(0, batch(0, 20))
    assert names(draw_batch(other_seed, 10)) != draws[0]


def test_steady_state_ages_and_uses() -> None:
    """FIFO 4 at UTD 2: ages 0..3 with mean 1.5, two uses in a sample's life."""
    buffer = ReplayBuffer(4, seed=0)
    ages = []
    for iteration in range(200):
        buffer.add(iteration, batch(iteration, 16))
        drawn = draw_batch(buffer, 32)
        if iteration >= 3:
            ages += [iteration - trajectory.iteration for trajectory in drawn]
    metrics = buffer.metrics()
    assert set(ages) == {0, 1, 2, 3}
    assert np.mean(ages) == pytest.approx(1.5, abs=0.05)
    assert metrics["replay/age_mean"] == 1.5
    assert metrics["replay/evicted_uses_mean"] == pytest.approx(2.0, abs=0.05)
    assert metrics["replay/realized_utd"] == 2.0
    # Half of the buffer per iteration, four times: 1/16 remain unused.
    assert metrics["replay/evicted_unused_fraction"] == pytest.approx(1 / 16, abs=0.02)


def test_metrics_by_hand() -> None:
    buffer = ReplayBuffer(2, seed=0)
    assert buffer.metrics() == dict.fromkeys(buffer.metrics(), 0.0)
    buffer.add(0, batch(0, 4))
    draw_batch(buffer, 3)
    buffer.add(2, batch(2, 4))
    metrics = buffer.metrics()
    assert metrics["replay/size"] == 8
    assert metrics["replay/num_iterations"] == 2
    assert metrics["replay/age_mean"] == 1.0
    assert metrics["replay/uses_mean"] == 3 / 8
    assert metrics["replay/realized_utd"] == 3 / 8
    assert metrics["replay/sampled_age_mean"] == 0.0
    assert metrics["replay/evicted_unused_fraction"] == 0.0
    # Three of four older samples were drawn once, when they were the newest; none of the newer.
    assert metrics["replay/uses_0"] == 5 / 8
    assert metrics["replay/uses_1"] == 3 / 8
    assert [metrics[f"replay/uses_{uses}"] for uses in ("2", "3", "4_or_more")] == [0, 0, 0]
    assert [metrics[f"replay/age_fraction_{age}"] for age in (0, 1)] == [0.5, 0.5]
    assert [metrics[f"replay/sampled_age_fraction_{age}"] for age in (0, 1)] == [1.0, 0.0]
    assert not any(name.endswith("_fraction_2") for name in metrics)
    buffer.add(3, [])
    metrics = buffer.metrics()
    assert metrics["replay/evicted_unused_fraction"] == 1 / 4
    assert metrics["replay/evicted_uses_mean"] == 3 / 4
    assert metrics["replay/age_mean"] == 1.0
    buffer.add(4, [])
    assert len(buffer) == 0
    assert buffer.metrics()["replay/evicted_unused_fraction"] == 5 / 8


def test_histograms_of_uses_and_ages() -> None:
    buffer = ReplayBuffer(3, seed=0)
    for iteration, uses in ((0, 5), (1, 3), (2, 1)):
        buffer.add(iteration, batch(iteration, 2))
        # Every sample stored, `uses` times: 9 in all, 4 and 1.
        draw_batch(buffer, uses * len(buffer))
    metrics = buffer.metrics()
    uses = {key: value for key, value in metrics.items() if "/uses_" in key}
    assert uses == pytest.approx(
        {
            "replay/uses_0": 0,
            "replay/uses_1": 1 / 3,
            "replay/uses_2": 0,
            "replay/uses_3": 0,
            "replay/uses_4_or_more": 2 / 3,
            "replay/uses_mean": 14 / 3,
        }
    )
    for name in ("age", "sampled_age"):
        fractions = [metrics[f"replay/{name}_fraction_{age}"] for age in range(3)]
        assert fractions == pytest.approx([1 / 3] * 3)
        assert metrics[f"replay/{name}_mean"] == 1.0
    assert metrics["replay/sampled_age_max"] == 2
    assert metrics["replay/realized_utd"] == (10 + 12 + 6) / 6


def test_an_id_takes_four_bytes_and_a_prompt_counts_once() -> None:
    def memory(num_prompt: int, num_response: int, count: int = 8) -> float:
        samples = [
            replace(sample(0, index, num_response), prompt_token_ids=tuple(range(num_prompt)))
            for index in range(count)
        ]
        samples = [replace(s, policy_versions=np.zeros_like(s.policy_versions)) for s in samples]
        buffer = ReplayBuffer(1, seed=0)
        buffer.add(0, samples)
        assert buffer.metrics()["replay/memory_bytes"] == buffer.memory_bytes
        return buffer.memory_bytes

    assert memory(1100, 5) - memory(100, 5) == 1000 * 4
    # Id, behaviour and rollout log-prob; versions that do not change take nothing.
    assert memory(10, 1005) - memory(10, 5) == 8 * 1000 * 12


def test_equal_logprobs_take_memory_once() -> None:
    samples = [sample(0, index, 1000) for index in range(4)]
    shared = [replace(s, rollout_logprobs=s.behavior_logprobs.copy()) for s in samples]
    memory = []
    for each in (samples, shared):
        buffer = ReplayBuffer(1, seed=0)
        buffer.add(0, each)
        memory.append(buffer.memory_bytes)
        resumed = ReplayBuffer(1, seed=0)
        resumed.load_state_dict(through_json_and_arrays(buffer.state_dict()))
        assert resumed.memory_bytes == buffer.memory_bytes
    assert memory[0] - memory[1] == 4 * 1000 * 4


def test_the_memory_limit_costs_the_oldest_iterations() -> None:
    measure = ReplayBuffer(1, seed=0)
    measure.add(0, batch(0, 10))
    one = measure.memory_bytes
    buffer = ReplayBuffer(4, seed=0, max_memory_bytes=2 * one + one // 2)
    for iteration in (0, 1):
        buffer.add(iteration, batch(iteration, 10))
    assert (len(buffer), buffer.metrics()["replay/evicted_early_iterations"]) == (20, 0)
    buffer.add(2, batch(2, 10))
    assert {s.iteration for s in draw_batch(buffer, 20)} == {1, 2}
    assert buffer.metrics()["replay/evicted_early_iterations"] == 1
    assert buffer.metrics()["replay/evicted_unused_fraction"] == 1.0
    buffer.add(3, batch(3, 24))  # needs the room of both
    assert {s.iteration for s in draw_batch(buffer, 24)} == {3}
    assert buffer.metrics()["replay/evicted_early_iterations"] == 3
    assert buffer.memory_bytes <= 2 * one + one // 2


def test_an_iteration_beyond_the_limit_is_refused_and_nothing_else_goes() -> None:
    measure = ReplayBuffer(1, seed=0)
    measure.add(1, batch(1, 50))
    needed = measure.memory_bytes
    buffer = ReplayBuffer(4, seed=0, max_memory_bytes=needed - 1)
    buffer.add(0, batch(0, 3))
    message = rf"max_memory_bytes: {needed - 1}; valid: at least {needed}, .* iteration 1 "
    with pytest.raises(ValueError, match=message):
        buffer.add(1, batch(1, 50))
    assert sorted(names(draw_batch(buffer, 3))) == names(batch(0, 3))
    ReplayBuffer(4, seed=0, max_memory_bytes=needed).add(1, batch(1, 50))


def test_what_the_caller_does_later_changes_nothing() -> None:
    given = sample(0, 1, 4)
    kept = replace(
        given,
        **{n: v.copy() for n, v in vars(given).items() if isinstance(v, np.ndarray)},
    )
    buffer = ReplayBuffer(1, seed=0)
    buffer.add(0, [given])
    for array in (given.behavior_logprobs, given.rollout_logprobs, given.policy_versions):
        array[:] = 7
    (drawn,) = draw_batch(buffer, 1)
    assert_same(drawn, kept)
    with pytest.raises(ValueError, match="read-only"):
        drawn.behavior_logprobs[:] = 7
    drawn.policy_versions[:] = 7
    (again,) = draw_batch(buffer, 1)
    assert_same(again, kept)


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    num_samples=st.integers(0, 7),
    lengths=st.integers(0, 4),
)
def test_resume_continues_to_the_bit(sizes: list[int], num_samples: int, lengths: int) -> None:
    buffer = ReplayBuffer(3, seed=1)
    for iteration, size in enumerate(sizes):
        buffer.add(iteration, [sample(iteration, i, (i + lengths) % 4) for i in range(size)])
        if len(buffer):
            draw_batch(buffer, num_samples)
    resumed = ReplayBuffer(3, seed=99)
    resumed.load_state_dict(through_json_and_arrays(buffer.state_dict()))
    assert resumed.metrics() == buffer.metrics()
    for iteration in (10, 11, 12):
        for each in (buffer, resumed):
            each.add(iteration, batch(iteration, 2))
        one, other = draw_batch(buffer, 9), draw_batch(resumed, 9)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
        assert resumed.metrics() == buffer.metrics()


def test_state_is_a_snapshot() -> None:
    buffer = ReplayBuffer(2, seed=0)
    buffer.add(0, batch(0, 5))
    state = buffer.state_dict()
    expected = names(draw_batch(buffer, 5))
    for _ in range(2):
        resumed = ReplayBuffer(2, seed=0)
        resumed.load_state_dict(state)
        assert names(draw_batch(resumed, 5)) == expected
        assert resumed.metrics()["replay/uses_mean"] == 1.0


def test_stored_logprobs_keep_their_bits() -> None:
    original = sample(0, 1, 4)
    odd = np.array([-0.0, -1e-45, -1.1754944e-38, -np.pi], dtype=np.float32)
    original = Trajectory(**{**vars(original), "behavior_logprobs": odd})
    buffer = ReplayBuffer(1, seed=0)
    buffer.add(0, [original])
    resumed = ReplayBuffer(1, seed=0)
    resumed.load_state_dict(through_json_and_arrays(buffer.state_dict()))
    for each in (buffer, resumed):
        (drawn,) = draw_batch(each, 1)
        assert drawn.behavior_logprobs.dtype == np.float32
        assert drawn.behavior_logprobs.tobytes() == odd.tobytes()


def test_what_the_buffer_refuses() -> None:
    with pytest.raises(ValueError, match="capacity_iterations: 0; valid: 1 or more"):
        ReplayBuffer(0, seed=0)
    buffer = ReplayBuffer(2, seed=0)
    with pytest.raises(ValueError, match="num_updates x size: 1 of 0 samples stored"):
        draw_batch(buffer, 1)
    assert draw_batch(buffer, 0) == []
    buffer.add(3, batch(3, 1))
    with pytest.raises(ValueError, match="iteration: 3; valid: above 3"):
        buffer.add(3, batch(3, 1))
    with pytest.raises(ValueError, match="sample 'i3-s000': iteration 3; valid: 4"):
        buffer.add(4, batch(3, 1))
    with pytest.raises(ValueError, match="sample 'i4-s000': id is taken"):
        buffer.add(4, batch(4, 1) * 2)
    assert len(buffer) == 1  # a refused batch leaves no trace
    good = sample(5, 0, 3)
    for name in ("behavior_logprobs", "rollout_logprobs", "policy_versions"):
        bad = replace(good, **{name: getattr(good, name)[:2]})
        with pytest.raises(ValueError, match=rf"'i5-s000': {name} has shape \(2,\); valid: \(3,\)"):
            buffer.add(5, [bad])
    assert len(buffer) == 1
    with pytest.raises(ValueError, match="max_memory_bytes: -1; valid: 0 or more"):
        ReplayBuffer(1, seed=0, max_memory_bytes=-1)
    with pytest.raises(ValueError, match="num_updates, size: 1, -1; valid: 0 or more"):
        draw_batch(buffer, -1)
    with pytest.raises(ValueError, match="capacity_iterations: 3; valid: 2, as in the saved run"):
        ReplayBuffer(3, seed=0).load_state_dict(buffer.state_dict())
