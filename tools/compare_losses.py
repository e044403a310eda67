"""Say whether two commits, or two configurations, train a tiny model bitwise equally.

    tools/compare_losses.py --commits HEAD~1 .
    tools/compare_losses.py --commits main . --config "FILE.py:function --parallel.tensor 2"
    tools/compare_losses.py --configs "FILE.py:function" "FILE.py:function --optimizer.lr 2e-4"

A commit is anything that git calls one, or `.` for the files as they are. The learner alone runs,
on the CPU: a few updates on fixed trajectories (`r2vpo_megatron.orchestration.fixed_updates`) from
the same random weights, with as many processes as the configuration's layout has ranks.
Log-probs before, metrics of and weights after every update are compared bit by bit.

Exit code: 0 bitwise equal, 1 they part, 2 bad input, 3 a run failed.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works before installation, too

EXIT_EQUAL, EXIT_PARTED, EXIT_BAD_INPUT, EXIT_FAILED = range(4)
DEFAULT_CONFIG = "recipes/tiny_cpu.py:r2vpo_off_policy --parallel.tensor 1"
WORKING_TREE = "."
METRICS, FRESH_LOGPROBS = "metrics.jsonl", "logprobs.safetensors"
MAX_ROWS = 12


class RunFailed(Exception):
    """A side ended with an error that is not the user's."""


@dataclass(frozen=True)
class Side:
    """One of the two: the source tree that it runs, and its configuration's command line."""

    name: str
    tree: Path
    arguments: list[str]


@dataclass
class Difference:
    """All that is known of one metric or tensor that is not equal everywhere."""

    first_update: int
    largest: float = 0.0  # absolute difference, over all updates
    relative: float = 0.0  # the largest, in units of the larger of the two values there

    def add(self, one: float, other: float) -> None:
        """Take two values into account; NaN counts as infinitely far from a number."""
        difference = abs(one - other)
        difference = math.inf if math.isnan(difference) else difference
        if difference >= self.largest:
            scale = max(abs(one), abs(other))
            self.largest = difference
            self.relative = difference / scale if 0 < scale < math.inf else math.inf


@dataclass
class Comparison:
    """Differences by name, and the first of them in the order of computation."""

    differences: dict[str, Difference] = field(default_factory=dict)
    first: str = ""  # where the sides part; empty where they do not

    def add(self, update: int, kind: str, name: str, one: float, other: float) -> None:
        """Note two values that are not equal."""
        key = f"{kind} {name}"
        if not self.differences:
            place = f"update {update}" if update else "log-probs before the updates"
            self.first = f"{place}, {key}: {one!r} and {other!r}, {abs(one - other):.3g} apart"
        self.differences.setdefault(key, Difference(update)).add(one, other)


