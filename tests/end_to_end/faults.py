"""Faults of a run, each brought about under load, and what must come of it.

`make chaos` tries them all and writes the table of docs/reliability.md; test_faults.py asserts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from r2vpo_megatron.observability import read_metrics
from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards import RewardResult
from r2vpo_megatron.testbed.tiny_model import make_tiny_model
from tests.end_to_end import parity_reward
from tests.end_to_end.ring_runs import REPO, SMALL, Run, marked_processes

ITERATIONS = 4
TABLE_START, TABLE_END = "<!-- faults: begin -->", "<!-- faults: end -->"


class Untried(Exception):
    """This machine does not permit the fault."""


@dataclass
class Scene:
    """A folder for runs of one name, and a tiny model for them."""

    model: Path
    folder: Path
    runs: list[Run] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def start(self, environment: dict[str, str] | None = None, **fields: str) -> Run:
        fields = {
            **SMALL,
            "model.testbed": "",
            "model.path": str(self.model),
            "data.train-prompts": str(self.model / "train.jsonl"),
            "data.held-out-prompts": str(self.model / "held_out.jsonl"),
            "data.reward": "tests.end_to_end.parity_reward:reward",
            "output.dir": str(self.folder),
            "output.run-name": "run",
            "train.num-iterations": str(ITERATIONS),
            "evaluation.every-iterations": "0",
            "checkpoint.every-iterations": "1",
            "resume": "auto",
            **fields,
        }
        arguments = [part for name, value in fields.items() for part in (f"--{name}", value)]
        command = [sys.executable, "-m", "r2vpo_megatron.cli.train"]
        command += ["recipes/tiny_cpu.py:r2vpo_off_policy", *arguments]
        self.runs.append(Run(command, self.folder, environment=environment or {}))
        return self.runs[-1]

    def begin(self, environment: dict[str, str] | None = None, **fields: str) -> Run:
        """A run that has come to its first checkpoint."""
        run = self.start(environment, **fields)
        run.wait_for("iteration-000001", seconds=240)
        return run

    def ends(self, run: Run, *expected: str, seconds: float = 180) -> None:
        """The run ends with an error that says this, and nothing is left of it."""
        assert run.process.wait(timeout=seconds) == 1, run.text()
        for text in ("error: the run failed: ", "--resume", *expected):
            assert text in run.text(), f"no {text!r} in:\n{run.text()}"
        assert "Traceback" not in run.text()
        run.assert_nothing_left(seconds=60)

    def finishes(self, run: Run, *expected: str) -> None:
        """The run does all its iterations, and nothing is left of it."""
        assert run.process.wait(timeout=280) == 0, run.text()
        for text in expected:
            assert text in run.text(), f"no {text!r} in:\n{run.text()}"
        run.assert_nothing_left(seconds=60)
        assert not (self.run_dir / "error.txt").exists()  # of what it has gone on from
        lines = read_metrics(self.run_dir / "metrics.jsonl")
        assert [line["iteration"] for line in lines] == list(range(ITERATIONS + 1))
        assert (self.run_dir / "hf" / "model.safetensors").exists()

    def goes_on(self, *expected: str, **fields: str) -> None:
        """Started again with the same words, it finishes from a checkpoint."""
        self.finishes(self.start(**fields), "goes on from", *expected)

    def clean_up(self) -> None:
        for run in self.runs:
            run.clean_up()


def kill_learner_rank(scene: Scene) -> str:
    run = scene.begin()
    os.kill(run.workers("LearnerWorker")[-1], signal.SIGKILL)
    scene.ends(run, "RankLost: learner rank ", " is gone: its process was killed")
    scene.goes_on()
    return "the run ends and names the rank; goes on from the last checkpoint"


def kill_engine(scene: Scene) -> str:
    run = scene.begin()
    os.kill(run.workers("RolloutWorker")[-1], signal.SIGKILL)
    scene.finishes(run, "engine 0 was lost")
    return "the engine is replaced, its prompts are sampled again; the run finishes"


def hang_engine(scene: Scene) -> str:
    run = scene.begin(**{"rollout.hang-seconds": "20"})
    os.kill(run.workers("RolloutWorker")[-1], signal.SIGSTOP)
    scene.finishes(run, "engine 0 was lost")
    return "the engine is replaced, its prompts are sampled again; the run finishes"


def kill_engine_in_push(scene: Scene) -> str:
    run = scene.begin()
    updates = scene.run_dir / "updates.jsonl"
    # Of the four updates of iteration 3 the last has been written: the push comes next.
    deadline = time.monotonic() + 120
    while updates.read_bytes().count(b"\n") < 12:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()
        time.sleep(0.002)
    os.kill(run.workers("RolloutWorker")[-1], signal.SIGKILL)
    scene.finishes(run, "engine 0 was lost")
    # Counted in iteration 3: before its push was through, and none of its requests was left.
    lines = read_metrics(scene.run_dir / "metrics.jsonl")
    assert [line["rollout/num_restarts"] for line in lines] == [0, 0, 0, 1, 0]
    return "the push is sent again to the engine's replacement; the run finishes"


def kill_node_daemon(scene: Scene) -> str:
    run = scene.begin()
    daemons = [
        pid
        for pid, command in marked_processes(run.mark).items()
        if Path(command.split("\0")[0]).name == "raylet"
    ]
    assert len(daemons) == 1, daemons
    os.kill(daemons[0], signal.SIGKILL)
    assert run.process.wait(timeout=180) == 1, run.text()
    # Where the driver notices first; else Ray ends it at once, and says why.
    named = ("DaemonLost: a daemon of Ray on this node is gone", "Raylet is terminated")
    assert any(text in run.text() for text in named), run.text()
    run.assert_nothing_left(seconds=60)
    scene.goes_on()
    return "the run ends and names the daemon; goes on from the last checkpoint"


def kill_driver(scene: Scene) -> str:
    run = scene.begin()
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    scene.goes_on()
    run.assert_nothing_left(seconds=90)  # Ray's agents take a minute to notice
    return "all processes end by themselves; goes on from the last checkpoint"


def stop_rank(scene: Scene) -> str:
    run = scene.begin(**{"runtime.timeout-seconds": "60"})
    pid = run.workers("LearnerWorker")[-1]
    os.kill(pid, signal.SIGSTOP)
    scene.ends(run, "StageTimeout", "no answer in 60 s", f"(pid {pid} on ", ", stopped): in ")
    stacks = (scene.run_dir / "stacks.txt").read_text()
    for name in ("learner rank 0", "learner rank 1", "rollout engine", "driver"):
        assert f"=== {name}" in stacks, f"no {name} in:\n{stacks}"
    assert "learner_worker.py" in stacks and "explain_timeouts" in stacks
    scene.goes_on()
    return "the run ends at its deadline with all stacks and the rank's name; goes on"


def fill_disk(scene: Scene) -> str:
    """Room for one checkpoint and the final weights; metrics are written beside them."""
    scene.run_dir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=18m,mode=700", "tmpfs", str(scene.run_dir)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        raise Untried("mounting a small file system needs root")
    try:
        run = scene.start()
        scene.finishes(run, "was not written", "No space left on device")
        assert [path.name for path in scene.checkpoints.iterdir() if path.is_dir()]
        updates = read_metrics(scene.run_dir / "updates.jsonl", "update")
        assert [line["update"] for line in updates] == list(range(1, len(updates) + 1))
    finally:
        subprocess.run(["umount", str(scene.run_dir)], check=True)
    return "the checkpoint is said not to be written; training goes on and finishes"


def damage_newest(scene: Scene) -> str:
    run = scene.begin()
    run.wait_for("iteration-000002", seconds=120)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    newest = max(path for path in scene.checkpoints.iterdir() if path.is_dir())
    victim = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    scene.goes_on(victim.name)
    return "the damaged file is named; goes on from the checkpoint before"


def reward_is_nan(scene: Scene) -> str:
    nan = {"data.reward": "tests.end_to_end.faults:at_last_nan"}
    scene.ends(scene.start(**nan), "has the score nan: must be finite")
    scene.goes_on(**{"checkpoint.allow-changes": "data.reward"})
    return "the run ends and names the prompt; goes on with a mended reward"


def reward_never_returns(scene: Scene) -> str:
    hanging = {"data.reward": "tests.end_to_end.faults:at_last_never"}
    run = scene.start(**hanging, **{"runtime.timeout-seconds": "45"})
    cause = "StageTimeout: collect: the driver itself has done nothing for 90 s in at_last_never ("
    scene.ends(run, cause, seconds=400)
    scene.goes_on(**{"checkpoint.allow-changes": "data.reward"})
    return "the run ends at its deadline and names the line; goes on with a mended reward"


NUM_JUDGED = itertools.count()


def at_last_nan(prompt: Prompt, text: str) -> RewardResult:
    """The test's reward, but not a number from the third iteration on."""
    result = parity_reward.reward(prompt, text)
    is_sound = next(NUM_JUDGED) < 60  # 8 in the first evaluation, 24 in an iteration
    return replace(result, score=result.score if is_sound else math.nan)


