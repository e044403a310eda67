"""Samples for tests of the replay buffer, and what such tests compare them by."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

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
        policy_versions=iteration - np.arange(1, num_response + 1)[::-1] // 2,
        iteration=iteration,
    )


def batch(iteration: int, count: int) -> list[Trajectory]:
    return [sample(iteration, index) for index in range(count)]


def assert_same(one: Trajectory, other: Trajectory) -> None:
    """Equal to the bit, whatever holds the arrays."""
    for name, value in vars(one).items():
        expected = vars(other)[name]
        if isinstance(value, np.ndarray):
            assert value.dtype == expected.dtype, name
            assert value.tobytes() == expected.tobytes(), name
        else:
            assert (type(value), value) == (type(expected), expected), name


def names(trajectories: list[Trajectory]) -> list[str]:
    return [trajectory.sample_id for trajectory in trajectories]


def through_json_and_arrays(state: Any) -> Any:
    """What a checkpoint without pickle does: arrays by their bytes, all else as JSON."""
    if isinstance(state, np.ndarray):
        return np.frombuffer(state.tobytes(), dtype=state.dtype)
    if isinstance(state, dict):
        return {key: through_json_and_arrays(value) for key, value in state.items()}
    return json.loads(json.dumps(state))


def draw_batch(
    buffer: ReplayBuffer, num_samples: int, *, with_replacement: bool = False
) -> list[Trajectory]:
    """One mini-batch."""
    (drawn,) = buffer.mini_batches(1, num_samples, with_replacement=with_replacement)
    return drawn
