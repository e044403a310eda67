"""How long the stages of an iteration take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class StageTimers:
    """Adds up the wall-clock time of named stages.

    Args:
        clock: Monotonic clock, in seconds.
        on_enter: Called with a stage's name when it begins; shows a person what goes on.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        on_enter: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._clock = clock
        self.on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self._running: tuple[str, float] | None = None
        self._started = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with`; a stage entered again adds to itself, a failed one counts."""
        self.on_enter(name)
        start = self._clock()
        self._running = name, start
        try:
            yield
        finally:
            self._running = None
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """Seconds per stage as `time/<stage>_seconds`, and of everything since the last reset.

        The total, `time/iteration_seconds`, includes what no stage covers.
        """
        now = self._clock()
        result = {f"time/{name}_seconds": value for name, value in self._seconds.items()}
        result["time/iteration_seconds"] = now - self._started
        if reset:
            self.restart()
        return result

    def restart(self) -> None:
        """Forget what was measured."""
        self._seconds.clear()
        self._started = self._clock()

    def state_dict(self) -> dict[str, Any]:
        """JSON values: what was measured until now, also of the stage that is under way."""
        now, seconds = self._clock(), dict(self._seconds)
        if self._running is not None:
            name, start = self._running
            seconds[name] = seconds.get(name, 0.0) + now - start
        return {"stages": seconds, "all": now - self._started}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on adding to what `state_dict` gave; time in between does not count."""
        self._seconds = dict(state["stages"])
        self._started = self._clock() - state["all"]
