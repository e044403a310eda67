"""The whole ring as a user runs it: driver, Ray, two Megatron ranks, a vLLM engine."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r2vpo_megatron.rollout.engine_settings import engine_environment
from tests.end_to_end.ring_runs import REPO, read_iterations


@pytest.mark.parametrize(
    ("recipe", "updates", "age", "tiny_model"),
    [
        ("r2vpo_off_policy", 4, 0.5, "untied"),
        pytest.param("r2vpo_on_policy", 2, 0.0, "tied", marks=pytest.mark.slow),
    ],
    indirect=["tiny_model"],
)
def test_two_iterations(start, tiny_model, tmp_path, recipe, updates, age):
    temporary = engine_files()
    run = start(recipe)
    code = run.process.wait(timeout=240)
    assert code == 0, run.text()
    run.assert_nothing_left()
    assert engine_files() <= temporary
    folder = tmp_path / "run"

    lines = read_iterations(folder)
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
    assert lines[0]["rollout/tokens_per_second"] > 0  # of the first evaluation
    assert lines[2]["evaluation/accuracy_greedy"] >= 0
    assert 0 < lines[1]["ratio/second_moment"] < 1  # the updates moved it, off an exact 1

    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["train"]["num_iterations"] == 2
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert_final_weights(folder / "hf", tiny_model)
    assert_vllm_serves(folder / "hf")


@pytest.mark.slow
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
    lines = read_iterations(tmp_path / "run")
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


def engine_files() -> set[Path]:
    """What engines keep in the folder for temporary files: vLLM's rendezvous, and ours of it."""
    folder = Path(tempfile.gettempdir())
    return {*folder.glob("vllm_dist_*"), *folder.glob("r2vpo-engine-*")}


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


@pytest.mark.slow
def test_a_row_of_updates_that_are_not_finite_ends_the_run(start, tmp_path):
    # Weights become infinite with the first update; the second must be refused by the learner.
    fields = {"optimizer.lr": "1e30", "guard.max-skipped-updates": "0"}
    run = start("r2vpo_off_policy", **fields)
    assert run.process.wait(timeout=240) == 1, run.text()
    assert "error: the run failed: RuntimeError: updates skipped in a row: 1 (" in run.text()
    assert "guards.py" in (tmp_path / "run" / "error.txt").read_text()
    (skipped,) = (tmp_path / "run" / "skipped_updates.jsonl").read_text().splitlines()
    assert json.loads(skipped)["update"] == 2 and len(json.loads(skipped)["samples"]) == 12
    run.assert_nothing_left()


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["LearnerWorker", "RolloutWorker"])
def test_a_killed_worker_ends_the_run(start, worker):
    """The other learner rank waits in a collective that never ends; the run must not."""
    fields = {"train.num-iterations": "1000", "rollout.max-restarts": "0"}
    run = start("r2vpo_off_policy", **fields)
    run.wait_for("iteration 1/1000", seconds=240)
    os.kill(run.workers(worker)[-1], signal.SIGKILL)
    assert run.process.wait(timeout=120) == 1, run.text()
    assert "error: the run failed: " in run.text()
    if worker == "RolloutWorker":
        assert "engine 0 was lost" in run.text()
        assert "rollout.max_restarts = 0" in run.text()
    assert "Traceback" not in run.text()
    run.assert_nothing_left()


@pytest.mark.slow
def test_two_engines_and_two_data_parallel_ranks(start, tmp_path):
    run = start("r2vpo_off_policy", **{"rollout.num-engines": "2", "parallel.data": "2"})
    assert run.process.wait(timeout=280) == 0, run.text()
    run.assert_nothing_left()
    lines = read_iterations(tmp_path / "run")
    assert lines[2]["logprob_gap/max"] < 1e-3  # both engines have the pushed weights
