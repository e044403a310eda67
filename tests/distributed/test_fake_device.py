"""Micro-batches stay on their device, and the host never waits for it; see tests/fake_device.py."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# Ranks of a tensor and a context group, and what a micro-batch has to take along.
LAYOUTS = {"1:1": 12, "2:2": 15}
CASES = [f"{path}:{layout}" for path in ("npu", "cuda") for layout in LAYOUTS]
FAULTS = {
    "cuda:1:1:stray": "Expected all tensors to be on the same device",
    "cuda:1:1:read": "aten._local_scalar_dense",
    "cuda:1:1:float64": "in float64 on npu",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    """By case; in a process of their own, since making up a device is for good."""
    cases = [*CASES, *FAULTS]
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_device", *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(cases, lines, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_stay_on_the_device(case: str, outcomes: dict[str, Any]) -> None:
    # Of each of the four micro-batches once, out of pinned memory, and not back.
    copies = 4 * LAYOUTS[case.partition(":")[2]]
    assert outcomes[case] == {
        "devices": ["npu"],
        "copies": {"cpu to npu": copies},
        "pinned": copies,
        "gradients": 19,
    }


@pytest.mark.parametrize("case", FAULTS)
def test_what_must_not_be_is_found(case: str, outcomes: dict[str, Any]) -> None:
    assert FAULTS[case] in outcomes[case]["error"]
