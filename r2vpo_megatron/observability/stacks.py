"""Stacks and states of a run's processes on one node, also of those that hang or are stopped.

A process that has called `write_stacks_when_asked` writes the Python stacks of all its threads when
it gets STACK_SIGNAL. The handler is C code that runs at once (faulthandler): neither the GIL nor a
call into a library that does not return keeps it from that.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import psutil

from r2vpo_megatron.observability.heartbeat import (
    Beat,
    find_memory,
    name_of,
    open_memory,
    read_beat,
)

# Real-time, since SIGUSR1 and SIGUSR2 ask something of a run, and libraries use these, too.
STACK_SIGNAL = signal.SIGRTMIN + 10
STACK_SECONDS = 3.0  # for processes to write their stacks
_QUIET_SECONDS = 0.3  # without anything new: all is written
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class ProcessReport:
    """One process of a run.

    Attributes:
        name: "learner rank 3", "rollout engine"; of a child of it, also its own title.
        node: that it runs on.
        pid: process id on that node; 0: there is no such process.
        state: as psutil calls it, "running", "sleeping", "stopped", "disk-sleep"; "gone".
        beat: what it noted last; None where it notes nothing.
        stacks: of all its threads, or why there are none.
    """

    name: str
    node: str
    pid: int
    state: str
    beat: Beat | None
    stacks: str

    def __str__(self) -> str:
        """Who, where, in what state, doing what."""
        if not self.pid:
            return f"{self.name} ({self.state})"
        who = f"{self.name} (pid {self.pid} on {self.node}, {self.state})"
        return who if self.beat is None else f"{who}: {self.beat}"


def write_stacks_when_asked(descriptor: int | None = None) -> None:
    """Have this process write its stacks at each STACK_SIGNAL from now on.

    From a shell: `kill -s RTMIN+10 PID`. May be called any number of times.

    Args:
        descriptor: of a file; None: memory where `examine_processes` finds it.
    """
    if descriptor is None:
        known = find_memory(os.getpid(), "stacks")
        descriptor = open_memory("stacks") if known is None else int(known.name)
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True, chain=False)


def examine_processes(mark: str, node: str, seconds: float = STACK_SECONDS) -> list[ProcessReport]:
    """What a run's processes on this node are doing, ordered by name and process id.

    Processes that are stopped are woken, since they could not write their stacks otherwise: this is
    for a run that is to end. `state` is the one that they were found in.

    Args:
        mark: what the names that they gave their `Heartbeat` begin with, before a slash.
        node: name of this node, for the reports.
        seconds: that processes have to write their stacks.
    """
    found = []
    for process in psutil.process_iter():
        name = name_of(process.pid)
        if name is not None and name.startswith(f"{mark}/"):
            label = name.removeprefix(f"{mark}/")
            found.append(_look_at(process.pid, label, node))
            found += [
                _look_at(pid, f"{label}: {title}", node)
                for pid, title in _writing_descendants(process)
            ]
    stacks = _ask_for_stacks([report.pid for report in found], seconds)
    found = [
        replace(report, stacks=stacks[report.pid])
        for report in found
        if ": " not in report.name or report.state != "gone"  # a child that has ended was done
    ]
    return sorted(found, key=lambda report: (report.name, report.pid))


def _look_at(pid: int, name: str, node: str) -> ProcessReport:
    try:
        state = str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        state = "gone"
    return ProcessReport(name, node, pid, state, read_beat(pid), stacks="")


def _writing_descendants(process: psutil.Process) -> Iterable[tuple[int, str]]:
    """Processes that this one has started, of those that write stacks, with their names."""
    try:
        for child in process.children(recursive=True):
            if name_of(child.pid) is None and find_memory(child.pid, "stacks") is not None:
                yield child.pid, child.name()
    except psutil.NoSuchProcess:
        return  # it ended meanwhile


def _ask_for_stacks(pids: Iterable[int], seconds: float) -> dict[int, str]:
    """Process id -> what it wrote, or why it did not."""
    stacks = dict.fromkeys(pids, "(this process does not write stacks)")
    memories = {pid: path for pid in stacks if (path := find_memory(pid, "stacks")) is not None}
    before = {pid: _size(pid) for pid in memories}
    for pid in memories:
        try:
            os.kill(pid, STACK_SIGNAL)
            os.kill(pid, signal.SIGCONT)  # the handler comes before anything else in a woken one
        except ProcessLookupError:
            pass  # it ended meanwhile
    began = changed_at = time.monotonic()
    sizes = before
    while time.monotonic() - began < seconds:
        time.sleep(_LOOK_SECONDS)
        last, sizes = sizes, {pid: _size(pid) for pid in memories}
        if sizes != last:
            changed_at = time.monotonic()
        has_all = all(sizes[pid] > before[pid] for pid in memories)
        if has_all and time.monotonic() - changed_at > _QUIET_SECONDS:
            break
    for pid, path in memories.items():
        stacks[pid] = _read_from(str(path), before[pid]) or (
            f"(not written in {seconds:g} s: the process has ended, or the kernel keeps it)"
        )
    return stacks


def _size(pid: int) -> int:
    path = find_memory(pid, "stacks")
    try:
        return 0 if path is None else path.stat().st_size
    except OSError:
        return 0  # it ended meanwhile


def _read_from(path: str, start: int) -> str:
    try:
        with open(path, "rb") as memory:
            memory.seek(start)
            return memory.read().decode(errors="replace")
    except OSError:
        return ""  # it ended meanwhile
