"""Does anything grow in a long asynchronous run? Resident memory of every process, and what stays.

The tiny recipe with rollout and learner side by side. All processes of the run are looked at while
it goes on; the slope of each one's resident memory is fitted by least squares over the iterations
after the warm-up. Afterwards no process and no shared memory of the run may be left.
Fails where a slope exceeds its limit, or something is left.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil

from r2vpo_megatron.observability import read_metrics

RECIPE = "recipes/tiny_cpu.py:r2vpo_off_policy_async"
LIMIT_BYTES = 1 << 20  # of growth per iteration
MARK = "R2VPO_LONG_RUN"
MIN_LOOKS = 10

# (process id, title) -> (iterations done, resident bytes) at each look
Samples = dict[tuple[int, str], list[tuple[int, int]]]


def marked(mark: str) -> list[psutil.Process]:
    """Live processes that have inherited the mark; a zombie has no environment any more."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def look(mark: str, metrics: Path, samples: Samples) -> int:
    """Note the resident memory of every process; the iterations done so far."""
    done = len(metrics.read_bytes().splitlines()) - 1 if metrics.exists() else -1
    for process in marked(mark):
        try:
            title = (process.cmdline() or [process.name()])[0].rpartition("/")[2]
            samples[process.pid, title].append((done, process.memory_info().rss))
        except (psutil.Error, OSError):
            continue
    return done


def zombies(of: psutil.Process) -> list[int]:
    """Descendants that have ended and that nobody has waited for."""
    try:
        children = of.children(recursive=True)
    except psutil.Error:
        return []
    return [child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE]


def slope(points: list[tuple[int, int]]) -> float:
    """Bytes per iteration, by least squares."""
    iterations, sizes = np.array(points, dtype=np.float64).T
    return float(np.polyfit(iterations, sizes, 1)[0])


def main() -> None:
    """Run, look, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=40, help="iterations that do not count")
    parser.add_argument("fields", nargs="*", help="further --section.field value, after --")
    options = parser.parse_args()
    mark, samples = uuid.uuid4().hex, defaultdict(list)
    segments = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as name:
        arguments = {
            "train.num-iterations": str(options.iterations),
            "evaluation.every-iterations": "0",
            "output.dir": name,
            "output.run-name": "run",
        }
        command = [sys.executable, "-m", "r2vpo_megatron.cli.train", RECIPE]
        command += [part for field, value in arguments.items() for part in (f"--{field}", value)]
        output = Path(name, "output.txt")
        with output.open("w") as file:
            run = subprocess.Popen(
                [*command, *options.fields],
                env={**os.environ, MARK: mark},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            driver, ended_unwaited = psutil.Process(run.pid), 0
            while run.poll() is None:
                look(mark, Path(name, "run", "metrics.jsonl"), samples)
                ended_unwaited = max(ended_unwaited, len(zombies(driver)))
                time.sleep(2)
        if run.returncode:
            raise SystemExit(f"the run ended with {run.returncode}:\n{output.read_text()}")
        records = read_metrics(Path(name, "run", "metrics.jsonl"))
    time.sleep(5)  # Ray's daemons go a moment after the driver
    left = [process.pid for process in marked(mark)]
    new_segments = sorted(set(os.listdir("/dev/shm")) - segments)

    seconds = sum(record["time/iteration_seconds"] for record in records[1:])
    print(f"{options.iterations} iterations in {seconds / 60:.1f} min")
    print(f"{'process':36}  {'looks':>5}  {'at first':>10}  {'at last':>10}  {'KiB/iteration':>13}")
    failed, num_fitted = False, 0
    for (_, title), points in sorted(samples.items(), key=lambda item: -item[1][-1][1]):
        counted = [point for point in points if point[0] >= options.warm_up]
        if len(counted) < MIN_LOOKS:
            continue
        num_fitted += 1
        growth = slope(counted)
        failed |= growth > LIMIT_BYTES
        print(
            f"{title[:36]:36}  {len(counted):5}  {counted[0][1] / 2**20:6.0f} MiB  "
            f"{counted[-1][1] / 2**20:6.0f} MiB  {growth / 1024:13.1f}"
        )
    print(
        f"limit {LIMIT_BYTES / 1024:.0f} KiB/iteration; left behind: {len(left)} processes, "
        f"{len(new_segments)} segments in /dev/shm; most zombies at a look: {ended_unwaited}"
    )
    if not num_fitted:
        raise SystemExit(f"too short: no process was looked at {MIN_LOOKS} times after the warm-up")
    if failed or left or new_segments:
        raise SystemExit("something grows, or something is left")


if __name__ == "__main__":
    main()
