"""Command lines run as a user runs them, and what must be gone when they end.

Each is a process of its own, marked by an environment variable that all its descendants inherit, so
that afterwards any process with that mark and any new shared-memory segment can be found.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
MARK = "R2VPO_TEST_MARK"
SMALL = {
    "train.num-iterations": "2",
    "train.prompts-per-iteration": "6",
    "train.responses-per-prompt": "4",
    "train.mini-batch-samples": "12",
    "rollout.max-response-tokens": "12",
    "rollout.max-num-seqs": "32",
    "rollout.kv-cache-bytes": str(16 << 20),
    "evaluation.num-prompts": "4",
    "evaluation.every-iterations": "1",
    "weight-sync.bucket-bytes": str(1 << 20),
}


@dataclass
class Run:
    """A command line run under way, and what must be gone when it ends."""

    command: list[str]
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    environment: dict[str, str] = field(default_factory=dict)  # beside this process's own

    def __post_init__(self) -> None:
        self.segments_before = set(os.listdir("/dev/shm"))
        self.output = (self.folder / f"output-{self.mark}.txt").open("w+")
        self.process = subprocess.Popen(
            self.command,
            cwd=REPO,
            env={**os.environ, **self.environment, MARK: self.mark},
            stdout=self.output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # as a terminal does: Ctrl-C reaches this group alone
        )

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert self.process.poll() is None, f"ended before {text!r}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s:\n{self.text()}"
            time.sleep(0.1)

    def workers(self, name: str) -> list[int]:
        """Process ids of the run's Ray actors of this class, by their titles."""
        return sorted(
            pid for pid, title in marked_processes(self.mark).items() if f"ray::{name}" in title
        )

    def clean_up(self) -> None:
        """End what is left of it, whatever a test made of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in marked_processes(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.output.close()

    def assert_nothing_left(self, seconds: float = 30.0) -> None:
        """Ray's daemons may take a moment to go once the driver has."""
        deadline = time.monotonic() + seconds
        while left := (
            list(marked_processes(self.mark).items()) + orphaned_segments(self.segments_before)
        ):
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.2)


def marked_processes(mark: str) -> dict[int, str]:
    """Live processes whose environment holds the mark, zombies not counted."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode()[:200]
        except OSError:
            continue  # it ended meanwhile, or is a zombie or another user's
    return found


def orphaned_segments(known: set[str]) -> list[str]:
    """New segments in /dev/shm that no live process has mapped; others' may come and go."""
    new = set(os.listdir("/dev/shm")) - known
    for maps in Path("/proc").glob("[0-9]*/maps") if new else ():
        try:
            text = maps.read_text()
        except OSError:
            continue  # it ended meanwhile
        new -= {name for name in new if f"/dev/shm/{name}\n" in text}
    return sorted(new)


def read_iterations(folder: Path) -> list[dict[str, Any]]:
    """The metrics of iterations 0, 1, ... of a finished run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
