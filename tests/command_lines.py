"""Commands called in this process, and what stands in for the training behind them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = "recipes/tiny_cpu.py:r2vpo_off_policy"

Outcome = tuple[int, str, str]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(main: Callable[[list[str]], int], *arguments: str) -> Outcome:
        code = main(list(arguments))
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def install_training(
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[..., object],
    train_prepared: Callable[..., None] = lambda prepared: None,
) -> None:
    """Stand in for the parts of a training run, which import torch and start processes."""
    inputs = types.ModuleType("r2vpo_megatron.orchestration.inputs")
    inputs.prepare_run = prepare  # type: ignore[attr-defined]
    training = types.ModuleType("r2vpo_megatron.orchestration.run")
    training.run_training = train_prepared  # type: ignore[attr-defined]
    for module in (inputs, training):
        monkeypatch.setitem(sys.modules, module.__name__, module)
