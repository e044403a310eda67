"""The replay buffer: eviction, uniform draws, accounting, resuming to the bit."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.records import Trajectory
from r2vpo_megatron.replay import ReplayBuffer


def sample(iteration: int, index: int, num_response: int = 2) -> Trajectory:
    generator = np.random.default_rng([iteration, index])
    logprobs = generator.normal(size=num_response).astype(np.float32)
    return Trajectory(
        sample_id=f"i{iteration}-s{index:03d}",
        group_id=f"g{index}",
        prompt_token_ids=(1, 2, index),
        response_token_ids=tuple(range(num_response)),
        behavior_logprobs=logprobs,
        rollout_logprobs=logprobs + np.float32(1e-3),
        reward=float(index % 2),
        advantage=0.1 * index,
        finish_reason="stop",
        policy_version=iteration,
        iteration=iteration,
    )


def batch(iteration: int, count: int) -> list[Trajectory]:
    return [sample(iteration, index) for index in range(count)]


def names(trajectories: list[Trajectory]) -> list[str]:
    return [trajectory.sample_id for trajectory in trajectories]


def test_oldest_iteration_is_evicted_first() -> None:
    buffer = ReplayBuffer(capacity_iterations=2, seed=0)
    for iteration, count in ((0, 3), (1, 2), (5, 4)):
        buffer.add(iteration, batch(iteration, count))
    assert sorted(names(buffer.sample(6))) == sorted(names(batch(1, 2) + batch(5, 4)))
    assert len(buffer) == 6


def test_draws_do_not_depend_on_the_order_of_completion() -> None:
    draws = []
    for order in (1, -1):
        buffer = ReplayBuffer(2, seed=3)
        buffer.add(0, batch(0, 20)[::order])
        draws.append(names(buffer.sample(10)))
    assert draws[0] == draws[1]
    other_seed = ReplayBuffer(2, seed=4)
    other_seed.add(0, batch(0, 20))
    assert names(other_seed.sample(10)) != draws[0]


@given(count=st.integers(1, 9), num_samples=st.integers(0, 40), seed=st.integers(0, 3))
def test_without_replacement_everyone_is_used_equally_often(
    count: int, num_samples: int, seed: int
) -> None:
    buffer = ReplayBuffer(1, seed)
    buffer.add(0, batch(0, count))
    uses = Counter(names(buffer.sample(num_samples)))
    per_sample = [uses[name] for name in names(batch(0, count))]
    assert sum(per_sample) == num_samples
    assert max(per_sample) - min(per_sample) <= 1


@pytest.mark.parametrize("with_replacement", [False, True])
def test_draws_are_uniform_over_samples_not_over_iterations(with_replacement: bool) -> None:
    buffer = ReplayBuffer(2, seed=0)
    buffer.add(0, batch(0, 9))
    buffer.add(1, batch(1, 1))
    uses: Counter[str] = Counter()
    for _ in range(4000):
        uses.update(names(buffer.sample(3, with_replacement=with_replacement)))
    # 1,200 expected of each; five standard deviations are 165 at most.
    assert all(abs(uses[name] - 1200) < 165 for name in names(batch(0, 9) + batch(1, 1)))


def test_with_replacement_repeats() -> None:
    buffer = ReplayBuffer(1, seed=0)
    buffer.add(0, batch(0, 2))
    counts = [len(set(names(buffer.sample(2, with_replacement=True)))) for _ in range(100)]
    assert {1, 2} == set(counts)


def test_steady_state_ages_and_uses() -> None:
    """FIFO 4 at UTD 2: ages 0..3 with mean 1.5, two uses in a sample's life."""
    buffer = ReplayBuffer(4, seed=0)
    ages = []
    for iteration in range(200):
        buffer.add(iteration, batch(iteration, 16))
        drawn = buffer.sample(32)
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
    buffer.sample(3)
    buffer.add(2, batch(2, 4))
    metrics = buffer.metrics()
    assert metrics["replay/size"] == 8
    assert metrics["replay/num_iterations"] == 2
    assert metrics["replay/age_mean"] == 1.0
    assert metrics["replay/uses_mean"] == 3 / 8
    assert metrics["replay/realized_utd"] == 3 / 8
    assert metrics["replay/sampled_age_mean"] == 0.0
    assert metrics["replay/evicted_unused_fraction"] == 0.0
    assert metrics["replay/memory_bytes"] > 8 * (2 * 2 * 4)
    buffer.add(3, [])
    metrics = buffer.metrics()
    assert metrics["replay/evicted_unused_fraction"] == 1 / 4
    assert metrics["replay/evicted_uses_mean"] == 3 / 4
    assert metrics["replay/age_mean"] == 1.0
    buffer.add(4, [])
    assert len(buffer) == 0
    assert buffer.metrics()["replay/evicted_unused_fraction"] == 5 / 8


def through_json_and_arrays(state: Any) -> Any:
    """What a checkpoint without pickle does: arrays by their bytes, all else as JSON."""
    if isinstance(state, np.ndarray):
        return np.frombuffer(state.tobytes(), dtype=state.dtype)
    if isinstance(state, dict):
        return {key: through_json_and_arrays(value) for key, value in state.items()}
    return json.loads(json.dumps(state))


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
            buffer.sample(num_samples)
    resumed = ReplayBuffer(3, seed=99)
    resumed.load_state_dict(through_json_and_arrays(buffer.state_dict()))
    assert resumed.metrics() == buffer.metrics()
    for iteration in (10, 11, 12):
        for each in (buffer, resumed):
            each.add(iteration, batch(iteration, 2))
        one, other = buffer.sample(9), resumed.sample(9)
        for a, b in zip(one, other, strict=True):
            assert a.behavior_logprobs.tobytes() == b.behavior_logprobs.tobytes()
            assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()
            arrays = {"behavior_logprobs": None, "rollout_logprobs": None}
            assert {**vars(a), **arrays} == {**vars(b), **arrays}
        assert resumed.metrics() == buffer.metrics()


def test_state_is_a_snapshot() -> None:
    buffer = ReplayBuffer(2, seed=0)
    buffer.add(0, batch(0, 5))
    state = buffer.state_dict()
    expected = names(buffer.sample(5))
    for _ in range(2):
        resumed = ReplayBuffer(2, seed=0)
        resumed.load_state_dict(state)
        assert names(resumed.sample(5)) == expected
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
        (drawn,) = each.sample(1)
        assert drawn.behavior_logprobs.dtype == np.float32
        assert drawn.behavior_logprobs.tobytes() == odd.tobytes()


def test_what_the_buffer_refuses() -> None:
    with pytest.raises(ValueError, match="capacity_iterations: 0; valid: 1 or more"):
        ReplayBuffer(0, seed=0)
    buffer = ReplayBuffer(2, seed=0)
    with pytest.raises(ValueError, match="num_samples: 1 of 0 stored"):
        buffer.sample(1)
    assert buffer.sample(0) == []
    buffer.add(3, batch(3, 1))
    with pytest.raises(ValueError, match="iteration: 3; valid: above 3"):
        buffer.add(3, batch(3, 1))
    with pytest.raises(ValueError, match="sample 'i3-s000': iteration 3; valid: 4"):
        buffer.add(4, batch(3, 1))
    with pytest.raises(ValueError, match="sample 'i4-s000': id is taken"):
        buffer.add(4, batch(4, 1) * 2)
    assert len(buffer) == 1  # a refused batch leaves no trace
    with pytest.raises(ValueError, match="capacity_iterations: 3; valid: 2, as in the saved run"):
        ReplayBuffer(3, seed=0).load_state_dict(buffer.state_dict())
