"""Runs on fixed trajectories: bitwise repeatable, at several ranks too, and what parts them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r2vpo_megatron.cli.recipe import load_recipe
from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.testbed.tiny_model import make_tiny_model
from tests.unit.test_compare_losses import ROOT, tool

RECIPE = "recipes/tiny_cpu.py:r2vpo_off_policy"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny_model(folder, warm_start=False)
    return folder


@pytest.fixture(scope="module")
def config() -> RunConfig:
    recipe = load_recipe(str(ROOT / RECIPE))
    parallel = ParallelConfig(max_tokens_per_micro_batch=64)
    return replace(recipe, parallel=parallel)


@pytest.fixture
def record(model_dir: Path, tmp_path: Path):
    def run(name: str, config: RunConfig) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        tool.record_run(config, model_dir, folder, num_updates=3)
        return folder

    return run


def test_the_same_run_is_bitwise_equal_and_another_rate_parts(record, config):
    one = record("one", config)
    assert not tool.compare_runs(one, record("same", config)).differences
    faster = replace(config, optimizer=replace(config.optimizer, lr=2e-4))
    comparison = tool.compare_runs(one, record("faster", faster))
    assert comparison.first.startswith("update 1, metric optimizer/lr: 0.0001 and 0.0002")
    # The first update's metrics are of the weights before it.
    first = {name: found.first_update for name, found in comparison.differences.items()}
    assert first["metric policy/entropy"] == 2
    assert first["weight lm_head.weight"] == 1


def test_two_layouts_part_by_rounding_alone(record, config):
    layout = replace(config.parallel, tensor=2, pipeline=2)
    one = record("one", config)
    several = record("several", replace(config, parallel=layout))
    again = record("again", replace(config, parallel=layout))
    assert not tool.compare_runs(several, again).differences
    comparison = tool.compare_runs(one, several)
    # Of the metrics alone; the head's own checks tell rounding errors, which are not the same.
    relative = {
        name: found.relative
        for name, found in comparison.differences.items()
        if name.startswith(("metric ratio/", "metric optimizer/", "metric objective/"))
    }
    assert relative
    assert max(relative.values()) < 1e-4


def test_a_rank_that_fails_is_named(record, config, capfd):
    broken = replace(config, algorithm=replace(config.algorithm, objective="no such objective"))
    with pytest.raises(tool.RunFailed, match="rank 0: exit code 1"):
        record("broken", broken)
    assert "KeyError: 'no such objective'" in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_compares_configurations_and_names_a_wrong_field():
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/compare_losses.py", "--updates", "2", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)

    base = f"{RECIPE} --parallel.tensor 1"
    parted = run("--configs", base, f"{base} --algorithm.ratio-penalty 0.05")
    assert parted.returncode == tool.EXIT_PARTED, parted.stderr
    assert "first at update 1, metric objective/mean" in parted.stdout
    wrong = run("--configs", base, f"{base} --optimizer.lrr 1")
    assert wrong.returncode == tool.EXIT_BAD_INPUT
    assert "unknown field --optimizer.lrr; did you mean --optimizer.lr" in wrong.stderr
    equal = run("--commits", ".", ".", "--config", base)
    assert equal.returncode == tool.EXIT_EQUAL
    assert equal.stdout == "bitwise equal over 2 updates: . and .\n"
