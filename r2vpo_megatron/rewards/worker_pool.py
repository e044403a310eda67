"""A pool of isolated processes that judge whether two answers are equivalent.

The parent keeps the time: it kills a worker whose verdict takes too long, be it in a loop that
ignores signals, and has the template fork another (see `equivalence_worker`). Not
`multiprocessing`: its children are copies of a trainer with threads, or import the trainer's main
module, and its pipes carry pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r2vpo_megatron.rewards.result import Equivalence

WORKER_FILE = Path(__file__).with_name("equivalence_worker.py")
MEGABYTE = 1 << 20
DEFAULT_MAX_WORKERS = 8
START_LIMIT_SECONDS = 300.0  # importing sympy from a busy network disk
STOP_LIMIT_SECONDS = 10.0
PARTING_SECONDS = 0.05
MAX_LOST_WORKERS = 10  # in a row for one pair; beyond, something ends all that start
MAX_MESSAGE_BYTES = 1 << 16
# Replaced after so many verdicts: what sympy caches counts against the memory limit.
VERDICTS_PER_WORKER = 5000
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")


class WorkerStartError(RuntimeError):
    """The isolated workers cannot be started, so no verdict can be given."""


@dataclass
class _Worker:
    """One worker process and our end of its socket."""

    connection: socket.socket
    process_id: int
    template: _Template
    num_verdicts: int = 0
    cpu_seconds: float = 0.0  # used until its last verdict


@dataclass
class _Running:
    """A request that a worker is at."""

    worker: _Worker
    index: int
    deadline: float


@dataclass
class _Batch:
    """The state of one call of `judge`."""

    pairs: Sequence[tuple[str, str]]
    waiting: deque[int]  # indices of pairs
    running: dict[socket.socket, _Running] = field(default_factory=dict)
    verdicts: dict[int, Equivalence] = field(default_factory=dict)
    crashed: set[int] = field(default_factory=set)
    lost: Counter[int] = field(default_factory=Counter)  # workers that died through no pair's fault
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)


class _Template:
    """The process that forks the workers."""

    def __init__(self, memory_limit_bytes: int, cpu_limit_seconds: int) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "control": theirs.fileno(),
            "trainer_id": os.getpid(),
            "memory_limit_bytes": memory_limit_bytes,
            "cpu_limit_seconds": cpu_limit_seconds,
        }
        with theirs, self._start_errors():
            self.process = subprocess.Popen(
                # -B -s -P: writes no bytecode, sees no user site, puts no folder on the path.
                [sys.executable, "-B", "-s", "-P", str(WORKER_FILE), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=_worker_environment(),
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.control.settimeout(START_LIMIT_SECONDS)
        if self._receive_ready() != b"ready":
            self.process.kill()
            _, error = self.process.communicate()
            self.control.close()
            raise WorkerStartError(
                f"the workers of symbolic verdicts did not start: {error.decode()[-2000:].strip()}"
            )
        assert self.process.stderr is not None
        self.process.stderr.close()

    @contextlib.contextmanager
    def _start_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.control.close()
            raise WorkerStartError(
                f"the workers of symbolic verdicts did not start: {error}"
            ) from error

    def _receive_ready(self) -> bytes:
        try:
            return self.control.recv(MAX_MESSAGE_BYTES)
        except OSError:
            return b""

    def fork_worker(self) -> _Worker:
        """Raises OSError where the template is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self.control, [b'{"do": "fork"}'], [theirs.fileno()])
        ours.settimeout(START_LIMIT_SECONDS)
        hello = ours.recv(MAX_MESSAGE_BYTES)
        if not hello:
            ours.close()
            raise ConnectionResetError("the worker ended at once")
        return _Worker(ours, json.loads(hello)["pid"], self)

    def is_gone(self) -> bool:
        """Whether somebody ended it, which ends its workers; they may be a moment earlier."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PARTING_SECONDS)
        return self.process.poll() is not None

    def end_worker(self, worker: _Worker) -> None:
        """Kill it whatever it does; the template reaps it."""
        worker.connection.close()
        with contextlib.suppress(OSError):  # the template is gone, and its workers with it
            self.control.send(json.dumps({"do": "kill", "pid": worker.process_id}).encode())

    def close(self) -> None:
        """Ends template and workers, and waits until they are gone."""
        self.control.close()
        try:
            self.process.wait(STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class WorkerPool:
    """Judges pairs in isolated processes, from any number of threads at once.

    Starts with the first pair. Belongs to the process that made it: a fork makes its own.

    Args:
        num_workers: Processes; by default one a CPU, at most 8.
        limit_seconds: Wall time of one verdict; then its worker is killed.
        memory_limit_bytes: Address space of one worker.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        limit_seconds: float = 2.0,
        memory_limit_bytes: int = 1024 * MEGABYTE,
    ) -> None:
        if num_workers is not None and num_workers < 1:
            raise ValueError(f"num_workers = {num_workers}: must be at least 1")
        self.num_workers = num_workers or min(len(os.sched_getaffinity(0)), DEFAULT_MAX_WORKERS)
        self.limit_seconds = limit_seconds
        # "verdicts", "worker_starts", each of FAILURES, and "unreadable": one side is no formula.
        self.counts: Counter[str] = Counter()
        self._memory_limit_bytes = memory_limit_bytes
        self._owner_id = os.getpid()
        self._changed = threading.Condition()
        self._idle: list[_Worker] = []
        self._num_started = 0
        self._templates: list[_Template] = []  # none or one; a list that the finalizer can hold
        self._finalizer = weakref.finalize(self, _close_templates, self._templates, os.getpid())

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes. A later `judge` starts new ones."""
        with self._changed:
            for worker in self._idle:
                worker.connection.close()
            self._idle.clear()
            self._num_started = 0
            _close_templates(self._templates, self._owner_id)
            self._changed.notify_all()

    def process_ids(self) -> list[int]:
        """Of the template, then of the workers that wait for work; empty before the first pair."""
        with self._changed:
            templates = [template.process.pid for template in self._templates]
            return templates + [worker.process_id for worker in self._idle]

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Equivalence]:
        """Verdicts on (prediction, gold) pairs, in their order.

        A pair whose worker died of itself gets a second one, as the kernel may have picked that
        worker to free memory.

        Raises:
            WorkerStartError: the workers cannot be started at all.
            RuntimeError: in a fork of the process that made this pool.
        """
        if os.getpid() != self._owner_id:
            raise RuntimeError(
                f"the pool belongs to process {self._owner_id}; {os.getpid()} needs its own"
            )
        batch = _Batch(pairs, deque(range(len(pairs))))
        try:
            while batch.waiting or batch.running:
                while batch.waiting and (worker := self._take_worker(wait=not batch.running)):
                    self._send(worker, batch)
                self._collect(batch)
        finally:
            for request in batch.running.values():  # only after an exception, such as Ctrl-C
                self._discard(request.worker)
            batch.selector.close()
        return [batch.verdicts[index] for index in range(len(pairs))]

    def _send(self, worker: _Worker, batch: _Batch) -> None:
        index = batch.waiting.popleft()
        prediction, gold = batch.pairs[index]
        message = json.dumps({"prediction": prediction, "gold": gold}).encode()
        deadline = time.monotonic() + self.limit_seconds
        try:
            worker.connection.send(message)
        except OSError:  # it died while it was idle, which says nothing about this pair
            self._discard(worker)
            batch.waiting.appendleft(index)
            _count_lost(index, batch)
            return
        batch.running[worker.connection] = _Running(worker, index, deadline)
        batch.selector.register(worker.connection, selectors.EVENT_READ)

    def _collect(self, batch: _Batch) -> None:
        """Wait for a reply or the first deadline, and take whatever is there then."""
        if not batch.running:
            return
        first = min(request.deadline for request in batch.running.values())
        selected = batch.selector.select(max(first - time.monotonic(), 0.0))
        ready = {key.fileobj for key, _ in selected}
        now = time.monotonic()
        for connection, request in tuple(batch.running.items()):
            if connection in ready:
                verdict = self._receive(request.worker)
            elif now >= request.deadline:
                # Starved of CPU it would have been a verdict: not to be believed next time.
                used = _cpu_seconds(request.worker.process_id) - request.worker.cpu_seconds
                verdict = Equivalence(False, "timeout", used >= self.limit_seconds / 2)
            else:
                continue
            del batch.running[connection]
            batch.selector.unregister(connection)
            if verdict.failure:
                self._discard(request.worker)
            else:
                self._give_back(request.worker)
            if verdict.failure == "crash" and self._is_worth_another(request, batch):
                batch.waiting.append(request.index)
            else:
                batch.verdicts[request.index] = verdict
                self._count("verdicts", verdict.failure)

    @staticmethod
    def _is_worth_another(request: _Running, batch: _Batch) -> bool:
        if request.worker.template.is_gone():
            _count_lost(request.index, batch)
            return True
        is_first = request.index not in batch.crashed
        batch.crashed.add(request.index)
        return is_first

    def _receive(self, worker: _Worker) -> Equivalence:
        try:
            message = worker.connection.recv(MAX_MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            return Equivalence(False, "crash", is_lasting=False)
        reply = json.loads(message)
        worker.cpu_seconds = reply["cpu_seconds"]
        if "unreadable" in reply:
            self._count("unreadable")
        return Equivalence(reply.get("equal", False), reply.get("failure", ""))

    def _count(self, *names: str) -> None:
        with self._changed:
            self.counts.update(name for name in names if name)

    def _take_worker(self, *, wait: bool) -> _Worker | None:
        """An idle worker or a new one; None where all are busy and the caller may not wait."""
        with self._changed:
            while not self._idle and self._num_started >= self.num_workers:
                if not wait:
                    return None
                self._changed.wait()
            if self._idle:
                return self._idle.pop()
            self._num_started += 1
        try:
            return self._fork_worker()
        except BaseException:
            with self._changed:
                self._num_started -= 1
                self._changed.notify()
            raise

    def _fork_worker(self) -> _Worker:
        with self._changed:
            self.counts["worker_starts"] += 1
            for attempt in range(2):
                if not self._templates:
                    self._templates.append(
                        _Template(self._memory_limit_bytes, 2 * round(self.limit_seconds) + 1)
                    )
                try:
                    return self._templates[0].fork_worker()
                except OSError as error:  # somebody killed the template: one new one
                    _close_templates(self._templates, self._owner_id)
                    if attempt:
                        raise WorkerStartError(f"the workers end at once: {error}") from error
        raise AssertionError("unreachable")

    def _give_back(self, worker: _Worker) -> None:
        worker.num_verdicts += 1
        if worker.num_verdicts >= VERDICTS_PER_WORKER:
            self._discard(worker)
            return
        with self._changed:
            self._idle.append(worker)
            self._changed.notify()

    def _discard(self, worker: _Worker) -> None:
        with self._changed:
            worker.template.end_worker(worker)
            self._num_started = max(self._num_started - 1, 0)  # 0 after `close` meanwhile
            self._changed.notify()


def _count_lost(index: int, batch: _Batch) -> None:
    batch.lost[index] += 1
    if batch.lost[index] > MAX_LOST_WORKERS:
        raise WorkerStartError(
            f"{batch.lost[index]} workers in a row were ended from outside before they gave a "
            f"verdict; see the kernel's log for processes that were killed to free memory"
        )


def _close_templates(templates: list[_Template], owner_id: int) -> None:
    """Also called at the end of the interpreter; a fork must not end its parent's workers."""
    if os.getpid() == owner_id:
        while templates:
            templates.pop().close()


def _worker_environment() -> dict[str, str]:
    """No secrets or settings of the trainer; its modules; the same order of hashes each time."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path if folder)
    return kept | {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}


def _cpu_seconds(process_id: int) -> float:
    """CPU time of a process so far; 0 where it cannot be told."""
    try:
        text = Path(f"/proc/{process_id}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))
