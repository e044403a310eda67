"""The line that tells a person how the run goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner

from r2vpo_megatron.observability import metric_names

# Label, metric, format. Evaluation happens only now and then: its last value stays.
_FIELDS = (
    ("reward", metric_names.REWARD_MEAN, ".3f"),
    ("held-out", metric_names.EVALUATION_ACCURACY, ".3f"),
    ("length", metric_names.RESPONSE_TOKENS_MEAN, ".1f"),
    ("ratio m2", metric_names.RATIO_SECOND_MOMENT, ".2e"),
    ("lambda", metric_names.RATIO_PENALTY, ".3g"),
    ("tokens/s", metric_names.TOKENS_PER_SECOND, ",.0f"),
)


class ProgressLine:
    """One line that changes in place on a terminal; one line per iteration anywhere else.

    Args:
        num_iterations: Iterations of the whole run.
        start_iteration: Iterations done before this process began (a resumed run).
        stream: Where to write, standard output by default.
        clock: Monotonic clock, in seconds.
    """

    def __init__(
        self,
        num_iterations: int,
        start_iteration: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_iterations = num_iterations
        self._start_iteration = start_iteration
        self._clock = clock
        self._started = clock()
        self._latest: dict[str, Any] = {}
        self._stream = stream if stream is not None else sys.stdout
        self._line = f"iteration {start_iteration}/{num_iterations}"
        self._spinner = Spinner("dots", text=self._line)
        self._live: Live | None = None
        if self._stream.isatty():
            console = Console(file=self._stream, highlight=False)
            self._live = Live(self._spinner, console=console, refresh_per_second=8)
            self._live.start()

    def update(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Show an iteration that is done.

        Args:
            iteration: Iterations done so far, this one included.
            metrics: The iteration's record; the line reads the names in `metric_names` from it.
        """
        self._latest.update(metrics)
        self._line = self._format(iteration)
        if self._live is None:
            self._print(self._line)
        else:
            self._spinner.update(text=self._line)

    def stage(self, name: str) -> None:
        """Say on a terminal what goes on now; elsewhere that would be noise."""
        if self._live is not None:
            self._spinner.update(text=f"{self._line}  ({name})")

    def message(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._live is None:
            self._print(text)
        else:
            self._live.console.print(text, markup=False)

    def close(self) -> None:
        """Leave the last line standing and give the terminal back."""
        if self._live is not None:
            self._live.update(self._line, refresh=True)
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _format(self, iteration: int) -> str:
        parts = [f"iteration {iteration}/{self._num_iterations}"]
        for label, name, spec in _FIELDS:
            value = self._latest.get(name)
            parts.append(f"{label} {'-' if value is None else format(value, spec)}")
        parts.append(self._format_time_left(iteration))
        return "  ".join(parts)

    def _format_time_left(self, iteration: int) -> str:
        done = iteration - self._start_iteration
        if done <= 0:
            return "- left"
        seconds_per_iteration = (self._clock() - self._started) / done
        seconds_left = seconds_per_iteration * (self._num_iterations - iteration)
        return f"{timedelta(seconds=round(seconds_left))} left"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
