"""FIFO replay of the last iterations.

R2VPO's off-policy regime (arXiv 2601.03320, Algorithm 2) trains on samples of the last few
iterations. Each keeps the log-probs of the policy that sampled it; nothing here changes them.
Order never depends on which response finished first: samples are kept sorted by their id.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r2vpo_megatron.records import Trajectory
from r2vpo_megatron.replay.columns import from_columns, to_columns

_INT_OBJECT_BYTES = 28  # CPython's int below 2**30


@dataclass
class _Entry:
    trajectory: Trajectory
    num_uses: int = 0


@dataclass
class _Totals:
    """Sums over the life of the buffer."""

    added: int = 0
    drawn: int = 0
    evicted: int = 0
    evicted_unused: int = 0
    evicted_uses: int = 0


class ReplayBuffer:
    """The samples of the last `capacity_iterations` iterations."""

    def __init__(self, capacity_iterations: int, seed: int) -> None:
        """Start empty.

        Args:
            capacity_iterations: Iterations kept; 1 keeps only the newest.
            seed: Decides all draws, together with the sample ids; not negative.
        """
        if capacity_iterations < 1:
            raise ValueError(f"capacity_iterations: {capacity_iterations}; valid: 1 or more")
        if seed < 0:
            raise ValueError(f"seed: {seed}; valid: 0 or more")
        self._capacity = capacity_iterations
        self._generator = np.random.default_rng(seed)
        self._entries: dict[int, list[_Entry]] = {}  # by iteration, ascending
        self._totals = _Totals()
        self._last_draw_ages: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Number of samples stored."""
        return sum(len(entries) for entries in self._entries.values())

    def add(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """Store an iteration's samples and evict what is older than the capacity allows.

        Args:
            iteration: Number of the iteration, larger than all before.
            trajectories: What it generated, in any order; may be empty.

        Raises:
            ValueError: The iteration is not newer, a sample belongs to another one, or an id is
                taken.
        """
        newest = max(self._entries, default=None)
        if newest is not None and iteration <= newest:
            raise ValueError(f"iteration: {iteration}; valid: above {newest}, the newest stored")
        taken = {entry.trajectory.sample_id for entry in self._all_entries()}
        for sample in trajectories:
            if sample.iteration != iteration:
                raise ValueError(
                    f"sample {sample.sample_id!r}: iteration {sample.iteration}; valid: {iteration}"
                )
            if sample.sample_id in taken:
                raise ValueError(f"sample {sample.sample_id!r}: id is taken; valid: unique ids")
            taken.add(sample.sample_id)
        ordered = sorted(trajectories, key=lambda sample: sample.sample_id)
        self._entries[iteration] = [_Entry(sample) for sample in ordered]
        self._totals.added += len(ordered)
        while len(self._entries) > self._capacity:
            self._evict(min(self._entries))

    def sample(self, num_samples: int, *, with_replacement: bool = False) -> list[Trajectory]:
        """Draw uniformly over all samples stored, in random order.

        Without replacement, whoever asks for more than is stored gets every sample equally often,
        plus or minus one: the buffer is dealt out, reshuffled and dealt out again.

        Args:
            num_samples: How many to draw.
            with_replacement: Draw each independently instead.

        Raises:
            ValueError: `num_samples` is negative, or the buffer is empty and it is not 0.
        """
        entries = self._all_entries()
        if num_samples < 0 or (num_samples and not entries):
            raise ValueError(f"num_samples: {num_samples} of {len(entries)} stored; valid: 0")
        picks: list[int] = []
        if with_replacement and entries:
            picks = self._generator.integers(len(entries), size=num_samples).tolist()
        while len(picks) < num_samples:
            shuffled = self._generator.permutation(len(entries)).tolist()
            picks += shuffled[: num_samples - len(picks)]
        newest = max(self._entries, default=0)
        for pick in picks:
            entries[pick].num_uses += 1
        drawn = [entries[pick].trajectory for pick in picks]
        self._totals.drawn += len(drawn)
        self._last_draw_ages = tuple(newest - sample.iteration for sample in drawn)
        return drawn

    def metrics(self) -> dict[str, float]:
        """Return the accounting of uses.

        `size`, `num_iterations`, `memory_bytes` (estimate), `age_mean` and `uses_mean` are of what
        is stored; ages count iterations back from the newest. `sampled_age_mean` and
        `sampled_age_max` are of the last draw. `evicted_unused_fraction` and `evicted_uses_mean`
        (uses in a whole life) are of all that was evicted, `realized_utd` is samples drawn per
        sample added, since the start.
        """
        entries = self._all_entries()
        newest = max(self._entries, default=0)
        ages = [newest - entry.trajectory.iteration for entry in entries]
        totals = self._totals
        values = {
            "size": len(entries),
            "num_iterations": len(self._entries),
            "memory_bytes": _memory_bytes([entry.trajectory for entry in entries]),
            "age_mean": _ratio(sum(ages), len(ages)),
            "uses_mean": _ratio(sum(entry.num_uses for entry in entries), len(entries)),
            "sampled_age_mean": _ratio(sum(self._last_draw_ages), len(self._last_draw_ages)),
            "sampled_age_max": max(self._last_draw_ages, default=0),
            "evicted_unused_fraction": _ratio(totals.evicted_unused, totals.evicted),
            "evicted_uses_mean": _ratio(totals.evicted_uses, totals.evicted),
            "realized_utd": _ratio(totals.drawn, totals.added),
        }
        return {f"replay/{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all state as JSON values and numpy arrays: no pickle is needed to store it."""
        entries = self._all_entries()
        return {
            "capacity_iterations": self._capacity,
            "iterations": list(self._entries),
            "trajectories": to_columns([entry.trajectory for entry in entries]),
            "num_uses": [entry.num_uses for entry in entries],
            "generator": self._generator.bit_generator.state,
            "totals": dict(vars(self._totals)),
            "last_draw_ages": list(self._last_draw_ages),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken.

        Raises:
            ValueError: It was taken from a buffer of another capacity.
        """
        if state["capacity_iterations"] != self._capacity:
            raise ValueError(
                f"capacity_iterations: {self._capacity}; valid: "
                f"{state['capacity_iterations']}, as in the saved run"
            )
        self._entries = {int(iteration): [] for iteration in state["iterations"]}
        trajectories = from_columns(state["trajectories"])
        for trajectory, num_uses in zip(trajectories, state["num_uses"], strict=True):
            self._entries[trajectory.iteration].append(_Entry(trajectory, int(num_uses)))
        self._generator.bit_generator.state = state["generator"]
        self._totals = _Totals(**state["totals"])
        self._last_draw_ages = tuple(state["last_draw_ages"])

    def _all_entries(self) -> list[_Entry]:
        """Oldest iteration first, by sample id within one."""
        return [entry for entries in self._entries.values() for entry in entries]

    def _evict(self, iteration: int) -> None:
        entries = self._entries.pop(iteration)
        self._totals.evicted += len(entries)
        self._totals.evicted_uses += sum(entry.num_uses for entry in entries)
        self._totals.evicted_unused += sum(entry.num_uses == 0 for entry in entries)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _memory_bytes(trajectories: Sequence[Trajectory]) -> int:
    """Estimate the memory held; the prompt of a group is one object and counts once."""
    prompts = {id(sample.prompt_token_ids): sample.prompt_token_ids for sample in trajectories}
    responses = [sample.response_token_ids for sample in trajectories]
    ids = sum(
        sys.getsizeof(tokens) + _INT_OBJECT_BYTES * len(tokens)
        for tokens in [*prompts.values(), *responses]
    )
    arrays = sum(
        sample.behavior_logprobs.nbytes + sample.rollout_logprobs.nbytes for sample in trajectories
    )
    return ids + arrays