def at_last_never(prompt: Prompt, text: str) -> RewardResult:
    """The test's reward, but from the third iteration on it does not return."""
    if next(NUM_JUDGED) >= 60:
        time.sleep(3600)
    return parity_reward.reward(prompt, text)


def shortest_responses(scene: Scene) -> str:
    scene.finishes(scene.start(**{"rollout.max-response-tokens": "1"}))
    lines = read_metrics(scene.run_dir / "metrics.jsonl")[1:]
    assert all(line["response/max_tokens"] == 1 for line in lines)
    return "the run finishes"


def groups_of_one(scene: Scene) -> str:
    run = scene.start(**{"train.responses-per-prompt": "1"})
    assert run.process.wait(timeout=60) == 2, run.text()
    assert "train.responses_per_prompt = 1 is not valid: at least 2" in run.text()
    run.assert_nothing_left()
    return "refused before anything starts: an advantage compares responses"


def clock_jumps(scene: Scene) -> str:
    """In every Python process the wall clock jumps by an hour, back and forth."""
    code = scene.folder / "clock"
    code.mkdir()
    (code / "sitecustomize.py").write_text(
        "import time\n"
        "true_time = time.time\n"
        "time.time = lambda: true_time() + 3600.0 * (int(time.monotonic() / 3) % 3 - 1)\n"
    )
    paths = [str(code), os.environ.get("PYTHONPATH", "")]
    scene.finishes(scene.start({"PYTHONPATH": os.pathsep.join(filter(None, paths))}))
    manifests = [json.loads(path.read_text()) for path in scene.checkpoints.glob("*/manifest.json")]
    times = [manifest["facts"]["written_at"] for manifest in manifests]
    assert any(abs(at - time.time()) > 1800 for at in times), times  # it did jump
    return "no deadline heeds it; the run finishes"


