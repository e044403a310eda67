"""How long the stages of an iteration take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
        self._on_enter = on_enter
        self._seconds: dict[str, float] = {}
        self._started = clock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with`; a stage entered again adds to itself, a failed one counts."""
        self._on_enter(name)
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def metrics(self, reset: bool = True) -> dict[str, float]:
        """Seconds per stage as `time/<stage>_seconds`, and of everything since the last reset.

        The total, `time/iteration_seconds`, includes what no stage covers.
        """
        now = self._clock()
        result = {f"time/{name}_seconds": value for name, value in self._seconds.items()}
        result["time/iteration_seconds"] = now - self._started
        if reset:
            self._seconds.clear()
            self._started = now
        return result
