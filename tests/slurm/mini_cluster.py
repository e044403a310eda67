"""A real Slurm of several nodes on this machine (mini_slurm.sh), as a test sees it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TOOL = Path(__file__).with_name("mini_slurm.sh")
NEEDED = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare", "perl")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def why_not() -> str:
    """What this machine lacks for a Slurm; empty: nothing."""
    if os.geteuid() != 0:
        return "a Slurm on one machine needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    packages = "slurm-wlm munge iproute2 util-linux procps perl-base"
    return f"{', '.join(missing)}: not found; apt-get install {packages}" if missing else ""


@dataclass
class MiniSlurm:
    """The cluster.

    Attributes:
        folder: its state; short, since sockets lie there.
        num_nodes: node1, node2, ...
    """

    folder: Path
    num_nodes: int
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "MINI_SLURM_DIR": str(self.folder),
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
        }

    def tool(self, *arguments: str) -> str:
        return self.run(str(TOOL), *arguments)

    def up(self) -> None:
        self.tool("up", str(self.num_nodes))

    def down(self) -> None:
        self.tool("down")

    def run(self, *command: str, **variables: str) -> str:
        """What a command prints; on this host, which is the login node."""
        result = subprocess.run(
            command,
            cwd=REPO,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, script: str, *options: str, **variables: str) -> Job:
        """By slurm/submit.sh, as a user does; what it prints goes to OUTPUT_DIR."""
        logs = Path(variables["OUTPUT_DIR"])
        job_id = self.run(
            "bash",
            "slurm/submit.sh",
            f"slurm/{script}",
            f"--output={logs}/%j.log",
            *options,
            **variables,
        ).strip()
        return Job(self, job_id, logs / f"{job_id}.log")

    def processes(self) -> dict[str, list[str]]:
        """Command lines on each node but those of the node itself (slurmd and its shell)."""
        found = {}
        for number in range(1, self.num_nodes + 1):
            listing = self.tool("exec", f"node{number}", "ps", "-eo", "stat=,args=")
            lines = [line.partition(" ") for line in listing.splitlines()]
            found[f"node{number}"] = [
                text.strip()
                for state, _, text in lines
                if not state.startswith("Z")  # its parent, a shell, may never reap it
                and not text.strip().startswith(("slurmd ", "sleep ", "ps "))
                and "mini_slurm.sh _node_init" not in text
            ]
        return found


@dataclass
class Job:
    """A job that was submitted."""

    cluster: MiniSlurm
    job_id: str
    log: Path

    def show(self) -> dict[str, str]:
        words = self.cluster.run("scontrol", "show", "job", self.job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text():
            state = self.show()["JobState"]
            assert state not in ENDED, f"{state} before {text!r}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s:\n{self.text()}"
            time.sleep(0.2)

    def wait_for_end(self, seconds: float) -> str:
        """Its last state."""
        deadline = time.monotonic() + seconds
        while (state := self.show()["JobState"]) not in ENDED:
            assert time.monotonic() < deadline, f"{state} after {seconds} s:\n{self.text()}"
            time.sleep(0.2)
        return state

    def signal(self, name: str) -> None:
        """Only to the job's script, as `--signal=B:` and pre-emption do."""
        self.cluster.run("scancel", f"--signal={name}", "--batch", self.job_id)

    def cancel(self) -> None:
        self.cluster.run("scancel", self.job_id)
