"""Micro-batches stay on their device, and the host never waits for it; see tests/fake_device.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def on_a_fake_device(*arguments: str, expect_error: str = "") -> dict[str, object]:
    """In a process of its own: making up a device is for good."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_device", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if expect_error:
        assert done.returncode != 0 and expect_error in done.stderr
        return {}
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("path", ["npu", "cuda"])
@pytest.mark.parametrize(("tensor", "context", "copies"), [(1, 1, 12), (2, 2, 15)])
def test_micro_batches_stay_on_the_device(
    path: str, tensor: int, context: int, copies: int
) -> None:
    result = on_a_fake_device(path, str(tensor), str(context))
    assert result["devices"] == ["npu"]
    # Of each of the four micro-batches once, out of pinned memory, and not back.
    assert result["copies"] == {"cpu to npu": 4 * copies}
    assert result["pinned"] == 4 * copies
    assert result["gradients"] == 19


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("stray", "Expected all tensors to be on the same device"),
        ("read", "DataDependentOutputException"),
    ],
)
def test_a_stray_tensor_and_a_read_are_found(fault: str, error: str) -> None:
    on_a_fake_device("cuda", "1", "1", fault, expect_error=error)
