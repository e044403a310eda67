"""Beats and stacks of other processes: of those at work, that hang, that are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from r2vpo_megatron.observability.heartbeat import (
    Beat,
    Heartbeat,
    find_memory,
    name_of,
    open_memory,
    read_beat,
)
from r2vpo_megatron.observability.stacks import examine_processes

MARK = f"test of {os.getpid()}"
ANNOUNCE = f"""
import ctypes, os, subprocess, sys, threading
from r2vpo_megatron.observability.heartbeat import Heartbeat
from r2vpo_megatron.observability.stacks import write_stacks_when_asked

write_stacks_when_asked()
heartbeat = Heartbeat({MARK!r} + "/" + sys.argv[1])

def say_ready():
    print("ready", flush=True)

def wait_without_end():
    say_ready()
    threading.Event().wait()

def hold_the_gil():
    libc = ctypes.PyDLL(None)  # whose calls keep the GIL
    say_ready()
    libc.read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process by its script, and wait until it says that it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start_one(script: str, name: str = "learner rank 0") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ANNOUNCE + script, name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_one
    for process in started:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def own_beat() -> tuple[str, int, int, bool]:
    beat = read_beat(os.getpid())
    assert beat is not None
    assert 0 <= beat.seconds_ago < 5
    return beat.stage, beat.num_stages, beat.step, beat.is_inside


@pytest.fixture
def heartbeat() -> Iterator[Heartbeat]:
    made = Heartbeat("this test")
    yield made
    found = find_memory(os.getpid(), "beats")
    assert found is not None
    os.close(int(found.name))


def test_stages_and_steps_are_counted(heartbeat):
    assert own_beat() == ("", 0, 0, False)
    with heartbeat.stage("update"):
        assert own_beat() == ("update", 1, 0, True)
        heartbeat.step(7)
        assert own_beat() == ("update", 1, 7, True)
    assert own_beat() == ("update", 1, 7, False)
    with pytest.raises(KeyError), heartbeat.stage("save"):
        assert own_beat() == ("save", 2, 0, True)
        raise KeyError
    assert own_beat() == ("save", 2, 0, False)


def test_taking_an_item_is_a_step(heartbeat):
    items = heartbeat.counted(["a", "b", "c"])
    steps = []
    for item in items:
        steps.append((item, own_beat()[2]))
    assert steps == [("a", 1), ("b", 2), ("c", 3)]
    assert items[-2] == "b"
    assert own_beat()[2] == 2
    assert items[1:] == ["b", "c"]
    assert len(items) == 3
    assert list(heartbeat.counted([])) == []


def test_a_beat_that_is_half_written_leaves_the_last_one(heartbeat):
    heartbeat.enter("update")
    heartbeat.step(1)
    heartbeat.step(2)
    assert own_beat()[2] == 2
    found = find_memory(os.getpid(), "beats")
    assert found is not None
    newest = heartbeat._sequence % 2 * 128
    with found.open("r+b") as memory:
        memory.seek(newest + 16)  # the step of that slot
        memory.write(b"\x09")
    assert own_beat()[2] == 1
    heartbeat.step(3)
    assert own_beat()[2] == 3


def test_the_wall_clock_is_not_asked(heartbeat, monkeypatch):
    heartbeat.enter("update")
    monkeypatch.setattr(time, "time", lambda: 1e12)
    heartbeat.step(4)
    assert own_beat()[2] == 4  # and it was less than 5 s ago


def test_what_a_forked_child_inherits_is_not_its_own(heartbeat):
    assert name_of(os.getpid()) == "this test"
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        assert name_of(child) is None
        assert read_beat(child) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert name_of(child) is None  # nor is there anything once it has gone


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="at most 209 bytes"):
        open_memory("beats", 210 * "x")


def test_beats_say_what_they_mean():
    assert str(Beat("update", 5, 3, True, 12.34)) == (
        "in update (its stage 5, step 3), last beat 12.3 s ago"
    )
    assert str(Beat("save", 1, 0, False, 1)) == "idle since save (its stage 1), last beat 1.0 s ago"
    assert str(Beat("", 0, 0, False, 2)) == "no stage entered, started 2.0 s ago"


def test_a_process_that_holds_the_gil_writes_its_stacks(start):
    process = start("heartbeat.enter('update'); heartbeat.step(3); hold_the_gil()")
    (report,) = examine_processes(MARK, "here")
    assert (report.name, report.node, report.pid) == ("learner rank 0", "here", process.pid)
    assert report.state == "sleeping"
    assert report.beat is not None
    assert (report.beat.stage, report.beat.step, report.beat.is_inside) == ("update", 3, True)
    assert "in hold_the_gil" in report.stacks


def test_all_threads_are_in_it_and_only_once(start):
    again = "write_stacks_when_asked();"  # where it already does
    start(f"{again}threading.Thread(target=threading.Event().wait).start(); wait_without_end()")
    examine_processes(MARK, "here")
    (report,) = examine_processes(MARK, "here")
    assert report.stacks.count("most recent call first") == 2
    assert report.stacks.count("in wait_without_end") == 1


def test_a_stopped_process_is_told_as_such_and_its_last_beat_read(start):
    process = start("heartbeat.enter('save'); wait_without_end()")
    os.kill(process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    (report,) = examine_processes(MARK, "here")
    assert report.state == "stopped"
    assert report.beat is not None
    assert report.beat.stage == "save"
    assert "in wait_without_end" in report.stacks


def test_others_processes_are_left_alone(start):
    """The signal would end a process that does not expect it."""
    start("wait_without_end()", "learner rank 1")
    start("wait_without_end()", "learner rank 0")
    child = (
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()']);"
        "wait_without_end()"
    )
    parent = start(child, "rollout engine")
    assert examine_processes("another run", "here") == []
    assert [report.name for report in examine_processes(MARK, "here")] == [
        "learner rank 0",
        "learner rank 1",
        "rollout engine",
    ]
    assert len(psutil.Process(parent.pid).children()) == 1


def test_children_that_write_stacks_are_found_with_their_parent(start):
    child = (
        "from r2vpo_megatron.observability.stacks import write_stacks_when_asked\n"
        "def wait_in_child():\n    print('ready', flush=True); threading.Event().wait()\n"
        "import threading; write_stacks_when_asked(); wait_in_child()"
    )
    start(f"subprocess.Popen([sys.executable, '-c', {child!r}]).wait()", "rollout engine")
    engine, worker = examine_processes(MARK, "here")
    assert engine.name == "rollout engine"
    assert worker.name.startswith("rollout engine: python")
    assert "in wait_in_child" in worker.stacks
    assert worker.beat is None
