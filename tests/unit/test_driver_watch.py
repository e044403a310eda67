"""The driver's own deadline."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from r2vpo_megatron.orchestration.cluster import NoAnswer
from r2vpo_megatron.orchestration.driver_watch import DriverWatch


def test_a_driver_that_does_nothing_is_ended_with_the_stages_name() -> None:
    start = time.monotonic()
    cause = "collect: the driver itself has done nothing for 0.4 s in test_a_driver_.*watch.py:"
    with pytest.raises(NoAnswer, match=cause), DriverWatch(0.4) as watch:
        watch.beat("collect")
        time.sleep(30)
    assert 0.3 < time.monotonic() - start < 10


def test_beats_keep_it_going_and_nothing_outlives_the_block() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with DriverWatch(1.0) as watch:
        for _ in range(30):
            time.sleep(0.05)
            watch.beat()
    assert signal.getsignal(signal.SIGALRM) == before
    assert not any(thread.name == "driver watch" for thread in threading.enumerate())
    time.sleep(1.2)  # longer than its deadline


def test_a_lock_that_is_never_given_back_is_no_excuse() -> None:
    """Waits of Python's own give way to the signal."""
    lock = threading.Lock()
    lock.acquire()
    with pytest.raises(NoAnswer), DriverWatch(0.3):
        lock.acquire()
