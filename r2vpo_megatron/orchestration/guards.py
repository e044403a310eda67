"""What becomes of updates that are not sound: some are skipped, a row of them ends the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r2vpo_megatron.config import GuardConfig
from r2vpo_megatron.records import Trajectory, UpdateResult

SKIPPED_FILE = "skipped_updates.jsonl"


class UpdateGuard:
    """Looks at every update's result.

    Args:
        config: the limits.
        run_dir: where skipped updates are written down.

    Attributes:
        num_updates: seen since the run began, skipped ones among them.
        on_alarm: is told of what is beyond a limit, in a line; once an iteration for each limit.
    """

    def __init__(self, config: GuardConfig, run_dir: Path) -> None:
        self._config, self._path = config, run_dir / SKIPPED_FILE
        self.num_updates = 0
        self.on_alarm: Callable[[str], None] = lambda line: None
        self._num_in_a_row = 0
        self._num_skipped = 0  # and alarms: since `metrics`
        self._alarms: set[str] = set()

    def accept(
        self, result: UpdateResult, mini_batch: Sequence[Trajectory], iteration: int
    ) -> bool:
        """Whether the update was made; if it was not, it has been written down.

        Args:
            result: of the learner.
            mini_batch: that it was to learn from.
            iteration: that it belongs to.

        Raises:
            RuntimeError: more updates than `guard.max_skipped_updates` were skipped in a row.
        """
        self.num_updates += 1
        if result.is_made:
            self._num_in_a_row = 0
            self._watch(result.metrics, iteration)
            return True
        self._num_in_a_row += 1
        self._num_skipped += 1
        self._write_down(result, mini_batch, iteration)
        names = ", ".join(result.sample_ids)
        limit = self._config.max_skipped_updates
        if self._num_in_a_row > limit:
            raise RuntimeError(
                f"updates skipped in a row: {self._num_in_a_row} (guard.max_skipped_updates = "
                f"{limit}); in the last, {result.fault} in samples {names}; see {self._path}"
            )
        self.on_alarm(
            f"iteration {iteration}: update {self.num_updates} was skipped on all ranks: "
            f"{result.fault} in samples {names}"
        )
        return False

    def metrics(self) -> dict[str, float]:
        """Of the time since the last call: skipped updates, and limits that were passed."""
        values = {
            "guard/skipped_updates": float(self._num_skipped),
            "guard/alarms": float(len(self._alarms)),
        }
        self._num_skipped = 0
        self._alarms.clear()
        return values

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "num_updates": self.num_updates,
            "num_in_a_row": self._num_in_a_row,
            "num_skipped": self._num_skipped,
            "alarms": sorted(self._alarms),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.num_updates = state["num_updates"]
        self._num_in_a_row = state["num_in_a_row"]
        self._num_skipped = state["num_skipped"]
        self._alarms = set(state["alarms"])

    def _watch(self, metrics: Mapping[str, float], iteration: int) -> None:
        limits = {
            "gradient_norm_alarm": ("optimizer/gradient_norm", self._config.gradient_norm_alarm),
            "ratio_alarm": ("ratio/second_moment", self._config.ratio_alarm),
        }
        for name, (metric, limit) in limits.items():
            value = metrics.get(metric, 0.0)
            if limit > 0 and value > limit and name not in self._alarms:
                self._alarms.add(name)
                self.on_alarm(
                    f"iteration {iteration}: {metric} is {value:.3g} (alarm above {limit:g}; "
                    f"guard.{name})"
                )

    def _write_down(
        self, result: UpdateResult, mini_batch: Sequence[Trajectory], iteration: int
    ) -> None:
        by_name = {sample.sample_id: sample for sample in mini_batch}
        record = {
            "iteration": iteration,
            "update": self.num_updates,
            "fault": result.fault,
            "samples": [
                {
                    "sample_id": name,
                    "reward": repr(by_name[name].reward),  # JSON knows no "not a number"
                    "advantage": repr(by_name[name].advantage),
                    "num_response_tokens": len(by_name[name].response_token_ids),
                }
                for name in result.sample_ids
            ],
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
