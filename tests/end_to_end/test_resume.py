"""A run that was interrupted and goes on is the run that was not, bit by bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from r2vpo_megatron.observability import read_metrics

FIELDS = {
    "train.num-iterations": "4",
    "checkpoint.every-iterations": "1",
    "evaluation.every-iterations": "2",
}
# What a clock, the memory or the folder decides; a restarted engine counts anew.
INCIDENTAL = (
    "time/",
    "memory/",
    "throughput/",
    "rollout/",
    "pipeline/learner_wait",
    "weight_sync/",
)


def records(run_dir: Path, key: str) -> list[dict[str, Any]]:
    name = {"iteration": "metrics.jsonl", "update": "updates.jsonl"}[key]
    return [
        {field: value for field, value in record.items() if not field.startswith(INCIDENTAL)}
        for record in read_metrics(run_dir / name, key)
    ]


def assert_same_run(one: Path, other: Path) -> None:
    for key in ("iteration", "update"):
        ours, theirs = records(one, key), records(other, key)
        assert len(ours) == len(theirs) > 0
        for mine, yours in zip(ours, theirs, strict=True):
            differing = {
                n: (mine.get(n), yours.get(n)) for n in mine | yours if mine.get(n) != yours.get(n)
            }
            assert not differing, (key, mine[key], differing)
    ours, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def straight(start: Any, recipe: str, tmp_path: Path, **fields: str) -> Path:
    run = start(recipe, **{**FIELDS, **fields, "output.run-name": "straight"})
    assert run.process.wait(timeout=280) == 0, run.text()
    run.assert_nothing_left()
    return tmp_path / "straight"


def kill_after(start: Any, recipe: str, line: str, **fields: str) -> Any:
    """Begin, and kill the driver without warning once a line has come.

    Ray's agents take a minute to notice: what is left is looked at when the test is over.
    """
    run = start(recipe, **{**FIELDS, **fields})
    run.wait_for(line, seconds=240)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    return run


def go_on(start: Any, recipe: str, **fields: str) -> Any:
    run = start(recipe, **{**FIELDS, **fields}, resume="auto")
    assert run.process.wait(timeout=280) == 0, run.text()
    run.assert_nothing_left()
    return run


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("r2vpo_off_policy_dual", {"replay.update-to-data": "3/2"}),
        pytest.param("r2vpo_on_policy", {}, marks=pytest.mark.slow),
        pytest.param("r2vpo_off_policy", {"parallel.pipeline": "2"}, marks=pytest.mark.slow),
    ],
    ids=["off-policy, dual", "on-policy, fixed", "off-policy, TP2 x PP2"],
)
def test_killed_without_warning_it_goes_on_bit_by_bit(start, tmp_path, recipe, fields):
    killed = kill_after(start, recipe, "iteration-000002", **fields)
    run = go_on(start, recipe, **fields)
    checkpoints = f"{tmp_path}/run/checkpoints"
    assert re.search(rf"^goes on from {checkpoints}/iteration-00000[12]$", run.text(), re.M)
    assert_same_run(straight(start, recipe, tmp_path, **fields), tmp_path / "run")
    killed.assert_nothing_left(seconds=90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "num_lines", "seconds", "where"),
    [
        ("updates.jsonl", 11, 0.0, r"iteration-000001-update-00\d"),  # of 8 an iteration
        ("metrics.jsonl", 2, 0.5, r"iteration-000001"),  # while responses are waited for
    ],
)
def test_stopped_anywhere_it_goes_on_bit_by_bit(start, tmp_path, file, num_lines, seconds, where):
    """SIGTERM after an update: the checkpoint is of that one, what is left of the iteration too."""
    fields = {
        "checkpoint.every-iterations": "0",
        "train.mini-batch-samples": "6",
        "rollout.max-num-seqs": "2",  # a rollout takes a few seconds
        "rollout.max-response-tokens": "32",
    }
    run = start("r2vpo_off_policy", **{**FIELDS, **fields})
    path, deadline = tmp_path / "run" / file, time.monotonic() + 240
    while not path.exists() or path.read_bytes().count(b"\n") < num_lines:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.process.wait(timeout=120) == 128 + signal.SIGTERM, run.text()
    run.assert_nothing_left()
    (checkpoint,) = [p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir()]
    assert re.fullmatch(where, checkpoint.name), checkpoint
    go_on(start, "r2vpo_off_policy", **fields)
    assert_same_run(straight(start, "r2vpo_off_policy", tmp_path, **fields), tmp_path / "run")


@pytest.mark.slow
def test_signals_write_a_checkpoint_and_weights_and_the_run_goes_on(start, tmp_path):
    """Meanwhile another process that wants to go on with it is refused, and changes nothing."""
    fields = {**FIELDS, "checkpoint.every-iterations": "0"}
    run = start("r2vpo_off_policy", **fields)
    run.wait_for("iteration 1/4", seconds=240)
    os.kill(run.process.pid, signal.SIGSTOP)
    before = contents(tmp_path / "run")
    second = start("r2vpo_off_policy", **fields, resume="auto")
    assert second.process.wait(timeout=120) == 2, second.text()
    assert "another process is at work on this run" in second.text()
    assert contents(tmp_path / "run") == before
    os.kill(run.process.pid, signal.SIGCONT)
    os.kill(run.process.pid, signal.SIGUSR1)
    os.kill(run.process.pid, signal.SIGUSR2)
    assert run.process.wait(timeout=280) == 0, run.text()
    run.assert_nothing_left()
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.is_dir())
    assert len(names) == 2 and names[-1] == "iteration-000004"
    (export,) = (tmp_path / "run" / "exports").iterdir()
    exported, final = (
        load_file(folder / "model.safetensors") for folder in (export, tmp_path / "run" / "hf")
    )
    assert exported.keys() == final.keys()
    assert any(not torch.equal(exported[name], final[name]) for name in final)


@pytest.mark.slow
def test_at_another_layout_it_says_so_and_agrees(start, tmp_path):
    kill_after(start, "r2vpo_off_policy", "iteration-000002")
    run = go_on(start, "r2vpo_off_policy", **{"parallel.tensor": "1", "parallel.pipeline": "2"})
    assert "not bit-exact" in run.text() and "parallel.tensor" in run.text()
    first = read_metrics(straight(start, "r2vpo_off_policy", tmp_path) / "updates.jsonl", "update")
    other = read_metrics(tmp_path / "run" / "updates.jsonl", "update")
    assert len(first) == len(other)
    # The next update takes the same samples from the buffer: only rounding differs.
    resumed = next(i for i, record in enumerate(other) if record["iteration"] == 3)
    for name in ("ratio/second_moment", "optimizer/gradient_norm"):
        assert other[resumed][name] == pytest.approx(first[resumed][name], rel=1e-2)


@pytest.mark.slow
def test_side_by_side_it_goes_on_within_its_bounds(start, tmp_path):
    kill_after(start, "r2vpo_off_policy_async", "iteration-000002")
    go_on(start, "r2vpo_off_policy_async")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    assert max(line["pipeline/staleness_max"] for line in lines[1:]) <= 1
    assert lines[4]["replay/size"] == 4 * 24
    assert lines[4]["replay/realized_utd"] == 2.0


@pytest.mark.slow
def test_another_run_is_refused_and_a_damaged_checkpoint_is_passed_over(start, tmp_path):
    fields = {"train.num-iterations": "2", "evaluation.every-iterations": "0"}
    run = start("r2vpo_off_policy", **{**FIELDS, **fields})
    assert run.process.wait(timeout=240) == 0, run.text()
    folder = tmp_path / "run" / "checkpoints"
    before = contents(folder)
    weights = load_file(tmp_path / "run" / "hf" / "model.safetensors")

    run = start("r2vpo_off_policy", **{**FIELDS, **fields}, resume="auto")
    assert run.process.wait(timeout=240) == 0, run.text()  # there is nothing left to do
    assert [r["iteration"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    again = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []

    changed = {"optimizer.lr": "5e-5", "algorithm.ratio-penalty": "0.05"}
    run = start("r2vpo_off_policy", **{**FIELDS, **fields, **changed}, resume="auto")
    assert run.process.wait(timeout=120) == 2
    for name in ("optimizer.lr", "algorithm.ratio_penalty", "checkpoint.allow_changes"):
        assert name in run.text(), run.text()
    assert contents(folder) == before

    damaged = folder / "iteration-000002" / "replay.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    allowed = {"checkpoint.allow-changes": "optimizer.lr, algorithm.ratio_penalty"}
    run = start("r2vpo_off_policy", **{**FIELDS, **fields, **changed, **allowed}, resume="auto")
    assert run.process.wait(timeout=240) == 0, run.text()
    assert "replay.safetensors" in run.text()
    assert "goes on from" in run.text() and "iteration-000001" in run.text()
    updates = read_metrics(tmp_path / "run" / "updates.jsonl", "update")
    rates = {record["iteration"]: record["optimizer/lr"] for record in updates}
    assert rates == {1: 1e-4, 2: 5e-5}
    shutil.rmtree(folder)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["optimizer"]["lr"] == 5e-5
