"""Signals that ask something of a run: noted when they come, acted upon where it is safe.

SIGUSR1           write a checkpoint and go on
SIGUSR2           write the weights in Hugging Face format and go on
SIGTERM, SIGINT   finish the update, write a checkpoint, end; a second one: end at once
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUESTS = (signal.SIGUSR1, signal.SIGUSR2)


class StopRequested(Exception):
    """A signal asks the run to end, and here it can be left."""


class Interrupts:
    """Takes the signals of this process while its block lasts; for the main thread.

    The grace period goes on after the block, for what is closed after it, until `close`.

    Args:
        grace_seconds: from the first signal that asks to stop until another one is sent, which
            ends the run at once.

    Attributes:
        say: is told what a signal will lead to, in a line.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.say: Callable[[str], None] = print
        self._grace_seconds = grace_seconds
        self._before: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}
        self._asked: set[int] = set()
        self._timer: threading.Timer | None = None
        self.stop_signal: int | None = None
        self._has_said = False

    def __enter__(self) -> Self:
        handlers = dict.fromkeys(REQUESTS, self._note) | dict.fromkeys(STOP_SIGNALS, self._stop)
        self._before = {number: signal.signal(number, to) for number, to in handlers.items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def close(self) -> None:
        """End the grace period: all is closed."""
        if self._timer is not None:
            self._timer.cancel()

    def take_checkpoint_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        return self._take(signal.SIGUSR1)

    def take_export_request(self) -> bool:
        """Whether weights in Hugging Face format were asked for since the last call."""
        return self._take(signal.SIGUSR2)

    def raise_if_stopping(self) -> None:
        """To be called where the run can be left.

        Raises:
            StopRequested: it should be.
        """
        if self.stop_signal is None:
            return
        if not self._has_said:  # not in the handler: the signal may have come amid a print
            self._has_said = True
            self.say(
                f"{signal.Signals(self.stop_signal).name}: a checkpoint is written, then the run "
                f"ends; a second one, or {self._grace_seconds:g} s, ends it at once"
            )
        raise StopRequested

    def _take(self, number: int) -> bool:
        is_asked = number in self._asked
        self._asked.discard(number)
        return is_asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked.add(number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal is not None:
            end_by(number)
        self.stop_signal = number
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        self._timer = threading.Timer(
            self._grace_seconds, signal.pthread_kill, (main_thread, number)
        )
        self._timer.daemon = True
        self._timer.start()


@contextmanager
def ignored_requests() -> Iterator[None]:
    """Survive requests that come where there is nothing to write; they end a process else."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in REQUESTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by(number: int) -> None:
    """Leave as a signal makes a process leave, by an exception, so that all is closed."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
