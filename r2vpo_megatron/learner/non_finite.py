"""An update that was refused because something in it is not finite, and whose fault it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from r2vpo_megatron.parallel.state import ParallelState
from r2vpo_megatron.rl.statistics import MicroBatchStatistics


class NonFiniteUpdate(FloatingPointError):
    """No weight, optimizer state or count was changed, on any rank.

    Attributes:
        reason: what is not finite.
        sample_ids: the samples at fault, sorted; where they cannot be told apart, all of the
            update.
    """

    def __init__(self, reason: str, sample_ids: Sequence[str]) -> None:
        super().__init__(f"{reason} in samples {', '.join(sample_ids)}")
        self.reason = reason
        self.sample_ids = tuple(sample_ids)


def samples_at_fault(
    kept: Sequence[MicroBatchStatistics], state: ParallelState, *, all_of_them: bool = False
) -> list[str]:
    """Samples with a token whose log-probs, advantage or loss is not finite, sorted.

    Collective: every rank must call.

    Args:
        kept: on the last stage, of this rank's micro-batches.
        state: the ranks' layout.
        all_of_them: every sample of the update instead.
    """
    own: set[str] = set()
    if state.is_last_stage:
        for statistics in kept:
            flags = statistics.non_finite.tolist()
            own |= set(_chosen(statistics.sample_ids, flags, all_of_them))
    found: list[Any] = [None] * state.world_size
    dist.all_gather_object(found, own)
    return sorted(set().union(*found))


def _chosen(names: Sequence[str], flags: Sequence[float], all_of_them: bool) -> Iterable[str]:
    return (name for name, is_bad in zip(names, flags, strict=True) if is_bad or all_of_them)
