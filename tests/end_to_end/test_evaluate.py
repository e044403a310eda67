"""An evaluation as a user runs it: driver, Ray, vLLM engines, and what is left after each end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from r2vpo_megatron.cli.evaluate import main
from r2vpo_megatron.evaluation.results import read_results
from r2vpo_megatron.testbed.tiny_model import ensure_tiny_model
from tests.end_to_end.ring_runs import REPO, Run

NUM_PROBLEMS, NUM_SAMPLES = 256, 4
NUM_RESPONSES = NUM_PROBLEMS * NUM_SAMPLES
CHUNK = 32
SMALL_ENGINE = (
    *("--template", "plain", "--top-p", "1", "--max-response-tokens", "64", "--dtype", "float32"),
    *("--kv-cache-bytes", str(16 << 20), "--max-num-seqs", "128", "--device", "cpu"),
)
SAMPLED = ("--samples", str(NUM_SAMPLES), "--temperature", "1", "--chunk-responses", str(CHUNK))

Start = Callable[..., Run]


@pytest.fixture(scope="module")
def tiny_model() -> Path:
    """Warm-started, so that some answers are right; made once, which takes about a minute."""
    return ensure_tiny_model(REPO / ".cache", "pangu")


def command(tiny_model: Path, *arguments: str, model: Path | None = None) -> list[str]:
    return [
        *(sys.executable, "-m", "r2vpo_megatron.cli.evaluate", "--model", str(model or tiny_model)),
        *("--benchmark-file", f"sums={tiny_model / 'held_out.jsonl'}", *SMALL_ENGINE, *arguments),
    ]


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start_run(*arguments: str) -> Run:
        output = ("--output", str(tmp_path / "evaluation"))
        runs.append(Run(command(tiny_model, *arguments, *output), tmp_path))
        return runs[-1]

    yield start_run
    for run in runs:
        run.clean_up()


def read_responses(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = (folder / "responses" / "sums.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    by_sample = {(row["problem_id"], row["sample_index"]): row for row in rows}
    assert len(by_sample) == len(rows)
    return by_sample


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One engine, one attempt, and the model by the folder of a training run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = folder / "run-1"
    run.mkdir()
    config = {"recipe": "r.py:f", "config": {"model": {"path": "", "testbed": "pangu"}}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "hf").symlink_to(tiny_model)
    output = ("--output", str(folder / "evaluation"))
    done = subprocess.run(
        command(tiny_model, *SAMPLED, *output, model=run),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| sums | 256 |" in done.stdout
    assert f"everything lies in {folder / 'evaluation'}" in done.stdout
    return folder / "evaluation"


def test_the_results_are_those_of_the_model(undisturbed: Path, tiny_model: Path) -> None:
    result = read_results(undisturbed)
    scores = result.benchmarks["sums"].scores
    assert (scores.num_problems, scores.num_samples) == (NUM_PROBLEMS, NUM_SAMPLES)
    # Measured by transformers when the model was made, on as many responses to each problem.
    expected = json.loads((tiny_model / "manifest.json").read_text())["warm_start"]
    assert scores.standard_error is not None
    assert scores.pass_at_1 == pytest.approx(
        expected["held_out_accuracy_sampled"], abs=6 * scores.standard_error
    )
    assert (result.model.name, result.model.checkpoint) == ("run-1", "hf")
    assert result.model.base == "tiny pangu"
    assert (result.settings.temperature, result.settings.grader) == (1.0, "math_dapo")
    assert result.wall_time_seconds > result.benchmarks["sums"].wall_time_seconds > 0

    responses = read_responses(undisturbed)
    assert len(responses) == NUM_RESPONSES
    right = sum(row["acc"] for row in responses.values())
    assert right / len(responses) == pytest.approx(scores.pass_at_1)
    for row in responses.values():
        if row["acc"]:
            assert f"Answer: {row['pred']}" in row["text"]
    truth = [json.loads(line) for line in (tiny_model / "held_out.jsonl").open()]
    golds = {row["prompt_id"]: row["ground_truth"] for row in truth}
    assert {problem_id for problem_id, _ in responses} == golds.keys()
    parsed = [row for row in responses.values() if row["parsed"]]
    assert all(row["acc"] == (row["pred"] == golds[row["problem_id"]]) for row in parsed)


@pytest.mark.parametrize("stop", ["ctrl-c", pytest.param("kill -9", marks=pytest.mark.slow)])
def test_stopped_and_gone_on_with_it_ends_with_the_same_responses(
    start: Start, tmp_path: Path, undisturbed: Path, stop: str
) -> None:
    """An attempt of two engines and one of one give what one engine gives in one."""
    folder = tmp_path / "evaluation"
    run = start(*SAMPLED, "--engines", "2")
    run.wait_for(f"sums {2 * CHUNK}/{NUM_RESPONSES} ", seconds=120)
    if stop == "ctrl-c":
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.process.wait(timeout=60) == 130, run.text()
        assert f"--resume --output {folder} goes on" in run.text()
        assert "Traceback" not in run.text()
    else:
        run.process.kill()
        run.process.wait(timeout=60)
    # Of a killed driver Ray's agents take notice only now and then.
    run.assert_nothing_left(seconds=30 if stop == "ctrl-c" else 120)
    num_kept = len(read_responses(folder))
    assert 2 * CHUNK <= num_kept < NUM_RESPONSES
    assert not (folder / "results.json").exists()

    run = start(*SAMPLED, "--resume")
    assert run.process.wait(timeout=240) == 0, run.text()
    assert f"{NUM_RESPONSES} responses, {num_kept} of them kept from before" in run.text()
    run.assert_nothing_left()
    responses, expected = read_responses(folder), read_responses(undisturbed)
    assert responses.keys() == expected.keys()
    assert all(row["seed"] == expected[key]["seed"] for key, row in responses.items())
    # Another batch may round differently, and a token in 100,000 may turn out otherwise.
    same = sum(row["text"] == expected[key]["text"] for key, row in responses.items())
    assert same >= 0.99 * len(expected)
    scores = read_results(folder).benchmarks["sums"].scores
    before = read_results(undisturbed).benchmarks["sums"].scores
    assert scores.pass_at_1 == pytest.approx(before.pass_at_1, abs=0.01)


def test_going_on_with_a_finished_evaluation_writes_its_results_again(
    tiny_model: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("started Ray"))
    before = read_results(undisturbed)
    content = (undisturbed / "responses" / "sums.jsonl").read_bytes()
    (undisturbed / "results.json").unlink()
    (undisturbed / "results.md").unlink()
    output = ("--output", str(undisturbed), "--resume")
    model = undisturbed.parent / "run-1"
    assert main(command(tiny_model, *SAMPLED, *output, model=model)[3:]) == 0
    assert f"{NUM_RESPONSES} of them kept from before" in capsys.readouterr().out
    after = read_results(undisturbed)
    assert after.benchmarks == before.benchmarks
    assert (after.settings, after.model) == (before.settings, before.model)
    assert after.wall_time_seconds == before.wall_time_seconds
    assert (undisturbed / "responses" / "sums.jsonl").read_bytes() == content
    assert "| sums | 256 |" in (undisturbed / "results.md").read_text()

    changed = ["--temperature", "0.9", "--samples", "5"]
    assert main([*command(tiny_model, *SAMPLED, *output, model=model)[3:], *changed]) == 2
    error = capsys.readouterr().err
    assert "--samples: 4 there, 5 here; --temperature: 1.0 there, 0.9 here" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_greedy_accuracy_is_what_transformers_found(
    start: Start, tmp_path: Path, tiny_model: Path
) -> None:
    run = start("--greedy")
    assert run.process.wait(timeout=240) == 0, run.text()
    scores = read_results(tmp_path / "evaluation").benchmarks["sums"].scores
    expected = json.loads((tiny_model / "manifest.json").read_text())["warm_start"]
    # Two ties that round differently are forgiven.
    assert scores.pass_at_1 == pytest.approx(
        expected["held_out_accuracy_greedy"], abs=2 / NUM_PROBLEMS
    )
    assert scores.num_samples == 1


@pytest.mark.slow
def test_an_engine_that_dies_is_replaced_and_nothing_is_lost(
    start: Start, tmp_path: Path, undisturbed: Path
) -> None:
    run = start(*SAMPLED, "--engines", "2")
    run.wait_for(f"sums {2 * CHUNK}/{NUM_RESPONSES} ", seconds=120)
    os.kill(run.workers("RolloutWorker")[0], signal.SIGKILL)
    assert run.process.wait(timeout=240) == 0, run.text()
    assert re.search(r"engine [01] was lost \(.*\); \d+ requests are sent anew", run.text())
    assert "Traceback" not in run.text()
    run.assert_nothing_left()
    responses, expected = read_responses(tmp_path / "evaluation"), read_responses(undisturbed)
    assert responses.keys() == expected.keys()
    same = sum(row["text"] == expected[key]["text"] for key, row in responses.items())
    assert same >= 0.99 * len(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--samples", "0"], "--samples 0"),
        # HF_HUB_OFFLINE: the hub is not asked.
        (["--benchmarks", "aime24"], "(--benchmark-file aime24=FILE reads a local copy)"),
        (["--max-response-tokens", "1100"], "more than the model's 1024 positions"),
        (["--model", "/no/such/model"], "--model /no/such/model: no such folder"),
        (["--reward", "math_dap"], "math_dap"),
        (["--tensor-parallel", "3"], "--tensor-parallel 3"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("started Ray"))
    output = ("--output", str(tmp_path / "evaluation"))
    assert main([*command(tiny_model, *output)[3:], *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "evaluation").exists()