def record_run(config: Any, model_dir: Path, out_dir: Path, num_updates: int) -> None:
    """Run one side in as many forked processes as it has ranks; rank 0 writes to `out_dir`.

    Megatron must have been imported, or each rank pays for it.

    Raises:
        RunFailed: a rank failed; its traceback is on stderr, and the others are ended.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = (f"file://{folder}/rendezvous", config, model_dir, out_dir, num_updates)
        ranks = [
            context.Process(target=_record_rank, args=(rank, *arguments), daemon=True)
            for rank in range(config.parallel.num_ranks)
        ]
        for process in ranks:
            process.start()
        running = {process.sentinel: rank for rank, process in enumerate(ranks)}
        try:
            while running:
                for ended in wait(list(running)):
                    rank = running.pop(ended)
                    ranks[rank].join()
                    if ranks[rank].exitcode:
                        raise RunFailed(f"rank {rank}: exit code {ranks[rank].exitcode}")
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _record_rank(
    rank: int, init_method: str, config: Any, model_dir: Path, out_dir: Path, num_updates: int
) -> None:
    import torch
    from safetensors.torch import save_file

    from r2vpo_megatron.orchestration.fixed_updates import start_fixed_run
    from r2vpo_megatron.parallel.state import destroy_parallel

    run = start_fixed_run(rank, init_method, config, model_dir)
    if rank == 0:
        fresh = {name: torch.from_numpy(value) for name, value in run.fresh_logprobs.items()}
        save_file(fresh, out_dir / FRESH_LOGPROBS)
    for update, metrics in enumerate(run.updates(num_updates), start=1):
        weights = {
            name: tensor.detach().clone()
            for name, tensor in run.actor.hf_weights()
            if tensor is not None
        }
        if rank == 0:
            save_file(weights, out_dir / _weights_file(update))
            with open(out_dir / METRICS, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(metrics) + "\n")
    destroy_parallel()


def _weights_file(update: int) -> str:
    return f"weights-{update:04d}.safetensors"


def compare_runs(one_dir: Path, other_dir: Path) -> Comparison:
    """Compare two folders of `record_run`: what is equal in every bit is not mentioned."""
    comparison = Comparison()
    _compare_tensors(comparison, 0, "log-probs of", one_dir, other_dir, FRESH_LOGPROBS)
    one_lines, other_lines = (
        [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        for folder in (one_dir, other_dir)
    )
    for update, (one, other) in enumerate(zip(one_lines, other_lines, strict=True), start=1):
        _compare_metrics(comparison, update, one, other)
        _compare_tensors(comparison, update, "weight", one_dir, other_dir, _weights_file(update))
    return comparison


def _compare_metrics(
    comparison: Comparison, update: int, one: Mapping[str, float], other: Mapping[str, float]
) -> None:
    """A metric that one side alone has differs from NaN."""
    for name in dict.fromkeys([*one, *other]):
        values = one.get(name, math.nan), other.get(name, math.nan)
        if values[0] != values[1] and not all(math.isnan(value) for value in values):
            comparison.add(update, "metric", name, *values)


def _compare_tensors(
    comparison: Comparison, update: int, kind: str, one_dir: Path, other_dir: Path, file: str
) -> None:
    """Of a tensor, the element that differs most is the one that is noted."""
    import torch
    from safetensors.torch import load_file

    one, other = load_file(one_dir / file), load_file(other_dir / file)
    for name in dict.fromkeys([*one, *other]):
        if name not in one or name not in other or one[name].shape != other[name].shape:
            shapes = [
                tensors[name].numel() if name in tensors else math.nan for tensors in (one, other)
            ]
            comparison.add(update, f"size of {kind}", name, *shapes)
        elif not torch.equal(one[name], other[name]):
            pair = [tensors[name].flatten().double() for tensors in (one, other)]
            largest = int((pair[0] - pair[1]).abs().nan_to_num(nan=math.inf).argmax())
            comparison.add(update, kind, name, *(float(values[largest]) for values in pair))


def report(comparison: Comparison, sides: Sequence[Side], num_updates: int) -> int:
    """Print the verdict and the largest differences; the exit code."""
    names = f"{sides[0].name} and {sides[1].name}"
    if not comparison.differences:
        print(f"bitwise equal over {num_updates} updates: {names}")
        return EXIT_EQUAL
    print(f"they part: {names}\nfirst at {comparison.first}\n")
    for kinds, title in ((("metric",), "metrics"), (("weight", "size", "log-probs"), "tensors")):
        found = {
            key: difference
            for key, difference in comparison.differences.items()
            if key.startswith(kinds)
        }
        if not found:
            print(f"{title}: all bitwise equal\n")
            continue
        ranked = sorted(found, key=lambda key: (-found[key].relative, key))
        print(f"{title} that differ: {len(found)}; of {num_updates} updates, the largest")
        print(f"  {'first at':>8}{'absolute':>12}{'relative':>12}")
        for key in ranked[:MAX_ROWS]:
            row = found[key]
            print(f"  {row.first_update:>8}{row.largest:>12.3g}{row.relative:>12.3g}  {key}")
        if len(ranked) > MAX_ROWS:
            print(f"  and {len(ranked) - MAX_ROWS} more")
        print()
    return EXIT_PARTED


def extract_commit(commit: str, folder: Path) -> Path:
    """The files of a commit, in a folder of its own; those of the checkout for `.`.

    Raises:
        ValueError: git knows no such commit, or it is older than this tool.
    """
    if commit == WORKING_TREE:
        return ROOT
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise ValueError(
            f"--commits {commit}: git knows no such commit here; valid: a branch, "
            "tag or hash of this repository, or . for the files as they are"
        )
    revision = found.stdout.strip()
    archive = subprocess.run([*git, "archive", revision], capture_output=True, check=True).stdout
    tree = folder / revision[:12]
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(tree, filter="data")
    tool = Path(__file__).resolve().relative_to(ROOT)
    if not (tree / tool).is_file():
        raise ValueError(f"--commits {commit}: it is older than {tool}, which runs in each tree")
    return tree


def run_side(side: Side, model_dir: Path, out_dir: Path, num_updates: int) -> None:
    """Run a side with its own tree's code, in a process of its own.

    Raises:
        ValueError: its configuration is not valid.
        RunFailed: it ended with any other error.
    """
    out_dir.mkdir()
    hidden = ["--record", str(out_dir), "--model", str(model_dir), "--updates", str(num_updates)]
    tool = side.tree / Path(__file__).resolve().relative_to(ROOT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # OpenMP's threads do not survive the fork of the ranks
        "PYTHONPATH": str(side.tree),
        "CUDA_VISIBLE_DEVICES": "",  # the CPU platform refuses to run beside a GPU
    }
    python = [sys.executable, "-W", "ignore::UserWarning"]  # Megatron's, on packages for GPUs
    result = subprocess.run(
        [*python, str(tool), *hidden, "--config", shlex.join(side.arguments)],
        cwd=side.tree,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    message = result.stderr.strip()
    if result.returncode == EXIT_BAD_INPUT:
        raise ValueError(f"{side.name}: {message.rpartition('error: ')[2]}")
    if result.returncode:
        raise RunFailed(f"{side.name}: exit code {result.returncode}\n{message}")


def record_side(args: argparse.Namespace) -> None:
    """In a side's own process: check the configuration, then run it."""
    from r2vpo_megatron.cli.command_line import parse_command_line
    from r2vpo_megatron.config.sections import require_choice

    config = parse_command_line("--config", "", shlex.split(args.config)).config

    from r2vpo_megatron.device import get_platform
    from r2vpo_megatron.models.spec import read_model_spec, validate_parallel
    from r2vpo_megatron.rl.aggregation import AGGREGATIONS
    from r2vpo_megatron.rl.objectives import OBJECTIVES

    require_choice("algorithm.objective", config.algorithm.objective, OBJECTIVES)
    require_choice("algorithm.aggregation", config.algorithm.aggregation, AGGREGATIONS)
    parallel = config.parallel
    spec = read_model_spec(args.model)
    validate_parallel(spec, parallel)
    get_platform("cpu").prepare()
    import r2vpo_megatron.learner.megatron_actor

    used = Path(r2vpo_megatron.learner.megatron_actor.__file__).resolve()
    if not used.is_relative_to(ROOT):
        raise RunFailed(f"this tree's code was to run, not {used}")
    record_run(config, args.model, args.record, args.updates)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Two commits with one configuration, or two configurations of the files as they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--configs", nargs=2, metavar='"RECIPE --section.field value"')
    parser.add_argument("--config", help=f"of both commits; default: {DEFAULT_CONFIG}")
    parser.add_argument("--updates", type=int, default=20, help="of each side, default 20")
    parser.add_argument(
        "--architecture", default="pangu", help="of the tiny model: pangu (default), qwen2, llama"
    )
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def compare(args: argparse.Namespace) -> int:
    """Run both sides, one after the other, and compare them."""
    if bool(args.commits) == bool(args.configs) or (args.configs and args.config):
        raise ValueError("give either --commits (with --config, if need be) or --configs")
    if args.updates < 1:
        raise ValueError(f"--updates {args.updates}: valid: 1 or more")
    with tempfile.TemporaryDirectory(prefix="compare-losses-") as temporary:
        folder = Path(temporary)
        if args.commits:
            config = shlex.split(args.config or DEFAULT_CONFIG)
            sides = [Side(name, extract_commit(name, folder), config) for name in args.commits]
        else:
            sides = [Side(f"'{text}'", ROOT, shlex.split(text)) for text in args.configs]

        from r2vpo_megatron.testbed.tiny_model import make_tiny_model

        make_tiny_model(folder / "model", args.architecture, warm_start=False)
        out_dirs = [folder / "one", folder / "other"]
        for side, out_dir in zip(sides, out_dirs, strict=True):
            run_side(side, folder / "model", out_dir, args.updates)
        return report(compare_runs(*out_dirs), sides, args.updates)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse_arguments(arguments)
    try:
        if args.record:
            record_side(args)
            return EXIT_EQUAL
        return compare(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunFailed as error:
        print(f"a run failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Exception:  # Python's own code for it, 1, would say that the sides part
        traceback.print_exc()
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
