"""What tools/compare_losses.py says of two runs' files, and of bad input; no run is made here."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]


def load_tool() -> ModuleType:
    """tools/ is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location(
        "compare_losses", ROOT / "tools/compare_losses.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


tool = load_tool()

METRICS = [{"loss": 1.0, "norm": 2.0}, {"loss": 0.5, "norm": 4.0}]


def write_run(
    folder: Path,
    metrics: list[dict[str, float]] = METRICS,
    weights: tuple[float, float] = (1.0, 2.0),
    logprob: float = -1.0,
) -> Path:
    """A run of two updates of one weight, as `record_run` leaves it."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    save_file({"sample-00": torch.tensor([logprob])}, folder / "logprobs.safetensors")
    for update, value in enumerate(weights, start=1):
        tensors = {"w": torch.tensor([[0.0, value]])}
        save_file(tensors, folder / f"weights-{update:04d}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "first", "names"),
    [
        ({}, "", []),
        (
            {"metrics": [METRICS[0], {"loss": 0.5, "norm": 4.5}]},
            "update 2, metric norm: 4.0 and 4.5, 0.5 apart",
            ["metric norm"],
        ),
        (
            {"metrics": [METRICS[0], {"loss": math.nan, "norm": 4.0}], "weights": (1.5, 2.0)},
            "update 1, weight w: 1.0 and 1.5, 0.5 apart",
            ["weight w", "metric loss"],
        ),
        (
            {"logprob": -1.5, "weights": (1.0, 3.0)},
            "log-probs before the updates, log-probs of sample-00: -1.0 and -1.5, 0.5 apart",
            ["log-probs of sample-00", "weight w"],
        ),
        ({"metrics": [METRICS[0], {"norm": 4.0}]}, "update 2, metric loss", ["metric loss"]),
    ],
)
def test_the_first_difference_is_named(
    tmp_path: Path, changes: dict[str, object], first: str, names: list[str]
) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", **changes)
    comparison = tool.compare_runs(one, other)
    assert comparison.first.startswith(first)
    assert bool(comparison.first) == bool(first)
    assert list(comparison.differences) == names


def test_the_largest_difference_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [{"loss": 1.1, "norm": 2.0}, {"loss": 0.25, "norm": 4.0}]
    one = write_run(tmp_path / "one")
    comparison = tool.compare_runs(one, write_run(tmp_path / "other", metrics=changed))
    found = comparison.differences["metric loss"]
    assert (found.first_update, found.largest, found.relative) == (1, 0.25, 0.5)
    sides = [tool.Side("A", ROOT, []), tool.Side("B", ROOT, [])]
    assert tool.report(comparison, sides, 2) == tool.EXIT_PARTED
    printed = capsys.readouterr().out
    assert "they part: A and B\nfirst at update 1, metric loss: 1.0 and 1.1" in printed
    assert "1        0.25         0.5  metric loss" in printed
    assert "tensors: all bitwise equal" in printed
    same = tool.compare_runs(one, one)
    assert tool.report(same, sides, 2) == tool.EXIT_EQUAL
    assert capsys.readouterr().out == "bitwise equal over 2 updates: A and B\n"


def test_nan_equals_nan_alone(tmp_path: Path) -> None:
    lines = [{"loss": math.nan}, {"loss": 1.0}]
    one, other = (write_run(tmp_path / name, metrics=lines) for name in ("one", "other"))
    assert not tool.compare_runs(one, other).differences


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--commits", "no-such-commit", "."], "--commits no-such-commit: git knows no such"),
        (["--commits", "--all", "."], "expected 2 arguments"),
        ([], "give either --commits"),
        (["--configs", "a", "b", "--config", "c"], "give either --commits"),
        (["--commits", ".", ".", "--updates", "0"], "--updates 0: valid: 1 or more"),
        (["--configs", "a.py:b", "a.py:b", "--architecture", "gpt"], "architecture='gpt'; valid"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = tool.main(arguments)
    except SystemExit as stopped:  # argparse's own
        code = stopped.code
    assert code == tool.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
