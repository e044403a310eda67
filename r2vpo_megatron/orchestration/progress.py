"""How far a run has come: what a checkpoint says beside the states of the run's parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from r2vpo_megatron.checkpoint.position import Position
from r2vpo_megatron.orchestration.iteration_metrics import Metrics


def is_due(iteration: int, every: int) -> bool:
    """Whether what is done every so many iterations, never for 0, is done after this one."""
    return every > 0 and iteration % every == 0


@dataclass
class Progress:
    """Where in the loop a run stands.

    Attributes:
        iteration: that is worked on, 1, 2, ...
        collected: metrics of its rollout, once that is in the replay buffer; before, None.
        undrawn: state of the replay buffer before the iteration's mini-batches were drawn: drawn
            again from there, they are the same.
        num_mini_batches: that have been learned from.
        updates: metrics of the updates that were made on them.
    """

    iteration: int = 1
    collected: dict[str, Any] | None = None
    undrawn: dict[str, Any] | None = None
    num_mini_batches: int = 0
    updates: list[Metrics] = field(default_factory=list)

    @property
    def position(self) -> Position:
        """What a checkpoint of this place is named by."""
        return Position(self.iteration - 1, self.num_mini_batches)

    def begin_next(self) -> None:
        """The iteration is complete."""
        self.iteration += 1
        self.collected, self.undrawn = None, None
        self.num_mini_batches, self.updates = 0, []

    def state_dict(self) -> dict[str, Any]:
        """All but `undrawn`, which a checkpoint has as the buffer's state."""
        return {
            "iteration": self.iteration,
            "collected": self.collected,
            "num_mini_batches": self.num_mini_batches,
            "updates": list(self.updates),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where `state_dict` was taken."""
        self.iteration = state["iteration"]
        self.collected = state["collected"]
        self.undrawn = None
        self.num_mini_batches = state["num_mini_batches"]
        self.updates = list(state["updates"])
