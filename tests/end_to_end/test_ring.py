"""The whole ring as a user runs it: driver, Ray, two Megatron ranks, a vLLM engine.

Each test starts the command line in a process of its own, marked by an environment variable
that all its descendants inherit, and afterwards looks for any process with that mark and for new
shared-memory segments.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2vpo_megatron.rollout.vllm_engine import engine_environment
from r2vpo_megatron.testbed.tiny_model import make_tiny_model

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


@pytest.fixture(scope="module", params=["untied"])
def tiny_model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pangu"
    make_tiny_model(folder, "pangu", tied=request.param == "tied", warm_start=False)
    return folder


@dataclass
class Run:
    """A command line run under way, and what must be gone when it ends."""

    command: list[str]
    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.segments_before = set(os.listdir("/dev/shm"))
        self.output = (self.folder / "output.txt").open("w+")
        self.process = subprocess.Popen(
            self.command,
            cwd=REPO,
            env={**os.environ, MARK: self.mark},
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


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator:
    runs: list[Run] = []

    def start_run(recipe: str, **overrides: str) -> Run:
        fields = {
            **SMALL,
            "model.testbed": "",
            "model.path": str(tiny_model),
            "data.train-prompts": str(tiny_model / "train.jsonl"),
            "data.held-out-prompts": str(tiny_model / "held_out.jsonl"),
            "data.reward": "tests.end_to_end.parity_reward:reward",
            "output.dir": str(tmp_path),
            "output.run-name": "run",
            **overrides,
        }
        arguments = [part for name, value in fields.items() for part in (f"--{name}", value)]
        command = [sys.executable, "-m", "r2vpo_megatron.cli.train"]
        runs.append(Run([*command, f"recipes/tiny_cpu.py:{recipe}", *arguments], tmp_path))
        return runs[-1]

    yield start_run
    for run in runs:
        run.clean_up()


@pytest.mark.parametrize(
    ("recipe", "updates", "age", "tiny_model"),
    [("r2vpo_off_policy", 4, 0.5, "untied"), ("r2vpo_on_policy", 2, 0.0, "tied")],
    indirect=["tiny_model"],
)
def test_two_iterations(start, tiny_model, tmp_path, recipe, updates, age):
    run = start(recipe)
    code = run.process.wait(timeout=240)
    assert code == 0, run.text()
    run.assert_nothing_left()
    folder = tmp_path / "run"

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["updates/num"] == updates
        assert line["logprob_gap/mean"] < 0.02
        assert line["logprob_gap/max"] < 1e-3  # fp32 on both sides
        assert line["evaluation/accuracy"] >= 0
        assert line["response/max_tokens"] <= 12
        assert line["weight_sync/num_tensors"] == len(load_file(tiny_model / "model.safetensors"))
    assert lines[2]["replay/age_mean"] == age
    assert lines[0]["evaluation/accuracy_greedy"] >= 0
    assert lines[2]["evaluation/accuracy_greedy"] >= 0
    assert 0 < lines[1]["ratio/second_moment"] < 1  # the updates moved it, off an exact 1

    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["train"]["num_iterations"] == 2
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert_final_weights(folder / "hf", tiny_model)
    assert_vllm_serves(folder / "hf")


def test_a_dual_controller_moves_lambda_on_the_engines_logprobs(start, tmp_path):
    run = start(
        "r2vpo_off_policy_dual",
        **{
            "algorithm.behavior-logprobs": "rollout",
            "algorithm.dual-target": "1e6",
            "algorithm.ratio-penalty": "0.04",
            "replay.update-to-data": "2",
        },
    )
    assert run.process.wait(timeout=240) == 0, run.text()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    # Nothing comes near this target: each update lowers lambda by exp(-0.1), the largest step.
    # The eighth update used what seven had left.
    assert lines[2]["ratio/penalty"] == pytest.approx(0.04 * math.exp(-0.1 * 7), rel=1e-3)
    assert lines[2]["ratio/target"] == 1e6


def test_a_run_starts_from_the_weights_of_a_megatron_checkpoint(start, tiny_model, tmp_path):
    """Not the model folder's, on the learner and, before the first rollout, in the engines."""
    other, converted = tmp_path / "other", tmp_path / "megatron"
    shutil.copytree(tiny_model, other)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(tiny_model / "model.safetensors").items()
    }
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    tool = [sys.executable, "tools/convert_hf_to_megatron.py", "--pipeline-parallel", "2"]
    subprocess.run([*tool, "--hf", other, "--output", converted], cwd=REPO, check=True)

    run = start(
        "r2vpo_off_policy",
        **{
            "model.weights": str(converted),
            "optimizer.lr": "0",
            "train.num-iterations": "1",
            "evaluation.every-iterations": "0",
        },
    )
    assert run.process.wait(timeout=240) == 0, run.text()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["logprob_gap/max"] < 1e-3  # of the two models of this test it is over 0.1
    final = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert {name for name in weights if not torch.equal(weights[name], final[name])} == set()


