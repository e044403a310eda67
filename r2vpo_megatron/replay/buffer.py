"""FIFO replay of the last iterations.

R2VPO's off-policy regime (arXiv 2601.03320, Algorithm 2) trains on samples of the last few
iterations. Each keeps the log-probs of the policy that sampled it; nothing here changes them.
Order never depends on which response finished first: samples are kept sorted by their id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r2vpo_megatron.records import IntArray, Trajectory
from r2vpo_megatron.replay.columns import TrajectoryColumns
from r2vpo_megatron.replay.draws import deal_out, draw_with_replacement

_MOST_USES = 4  # so many or more are one bin of the histogram


@dataclass(frozen=True)
class _Stored:
    """One iteration's samples, by sample id, and how often each was drawn."""

    columns: TrajectoryColumns
    num_uses: IntArray  # [S], counted up in place


@dataclass
class _Totals:
    """Sums over the life of the buffer, in samples unless named otherwise."""

    added: int = 0
    drawn: int = 0
    evicted: int = 0
    evicted_unused: int = 0
    evicted_uses: int = 0
    early_iterations: int = 0


class ReplayBuffer:
    """The samples of the last `capacity_iterations` iterations."""

    def __init__(self, capacity_iterations: int, seed: int, max_memory_bytes: int = 0) -> None:
        """Start empty.

        Args:
            capacity_iterations: Iterations kept; 1 keeps only the newest.
            seed: Decides all draws, together with the sample ids; not negative.
            max_memory_bytes: The oldest iterations go early where the samples take more; 0: no
                limit.
        """
        for name, value, minimum in (
            ("capacity_iterations", capacity_iterations, 1),
            ("seed", seed, 0),
            ("max_memory_bytes", max_memory_bytes, 0),
        ):
            if value < minimum:
                raise ValueError(f"{name}: {value}; valid: {minimum} or more")
        self._capacity = capacity_iterations
        self._max_memory_bytes = max_memory_bytes
        self._generator = np.random.default_rng(seed)
        self._iterations: dict[int, _Stored] = {}  # ascending
        self._totals = _Totals()
        self._drawn_by_age: IntArray = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        """Number of samples stored."""
        return sum(len(stored.columns) for stored in self._iterations.values())

    @property
    def memory_bytes(self) -> int:
        """Memory that the samples take, in bytes."""
        each = (stored.columns.num_bytes + stored.num_uses.nbytes for stored in self._all())
        return sum(each)

    def add(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        """Store an iteration's samples and evict what is older than the capacity allows.

        Under a memory limit the oldest iterations go early, but never the one that is added.

        Args:
            iteration: Number of the iteration, larger than all before.
            trajectories: What it generated, in any order; may be empty.

        Raises:
            ValueError: The iteration is not newer, a sample belongs to another one, an id is
                taken, arrays do not match a response, or the iteration by itself exceeds the
                memory limit. The buffer is then as it was.
        """
        self._check(iteration, trajectories)
        ordered = sorted(trajectories, key=lambda sample: sample.sample_id)
        columns = TrajectoryColumns.of(iteration, ordered)
        stored = _Stored(columns, np.zeros(len(ordered), dtype=np.int64))
        needed, limit = columns.num_bytes + stored.num_uses.nbytes, self._max_memory_bytes
        if limit and needed > limit:
            raise ValueError(
                f"max_memory_bytes: {limit}; valid: at least {needed}, which iteration {iteration} "
                "takes by itself, or 0 for no limit"
            )
        self._iterations[iteration] = stored
        self._totals.added += len(ordered)
        while len(self._iterations) > self._capacity:
            self._evict_oldest()
        while limit and self.memory_bytes > limit:
            self._evict_oldest()
            self._totals.early_iterations += 1

    def mini_batches(
        self, num_updates: int, size: int, *, with_replacement: bool = False
    ) -> Iterator[list[Trajectory]]:
        """Draw the samples of an iteration's updates uniformly over all samples stored.

        Everything is drawn and counted by the call. The trajectories of a mini-batch are made when
        it is its turn: those of all updates at once can take gigabytes.

        Args:
            num_updates: Mini-batches to draw.
            size: Samples of each.
            with_replacement: Draw each sample independently. Otherwise none is used twice, over all
                mini-batches, before every other was used once; and none occurs twice within a
                mini-batch unless that is larger than the buffer (`replay.draws.deal_out`).

        Raises:
            ValueError: A number is negative, or the buffer is empty and they are not 0.
        """
        num_stored, num_samples = len(self), num_updates * size
        if num_updates < 0 or size < 0:
            raise ValueError(f"num_updates, size: {num_updates}, {size}; valid: 0 or more")
        if num_samples and not num_stored:
            raise ValueError(f"num_updates x size: {num_samples} of 0 samples stored; valid: 0")
        draw = draw_with_replacement if with_replacement else deal_out
        picks = draw(self._generator, num_stored, num_updates, size)
        self._count(picks)
        # What is evicted meanwhile stays what was drawn.
        return _materialise(picks, [stored.columns for stored in self._all()])

    def metrics(self) -> dict[str, float]:
        """Return the accounting of uses, by names that begin with `replay/`.

        Of what is stored: `size`, `num_iterations`, `memory_bytes`, `age_mean`, `uses_mean` and
        the shares of it by age, `age_fraction_0` up to the capacity, and by uses so far, `uses_0`
        to `uses_4_or_more`. Ages count iterations back from the newest; the last share has what is
        older. Of the last draw: `sampled_age_mean`, `sampled_age_max` and
        `sampled_age_fraction_0`, ... Since the start: `evicted_unused_fraction` and
        `evicted_uses_mean` (uses in a whole life) of all that was evicted,
        `evicted_early_iterations` that the memory limit cost, and `realized_utd`, samples drawn per
        sample added.
        """
        ages, uses = self._ages(), self._uses()
        totals, drawn = self._totals, self._drawn_by_age
        values = {
            "size": len(self),
            "num_iterations": len(self._iterations),
            "memory_bytes": self.memory_bytes,
            "age_mean": _ratio(ages.sum(), len(ages)),
            "uses_mean": _ratio(uses.sum(), len(uses)),
            "sampled_age_mean": _ratio(float(drawn @ np.arange(len(drawn))), drawn.sum()),
            "sampled_age_max": np.flatnonzero(drawn).max(initial=0),
            "evicted_unused_fraction": _ratio(totals.evicted_unused, totals.evicted),
            "evicted_uses_mean": _ratio(totals.evicted_uses, totals.evicted),
            "evicted_early_iterations": totals.early_iterations,
            "realized_utd": _ratio(totals.drawn, totals.added),
        }
        by_use = _shares(np.bincount(uses), _MOST_USES + 1)
        values |= {f"uses_{uses}": share for uses, share in enumerate(by_use[:-1])}
        values[f"uses_{_MOST_USES}_or_more"] = by_use[-1]
        for name, counts in (("age", np.bincount(ages)), ("sampled_age", drawn)):
            shares = _shares(counts, self._capacity)
            values |= {f"{name}_fraction_{age}": share for age, share in enumerate(shares)}
        return {f"replay/{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all state as JSON values and numpy arrays: no pickle is needed to store it."""
        return {
            "capacity_iterations": self._capacity,
            "iterations": {
                str(iteration): {
                    "columns": stored.columns.state_dict(),
                    "num_uses": stored.num_uses.copy(),
                }
                for iteration, stored in self._iterations.items()
            },
            "generator": self._generator.bit_generator.state,
            "totals": dict(vars(self._totals)),
            "drawn_by_age": self._drawn_by_age.copy(),
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
        self._iterations = {
            int(iteration): _Stored(
                TrajectoryColumns.from_state_dict(stored["columns"]), stored["num_uses"].copy()
            )
            for iteration, stored in state["iterations"].items()
        }
        self._generator.bit_generator.state = state["generator"]
        self._totals = _Totals(**state["totals"])
        self._drawn_by_age = state["drawn_by_age"].copy()

    def _all(self) -> list[_Stored]:
        """Oldest iteration first, by sample id within one: the order that draws index."""
        return list(self._iterations.values())

    def _ages(self) -> IntArray:
        """[size] of the samples stored."""
        newest = max(self._iterations, default=0)
        ages = [newest - iteration for iteration in self._iterations]
        counts = [len(stored.columns) for stored in self._all()]
        return np.repeat(np.array(ages, dtype=np.int64), np.array(counts, dtype=np.int64))

    def _uses(self) -> IntArray:
        """[size] of the samples stored."""
        return np.concatenate([np.zeros(0, np.int64), *(stored.num_uses for stored in self._all())])

    def _check(self, iteration: int, trajectories: Sequence[Trajectory]) -> None:
        newest = max(self._iterations, default=None)
        if newest is not None and iteration <= newest:
            raise ValueError(f"iteration: {iteration}; valid: above {newest}, the newest stored")
        taken = {name for stored in self._all() for name in stored.columns.sample_ids}
        for sample in trajectories:
            if sample.iteration != iteration:
                raise ValueError(
                    f"sample {sample.sample_id!r}: iteration {sample.iteration}; valid: {iteration}"
                )
            if sample.sample_id in taken:
                raise ValueError(f"sample {sample.sample_id!r}: id is taken; valid: unique ids")
            taken.add(sample.sample_id)

    def _count(self, picks: IntArray) -> None:
        """Note a draw of the samples at these indices."""
        uses = np.bincount(picks.ravel(), minlength=len(self))
        self._totals.drawn += picks.size
        self._drawn_by_age = np.bincount(self._ages()[picks.ravel()], minlength=1)
        start = 0
        for stored in self._all():
            stored.num_uses[:] += uses[start : start + len(stored.columns)]
            start += len(stored.columns)

    def _evict_oldest(self) -> None:
        uses = self._iterations.pop(min(self._iterations)).num_uses
        self._totals.evicted += len(uses)
        self._totals.evicted_uses += int(uses.sum())
        self._totals.evicted_unused += int((uses == 0).sum())


def _materialise(
    picks: IntArray, stored: Sequence[TrajectoryColumns]
) -> Iterator[list[Trajectory]]:
    """Lists of the trajectories at `picks`, which index those of all columns end to end."""
    starts = np.cumsum([0, *(len(columns) for columns in stored)])
    for update in picks:
        numbers = np.searchsorted(starts, update, "right") - 1
        yield [
            stored[number].trajectory(pick - starts[number])
            for number, pick in zip(numbers.tolist(), update.tolist(), strict=True)
        ]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def _shares(counts: IntArray, num_bins: int) -> list[float]:
    """Fractions by value; the last bin has all values from its own on. Zeros where nothing is."""
    bins = [*counts[: num_bins - 1], counts[num_bins - 1 :].sum()]
    bins = [*bins[:-1], *[0] * (num_bins - len(bins)), bins[-1]]
    return [_ratio(count, counts.sum()) for count in bins]
