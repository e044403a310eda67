"""A Slurm for the tests of this folder, and a tiny model for its jobs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from r2vpo_megatron.testbed.tiny_model import make_tiny_model
from tests.end_to_end.ring_runs import SMALL
from tests.slurm.mini_cluster import MiniSlurm, why_not

NUM_NODES = 5  # one more than a job of four, so that a dead one can be replaced


@pytest.fixture(scope="session")
def cluster() -> Iterator[MiniSlurm]:
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="r2vpo-slurm-"))
    slurm = MiniSlurm(folder / "ms", NUM_NODES)
    try:
        slurm.up()
        yield slurm
    finally:
        slurm.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_pangu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pangu"
    make_tiny_model(folder, "pangu", warm_start=False)
    return folder


@pytest.fixture
def variables(tiny_pangu: Path, tmp_path: Path) -> dict[str, str]:
    """What makes any training job small and of the CPU; by documented variables alone."""
    fields = {name: value for name, value in SMALL.items() if name != "train.num-iterations"} | {
        "model.dtype": "float32",
        "model.testbed": "",
        "rollout.max-prompt-tokens": "64",
        "parallel.max-tokens-per-micro-batch": "8192",
        "data.reward": "tests.end_to_end.parity_reward:reward",
        "data.chat-template": "model",
        "data.thinking": "",
        "checkpoint.every-iterations": "1",
        "checkpoint.asynchronous": "false",
        "algorithm.overlong-buffer-tokens": "0",
        "runtime.timeout-seconds": "200",
    }
    return {
        "SITE": "none",
        "DEVICE": "cpu",
        "DEVICES_PER_NODE": "1",
        "INTERFACE": "eth0",
        "DOCTOR": "0",
        "MAX_FAILURES": "0",  # a fault that another attempt would hide is one
        "MODEL_PATH": str(tiny_pangu),
        "TRAIN_PROMPTS": str(tiny_pangu / "train.jsonl"),
        "HELD_OUT_PROMPTS": str(tiny_pangu / "held_out.jsonl"),
        "OUTPUT_DIR": str(tmp_path),
        "RUN_NAME": "run",
        "ARGS": " ".join(f"--{name}={value}" for name, value in fields.items()),
    }