FAULTS: dict[str, tuple[str, Callable[[Scene], str]]] = {
    "kill-learner-rank": ("kill -9 of a learner rank", kill_learner_rank),
    "kill-engine": ("kill -9 of an engine", kill_engine),
    "hang-engine": ("an engine hangs (SIGSTOP)", hang_engine),
    "kill-engine-in-push": ("an engine is lost in a weight push", kill_engine_in_push),
    "kill-node-daemon": ("kill -9 of a node's Ray daemon", kill_node_daemon),
    "kill-driver": ("kill -9 of the driver", kill_driver),
    "stop-rank": ("a learner rank hangs (SIGSTOP)", stop_rank),
    "full-disk": ("the disk is full while a checkpoint is written", fill_disk),
    "damaged-checkpoint": ("a bit of the newest checkpoint is flipped", damage_newest),
    "reward-nan": ("rewards that are not a number", reward_is_nan),
    "reward-hangs": ("a reward that does not return", reward_never_returns),
    "one-token": ("responses of one token, all cut off", shortest_responses),
    "group-of-one": ("groups of one response", groups_of_one),
    "clock-jump": ("Python's wall clock jumps by an hour, back and forth", clock_jumps),
}


def main() -> int:
    """Try faults and print the table; with `--write`, into a document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*FAULTS, []], help="default: all")
    parser.add_argument("--write", type=Path, help="document to put the table into")
    options = parser.parse_args()
    rows, num_failed = ["| fault | outcome |", "|---|---|"], 0
    with tempfile.TemporaryDirectory(prefix="r2vpo-faults-") as name:
        model = Path(name, "model")
        make_tiny_model(model, "pangu", tied=False, warm_start=False)
        for key in options.names or FAULTS:
            title, fault = FAULTS[key]
            scene = Scene(model, Path(name, key))
            scene.folder.mkdir()
            start = time.monotonic()
            try:
                outcome = fault(scene)
            except Untried as reason:
                outcome = f"not tried: {reason}"
            except Exception as error:
                num_failed += 1
                outcome = f"FAILED: {str(error).splitlines()[0][:200]}"
            finally:
                scene.clean_up()
                shutil.rmtree(scene.folder)
            print(f"{title}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
            rows.append(f"| {title} | {outcome} |")
    if options.write and not options.names:
        text = options.write.read_text()
        before, after = text.split(TABLE_START)[0], text.split(TABLE_END)[1]
        table = "\n".join(rows)
        options.write.write_text(f"{before}{TABLE_START}\n{table}\n{TABLE_END}{after}")
    return 1 if num_failed else 0


if __name__ == "__main__":
    os.chdir(REPO)
    sys.exit(main())
