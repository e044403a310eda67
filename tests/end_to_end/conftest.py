"""A tiny model that has learned nothing, and training runs on it by the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from r2vpo_megatron.testbed.tiny_model import make_tiny_model
from tests.end_to_end.ring_runs import SMALL, Run


@pytest.fixture(scope="module", params=["untied"])
def tiny_model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pangu"
    make_tiny_model(folder, "pangu", tied=request.param == "tied", warm_start=False)
    return folder


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator:
    runs: list[Run] = []

    def start_run(
        recipe: str, command: str = "train", flags: Sequence[str] = (), **overrides: str
    ) -> Run:
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
        start_of_line = [sys.executable, "-m", f"r2vpo_megatron.cli.{command}", *flags]
        runs.append(Run([*start_of_line, f"recipes/tiny_cpu.py:{recipe}", *arguments], tmp_path))
        return runs[-1]

    yield start_run
    for run in runs:
        run.clean_up()
