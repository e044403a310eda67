from __future__ import annotations

import io

import pytest

from r2vpo_megatron.observability.work_progress import WorkProgress


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_each_step_is_a_line() -> None:
    stream, clock = io.StringIO(), Clock()
    with WorkProgress({"a": 100, "b": 60}, {"a": 40}, stream, clock) as progress:
        clock.seconds += 10
        progress.advance({"a": 20}, {"a": "accuracy 0.500"})
        clock.seconds += 20
        progress.advance({"a": 40, "b": 20}, {"a": "accuracy 0.250", "b": "accuracy 1.000"})
        progress.message("one was odd")
        clock.seconds += 3600
        progress.advance({"b": 40}, {"b": "accuracy 0.750"})
    assert stream.getvalue().splitlines() == [
        # 20 in 10 s: 100 more in 50 s. What was done before does not count for the speed.
        "a 60/100 accuracy 0.500  all 60/160  0:00:50 left",
        # 80 in 30 s: 40 more in 15 s.
        "a 100/100 accuracy 0.250  b 20/60 accuracy 1.000  all 120/160  0:00:15 left",
        "one was odd",
        "b 60/60 accuracy 0.750  all 160/160  done",
    ]


def test_on_a_terminal_there_is_a_bar_for_each_part_and_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with WorkProgress({"aime24": 100, "amc23": 60}, {}, stream, clock) as progress:
        clock.seconds += 10
        progress.advance({"aime24": 20}, {"aime24": "accuracy 0.500"})
    shown = stream.getvalue()
    last = [line for line in shown.splitlines() if "/" in line][-3:]
    assert "aime24" in last[0] and "20/100" in last[0] and "accuracy 0.500" in last[0]
    assert "0:00:40 left" in last[0]  # 80 at 2 a second
    assert "amc23" in last[1] and "0/60" in last[1]
    assert "0:01:10 left" in last[1]  # after those 80, 60 more
    assert "all" in last[2] and "20/160" in last[2] and "0:01:10 left" in last[2]
