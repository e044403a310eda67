"""Signals of a run: noted at once, acted upon where the run says, and at once when repeated."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from r2vpo_megatron.orchestration.interrupts import Interrupts, StopRequested, ignored_requests


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def interrupts(said: list[str]) -> Iterator[Interrupts]:
    with closing(Interrupts(600.0)) as interrupts, interrupts:
        interrupts.say = said.append
        yield interrupts


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_requests_are_noted_until_they_are_taken(interrupts: Interrupts) -> None:
    assert not interrupts.take_checkpoint_request() and not interrupts.take_export_request()
    send(signal.SIGUSR1)
    send(signal.SIGUSR1)
    assert not interrupts.take_export_request()
    assert interrupts.take_checkpoint_request() and not interrupts.take_checkpoint_request()
    send(signal.SIGUSR2)
    assert not interrupts.take_checkpoint_request()
    assert interrupts.take_export_request() and not interrupts.take_export_request()
    interrupts.raise_if_stopping()  # none of them asks for that


@pytest.mark.parametrize(
    ("number", "at_once"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_the_first_waits_for_a_safe_place_and_the_second_does_not(
    interrupts: Interrupts, said: list[str], number: int, at_once: type[BaseException]
) -> None:
    send(number)
    assert interrupts.stop_signal == number
    for _ in range(2):  # as often as is asked
        with pytest.raises(StopRequested):
            interrupts.raise_if_stopping()
    assert len(said) == 1  # once, and not from the handler
    assert signal.Signals(number).name in said[0] and "600 s" in said[0]
    with pytest.raises(at_once) as ended:
        send(number)
        time.sleep(30)
    if at_once is SystemExit:
        assert ended.value.code == 143  # type: ignore[attr-defined]


def test_the_end_of_the_grace_period_is_a_second_signal() -> None:
    with closing(Interrupts(0.2)) as interrupts, interrupts:
        start = time.monotonic()
        send(signal.SIGTERM)
        with pytest.raises(StopRequested):
            interrupts.raise_if_stopping()
        with pytest.raises(SystemExit):
            time.sleep(30)
        assert 0.2 <= time.monotonic() - start < 10


def test_handlers_of_before_come_back_and_the_grace_period_goes_on_until_all_is_closed() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with closing(Interrupts(0.3)) as interrupts:
            with interrupts:
                send(signal.SIGTERM)
                assert came == []
            deadline = time.monotonic() + 10
            while not came and time.monotonic() < deadline:  # of who closes what is left
                time.sleep(0.05)
            assert came == [signal.SIGTERM]
        with closing(Interrupts(0.3)) as interrupts:
            with interrupts:
                send(signal.SIGTERM)
            send(signal.SIGTERM)
            assert came == [signal.SIGTERM] * 2
        time.sleep(0.6)  # longer than the grace period: nothing is left to end
        assert came == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_requests_before_the_loop_end_nothing_and_leave_nothing_ignored() -> None:
    """A process that is started later would inherit an ignored signal, and could not trap it."""
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)]
    with ignored_requests():
        send(signal.SIGUSR1)
        send(signal.SIGUSR2)
    assert [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2)] == before