def assert_final_weights(final: Path, initial: Path) -> None:
    """The exported model opens in transformers and has been trained: every matrix moved."""
    from transformers import AutoModelForCausalLM

    from r2vpo_megatron.models.pangu_hf import register_with_transformers

    register_with_transformers()
    before = dict(AutoModelForCausalLM.from_pretrained(initial).named_parameters())
    after = dict(AutoModelForCausalLM.from_pretrained(final).named_parameters())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.endswith("proj.weight")} <= moved
    assert all(torch.isfinite(parameter).all() for parameter in after.values())


GREEDY_IN_VLLM_AND_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM
from r2vpo_megatron.models.pangu_hf import register_with_transformers
from r2vpo_megatron.records import GenerationRequest
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

folder, prompt = sys.argv[1], [5, 6, 7, 8]
engine = VLLMEngine(folder, max_model_len=32, kv_cache_bytes=16 << 20)
request = GenerationRequest("sample", tuple(prompt), seed=0)
(served,) = engine.generate([request], SamplingSettings(max_response_tokens=12, greedy=True))
engine.shutdown()
register_with_transformers()
model = AutoModelForCausalLM.from_pretrained(folder)
ids = list(prompt)
for _ in range(12):
    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
print("served", list(served.token_ids))
assert list(served.token_ids) == ids[4:], ids[4:]
"""


def assert_vllm_serves(final: Path) -> None:
    """vLLM opens the exported folder and decodes greedily what transformers does."""
    done = subprocess.run(
        [sys.executable, "-c", GREEDY_IN_VLLM_AND_TRANSFORMERS, str(final)],
        cwd=REPO,
        env={**os.environ, **engine_environment("cpu")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "served [" in done.stdout


@pytest.mark.parametrize(
    ("send", "stop_signal", "codes"),
    [
        pytest.param(os.killpg, signal.SIGINT, {130}, id="ctrl-c"),
        pytest.param(os.kill, signal.SIGTERM, {128 + signal.SIGTERM}, id="kill"),
        # Ray's daemons are in the group and do not block this signal. A driver that speaks to its
        # raylet after that one has gone is ended by Ray at once, with code 1.
        pytest.param(
            os.killpg,
            signal.SIGTERM,
            {128 + signal.SIGTERM, 1},
            id="kill-group",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_leaves_nothing(start, tmp_path, send, stop_signal, codes):
    run = start("r2vpo_off_policy", **{"train.num-iterations": "1000"})
    run.wait_for("iteration 1/1000", seconds=240)
    send(run.process.pid, stop_signal)
    assert run.process.wait(timeout=60) in codes, run.text()
    run.assert_nothing_left()
    assert "Traceback" not in run.text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2


def test_ctrl_c_while_workers_start_leaves_nothing(start):
    run = start("r2vpo_off_policy")
    run.wait_for("learner ranks", seconds=120)
    deadline = time.monotonic() + 60
    while not run.workers("LearnerWorker"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(timeout=60) == 130, run.text()
    run.assert_nothing_left()


@pytest.mark.slow
def test_ctrl_c_with_a_tensor_parallel_engine_leaves_nothing(start):
    run = start(
        "r2vpo_off_policy", **{"train.num-iterations": "1000", "rollout.tensor-parallel": "2"}
    )
    run.wait_for("iteration 1/1000", seconds=280)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(timeout=90) == 130, run.text()
    run.assert_nothing_left()


def test_an_exception_in_the_learner_ends_the_run(start, tmp_path):
    # Weights become infinite with the first update; the second must be refused by the learner.
    run = start("r2vpo_off_policy", **{"optimizer.lr": "1e30"})
    assert run.process.wait(timeout=240) == 1, run.text()
    assert "error: the run failed: FloatingPointError" in run.text()
    assert "FloatingPointError" in (tmp_path / "run" / "error.txt").read_text()
    run.assert_nothing_left()


@pytest.mark.parametrize("worker", ["LearnerWorker", "RolloutWorker"])
def test_a_killed_worker_ends_the_run(start, worker):
    """The other learner rank waits in a collective that never ends; the run must not."""
    run = start("r2vpo_off_policy", **{"train.num-iterations": "1000"})
    run.wait_for("iteration 1/1000", seconds=240)
    os.kill(run.workers(worker)[-1], signal.SIGKILL)
    assert run.process.wait(timeout=120) == 1, run.text()
    assert "error: the run failed: " in run.text()
    assert "Traceback" not in run.text()
    run.assert_nothing_left()


def test_two_engines_and_two_data_parallel_ranks(start, tmp_path):
    run = start("r2vpo_off_policy", **{"rollout.num-engines": "2", "parallel.data": "2"})
    assert run.process.wait(timeout=280) == 0, run.text()
    run.assert_nothing_left()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert lines[2]["logprob_gap/max"] < 1e-3  # both engines have the pushed weights
