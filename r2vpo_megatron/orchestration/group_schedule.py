"""Which groups are started when, and which make up an iteration. Plain bookkeeping.

With N prompts an iteration, synchronous rollout starts N groups once the iteration before has been
learned. What runs ahead of that is bounded twice:

    number      at most N x iterations_ahead groups more, and `carry_over_fraction` x N
    staleness   a group started under version v is learned by iteration v + 1 + max_staleness

Iteration k is learned from version k - 1, so no sample that is new to it is more than
max_staleness versions old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.records import Prompt


@dataclass(frozen=True)
class Group:
    """A prompt whose responses are under way.

    Attributes:
        number: of the prompt in the run, from 0.
        prompt: what is answered.
        sample_ids: of its G responses.
        latest_iteration: the last one that may learn from it.
    """

    number: int
    prompt: Prompt
    sample_ids: tuple[str, ...]
    latest_iteration: int


class GroupSchedule:
    """The groups under way, in the order of their prompts."""

    def __init__(self, config: RunConfig) -> None:
        """Nothing is under way yet."""
        self._size = config.train.prompts_per_iteration
        self._num_iterations = config.train.num_iterations
        self._ahead = config.iterations_ahead
        self._max_staleness = config.pipeline.max_staleness if config.mixes_versions else 0
        self._max_overtaken = math.ceil(config.pipeline.carry_over_fraction * self._size)
        self._under_way: dict[int, Group] = {}
        self._num_started = 0

    def num_startable(self, iteration: int) -> int:
        """How many groups more may be started while `iteration` is waited for and learned."""
        limit = self._size * (iteration + self._ahead) + self._max_overtaken
        limit = min(limit, self._size * self._num_iterations)
        return max(0, limit - self._num_started)  # a resumed run may be a shorter one

    def start(self, prompt: Prompt, sample_ids: tuple[str, ...], iteration: int) -> None:
        """Note a group that is started under the weights that `iteration` begins with."""
        latest = iteration + self._max_staleness
        group = Group(self._num_started, prompt, sample_ids, latest)
        self._under_way[group.number] = group
        self._num_started += 1

    @property
    def num_started(self) -> int:
        """Groups started since the run began: the number of the next one."""
        return self._num_started

    def choose(self, iteration: int, finished: Collection[str]) -> list[Group] | None:
        """The groups that make up `iteration`, or None while more must be waited for.

        They are the first N finished ones in the order of their prompts. At most
        `carry_over_fraction` x N unfinished groups are overtaken, and none that no later iteration
        may learn from. Without carry-over these are the N oldest, whatever finished first.

        Args:
            iteration: that is to be learned.
            finished: ids of all samples that came in and were not taken.
        """
        chosen: list[Group] = []
        num_overtaken = 0
        for group in self._under_way.values():
            if all(sample_id in finished for sample_id in group.sample_ids):
                chosen.append(group)
                if len(chosen) == self._size:
                    break
            elif group.latest_iteration <= iteration or num_overtaken == self._max_overtaken:
                return None
            else:
                num_overtaken += 1
        return chosen if len(chosen) == self._size else None

    def remove(self, groups: Collection[Group]) -> None:
        """Forget groups that have been learned from."""
        for group in groups:
            del self._under_way[group.number]

    @property
    def under_way(self) -> list[Group]:
        """Groups that were started and not learned from, in the order of their prompts."""
        return list(self._under_way.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain values; prompts and sample ids follow from the numbers."""
        latest = [[group.number, group.latest_iteration] for group in self._under_way.values()]
        return {"num_started": self._num_started, "under_way": latest}

    def load_state_dict(
        self, state: Mapping[str, Any], group_of: Callable[[int], tuple[Prompt, tuple[str, ...]]]
    ) -> None:
        """Continue where `state_dict` was taken.

        Args:
            state: of a run with the same prompts and sizes.
            group_of: prompt and sample ids of a group by its number.
        """
        self._num_started = state["num_started"]
        self._under_way = {
            number: Group(number, *group_of(number), latest)
            for number, latest in state["under_way"]
        }

    def metrics(self) -> Mapping[str, float]:
        """Groups under way once an iteration's own have been taken out."""
        return {"pipeline/groups_under_way": float(len(self._under_way))}
