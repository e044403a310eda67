"""Rollout and learner in turn against side by side: wall clock, and accuracy over time.

The tiny model with one engine and one learner rank, each on a core of its own. First a run in turn
measures what an iteration of each side takes, and the number of updates per sample (UTD) is chosen
so that they take about the same. Then both pipelines make the same numbers of iterations, updates
and samples, seed by seed, one run at a time.

Wall clock is that of the iterations after the first two, evaluation taken out. The physical limit
is what the two sides would take if nothing had to wait: in turn, rollout + learner + push; side by
side, the longer of the two + push. Curves are held-out accuracy at temperature 1.
Fails where a run fails, or where side by side made other numbers of updates or samples.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil

from r2vpo_megatron.observability import read_metrics

RECIPE = "recipes/tiny_cpu.py:r2vpo_off_policy_async"
MODES = ("synchronous", "asynchronous")
NUM_SKIPPED = 2  # iterations: first batches are slower, and nothing is under way yet
TARGET = 1.7
CORES = {"ray::LearnerWorker": 0, "ray::RolloutWorker": 1}


@dataclass(frozen=True)
class Run:
    """One finished run."""

    mode: str
    seed: int
    records: list[dict[str, Any]]  # of iterations 0, 1, ...

    @property
    def timed(self) -> list[dict[str, Any]]:
        """The iterations that count."""
        return self.records[1 + NUM_SKIPPED :]

    def seconds(self, record: Mapping[str, Any]) -> float:
        """Of one iteration, without evaluation."""
        return float(record["time/iteration_seconds"] - record.get("time/evaluate_seconds", 0.0))

    @property
    def seconds_per_iteration(self) -> float:
        """Mean, of the iterations that count."""
        return mean(self.seconds(record) for record in self.timed)

    def stage(self, name: str) -> float:
        """Mean seconds of a stage in the iterations that count."""
        return mean(record.get(f"time/{name}_seconds", 0.0) for record in self.timed)

    @property
    def totals(self) -> tuple[int, float]:
        """Updates of the whole run, and samples that they used for each that was generated."""
        updates = sum(record["updates/num"] for record in self.records[1:])
        return int(updates), self.records[-1]["replay/realized_utd"]


def train(mode: str, seed: int, folder: Path, fields: Mapping[str, str]) -> Run:
    """Make one run in processes of their own, its engine and its learner pinned."""
    name = f"{mode}-{seed}"
    fields = {
        "pipeline.mode": mode,
        "train.seed": str(seed),
        "parallel.tensor": "1",
        "output.dir": str(folder),
        "output.run-name": name,
        "output.tensorboard": "False",
        **fields,
    }
    arguments = [part for field, value in fields.items() for part in (f"--{field}", value)]
    command = [sys.executable, "-m", "r2vpo_megatron.cli.train", RECIPE, *arguments]
    with (folder / f"{name}.txt").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        pinning = threading.Thread(target=pin_workers, args=(process.pid,), daemon=True)
        pinning.start()
        code = process.wait()
        pinning.join()
        if code:
            output.seek(0)
            raise SystemExit(f"{name} ended with {code}:\n{output.read()}")
    return Run(mode, seed, read_metrics(folder / name / "metrics.jsonl"))


def pin_workers(pid: int) -> None:
    """Keep each worker of this driver on its core, with all its threads, as soon as it is there."""
    missing = dict(CORES)
    while missing and psutil.pid_exists(pid):
        time.sleep(0.5)
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            for worker in [name for name in missing if title.startswith(name)]:
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if psutil.Process(pid) in process.parents():
                        for thread in process.threads():
                            os.sched_setaffinity(thread.id, {missing[worker]})
                        del missing[worker]


def balanced_updates(run: Run, samples: int, batch: int) -> Fraction:
    """UTD at which learning takes as long as rollout, in whole updates per iteration."""
    per_update = run.stage("learn") / mean(record["updates/num"] for record in run.timed)
    updates = max(round(run.stage("wait_rollout") / per_update), 1)
    return Fraction(updates * batch, samples)


def limit(run: Run) -> float:
    """Ratio of wall clocks if side by side neither side ever waited, by a run in turn."""
    rollout, learn = run.stage("wait_rollout"), run.stage("learn")
    rest = run.seconds_per_iteration - rollout - learn
    return (rollout + learn + rest) / (max(rollout, learn) + rest)


def print_times(runs: Sequence[Run]) -> None:
    """One line per run: seconds per iteration and of each stage, and how long each side waits."""
    print(
        f"\n{'seed':>4}  {'pipeline':12}  {'s/iteration':>11}  {'rollout':>8}  {'learn':>6}  "
        f"{'push':>6}  {'engine idle':>11}  {'learner waits':>13}  {'staleness':>9}"
    )
    for run in runs:
        idle = mean(record["rollout/idle_fraction"] for record in run.timed)
        waits = run.stage("wait_rollout") / run.seconds_per_iteration
        stale = mean(record["pipeline/staleness_mean"] for record in run.timed)
        print(
            f"{run.seed:4}  {run.mode:12}  {run.seconds_per_iteration:11.2f}  "
            f"{run.stage('wait_rollout'):8.2f}  {run.stage('learn'):6.2f}  "
            f"{run.stage('push'):6.2f}  {idle:11.0%}  {waits:13.0%}  {stale:9.2f}"
        )


def print_curves(runs: Sequence[Run], samples: int) -> None:
    """Held-out accuracy over responses and over time, seed by seed and on average."""
    print("\nheld-out accuracy, mean of seeds (responses; seconds of training, evaluation apart):")
    for mode in MODES:
        of_mode = [run for run in runs if run.mode == mode]
        points = []
        for index, record in enumerate(of_mode[0].records):
            if "evaluation/accuracy" in record:
                accuracy = mean(run.records[index]["evaluation/accuracy"] for run in of_mode)
                seconds = mean(
                    sum(run.seconds(other) for other in run.records[1 : index + 1])
                    for run in of_mode
                )
                points.append(f"{index * samples:,}; {seconds:.0f} s: {accuracy:.3f}")
        print(f"  {mode:12}  " + "   ".join(points))
        for run in of_mode:
            last = [record for record in run.records if "evaluation/accuracy" in record][-1]
            greedy = last["evaluation/accuracy_greedy"]
            print(
                f"    seed {run.seed}: {run.records[0]['evaluation/accuracy']:.3f} -> "
                f"{last['evaluation/accuracy']:.3f} (greedy {greedy:.3f})"
            )


def main() -> None:
    """Calibrate, make all runs, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--calibration-iterations", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=128, help="per iteration, 8 responses each")
    parser.add_argument("--batch", type=int, default=128, help="samples per update")
    options = parser.parse_args()
    samples = options.prompts * 8
    fields = {
        "train.prompts-per-iteration": str(options.prompts),
        "train.mini-batch-samples": str(options.batch),
        "evaluation.every-iterations": "5",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trial = train(
            "synchronous",
            99,
            folder,
            {
                **fields,
                "train.num-iterations": str(options.calibration_iterations),
                "evaluation.every-iterations": "0",
            },
        )
        utd = balanced_updates(trial, samples, options.batch)
        print(
            f"calibration: rollout {trial.stage('wait_rollout'):.2f} s, learner "
            f"{trial.stage('learn'):.2f} s at the recipe's UTD; UTD {utd} balances them"
        )
        fields |= {
            "train.num-iterations": str(options.iterations),
            "replay.update-to-data": str(utd),
        }
        runs = [
            train(mode, seed, folder, fields) for seed in range(options.seeds) for mode in MODES
        ]
    in_turn, side_by_side = ([run for run in runs if run.mode == mode] for mode in MODES)
    if {run.totals for run in in_turn} != {run.totals for run in side_by_side}:
        raise SystemExit(f"unequal work: {[run.totals for run in runs]}")
    print_times(runs)
    ratios = [
        one.seconds_per_iteration / other.seconds_per_iteration
        for one, other in zip(in_turn, side_by_side, strict=True)
    ]
    print(
        f"\nside by side is {median(ratios):.2f}x as fast (seeds: "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}; target {TARGET}); the limit by the "
        f"stages of the runs in turn is {median(map(limit, in_turn)):.2f}x"
    )
    print_curves(runs, samples)


if __name__ == "__main__":
    main()
