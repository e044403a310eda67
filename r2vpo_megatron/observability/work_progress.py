"""How far a piece of work in several parts is: bars on a terminal, lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

_WHOLE = "all"


class WorkProgress:
    """Items done of each part and of the whole, and the time left; a context manager.

    The time left is computed here and not by rich, which forgets steps that are minutes apart.

    Args:
        totals: items of each part, by its name; parts are worked on in this order.
        done: items of each part that were done before this process began.
        stream: where to write, standard output by default.
        clock: monotonic, in seconds.
    """

    def __init__(
        self,
        totals: Mapping[str, int],
        done: Mapping[str, int],
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._totals = dict(totals)
        self._done = {name: done.get(name, 0) for name in totals}
        self._done_before = sum(self._done.values())
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._started = clock()
        self._notes = dict.fromkeys(totals, "")
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if self._stream.isatty():
            self._bars = self._make_bars()

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self, counts: Mapping[str, int], notes: Mapping[str, str]) -> None:
        """Count items that are done.

        Args:
            counts: new items of each part that has some.
            notes: what to show beside a part from now on.
        """
        for name, count in counts.items():
            self._done[name] += count
        self._notes.update(notes)
        if self._bars is None:
            print(self._line(counts), file=self._stream, flush=True)
        else:
            self._show()

    def message(self, text: str) -> None:
        """Print a line of its own, above the bars."""
        if self._bars is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bars.console.print(text, markup=False)

    def _make_bars(self) -> Progress:
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("{task.fields[left]}"),
            console=Console(file=self._stream, highlight=False),
        )
        for name in [*self._totals, _WHOLE]:
            self._tasks[name] = bars.add_task(name, total=1, note="", left="")
        self._bars = bars
        self._show()
        return bars

    def _show(self) -> None:
        assert self._bars is not None
        before = 0  # items of this part and of those that come first
        for name, total in self._totals.items():
            before += total - self._done[name]
            self._bars.update(
                self._tasks[name],
                completed=self._done[name],
                total=total,
                note=self._notes[name],
                left=self._format_left(before if self._done[name] < total else 0),
            )
        self._bars.update(
            self._tasks[_WHOLE],
            completed=sum(self._done.values()),
            total=sum(self._totals.values()),
            left=self._format_left(before),
        )

    def _line(self, counts: Mapping[str, int]) -> str:
        parts = [
            f"{name} {self._done[name]}/{self._totals[name]} {self._notes[name]}".rstrip()
            for name in counts
        ]
        total = sum(self._totals.values())
        done = sum(self._done.values())
        return "  ".join([*parts, f"{_WHOLE} {done}/{total}", self._format_left(total - done)])

    def _format_left(self, num_items: int) -> str:
        done_here = sum(self._done.values()) - self._done_before
        if num_items == 0:
            return "done"
        if done_here <= 0:
            return "- left"
        seconds = (self._clock() - self._started) / done_here * num_items
        return f"{timedelta(seconds=round(seconds))} left"
