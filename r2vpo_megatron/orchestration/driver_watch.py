"""The driver's own deadline: it, too, must come to its next step.

What ranks and engines are asked for has deadlines of its own. This one is for what the driver does
by itself: a reward of the user's that does not return, a file system that hangs.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from r2vpo_megatron.orchestration.cluster import NoAnswer

_TICKS = 20  # in which the deadline passes; one at most passes while the driver itself is stopped


class DriverWatch:
    """Raises NoAnswer in its block where no beat comes for too long; for the main thread.

    Args:
        seconds: from one beat to the next, at most.

    The error names the line that the main thread was at.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stage = "start"
        self._ticks_left = _TICKS
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="driver watch", daemon=True)

    def beat(self, stage: str | None = None) -> None:
        """Note that the driver goes on, in a new stage if one is named."""
        self._stage = stage or self._stage
        self._ticks_left = _TICKS

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGALRM, self._end)
        self._main_thread = threading.main_thread().ident
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()
        signal.signal(signal.SIGALRM, self._before)

    def _watch(self) -> None:
        while not self._is_over.wait(self._seconds / _TICKS):
            self._ticks_left -= 1
            if self._ticks_left <= 0 and self._main_thread is not None:
                signal.pthread_kill(self._main_thread, signal.SIGALRM)
                return

    def _end(self, number: int, frame: FrameType | None) -> None:
        where = ""
        if frame is not None:
            code = frame.f_code
            where = f" in {code.co_name} ({code.co_filename}:{frame.f_lineno})"
        raise NoAnswer(
            f"{self._stage}: the driver itself has done nothing for {self._seconds:g} s{where}"
        )
