"""A whole push over gloo through Ray, in which an engine is killed half-way."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from r2vpo_megatron.config import (
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
    WeightSyncConfig,
)
from r2vpo_megatron.orchestration.cluster import ray_session
from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.placement import needed_resources
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.orchestration.weight_push import push_weights
from tests.distributed.engine_in_child import hf_logprobs, make_model

pytest.importorskip("vllm")

TOKENS = [[5, 17, 3, 90, 41, 8, 2, 11]]


class EngineKiller:
    """A learner that kills an engine's process when its third bucket is asked for, once."""

    def __init__(self, learner: LearnerGroup, pid: int) -> None:
        self._learner, self._pid, self._asked = learner, pid, 0
        self.num_abandoned = 0
        self.connected_members: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def ask_for_bucket(self) -> Any:
        self._asked += 1
        if self._asked == 3:
            os.kill(self._pid, signal.SIGKILL)
        return self._learner.ask_for_bucket()

    def abandon_weight_push(self) -> None:
        self.num_abandoned += 1
        self._learner.abandon_weight_push()


def engine_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return sorted(p.pid for p in children if "RolloutWorker" in " ".join(p.cmdline()))


def push_with_a_loss(folder_of_engines: Path, folder_of_learner: Path) -> dict[str, Any]:
    config = RunConfig(
        model=ModelConfig(path=str(folder_of_engines), dtype="float32"),
        parallel=ParallelConfig(tensor=2),
        rollout=RolloutConfig(
            num_engines=2,
            max_prompt_tokens=8,
            max_response_tokens=8,
            max_num_seqs=4,
            kv_cache_bytes=16 << 20,
            slice_seconds=0.02,
            hang_seconds=20.0,
        ),
        weight_sync=WeightSyncConfig(backend="gloo", bucket_bytes=8 << 10),
        runtime=RuntimeConfig(device="cpu", object_store_bytes=80 << 20, timeout_seconds=200),
    )
    with ray_session(config, needed_resources(config)):
        learner, pool = (
            LearnerGroup(config, folder_of_learner),
            RolloutPool(config, folder_of_engines),
        )
        try:
            ray.get(learner.begin_start() + pool.begin_start(), timeout=200)
            learner.finish_start()
            pool.finish_start()
            killer: Any = EngineKiller(learner, engine_pids()[0])
            metrics = push_weights(killer, pool, 1)
            after_loss = pool.score_on_each(TOKENS)
            push_weights(killer, pool, 2)  # with whoever is there by now
            return {
                "metrics": metrics,
                "num_abandoned": killer.num_abandoned,
                "after_loss": after_loss,
                "version": pool.policy_version,
            }
        finally:
            pool.stop()


@pytest.mark.slow
def test_the_push_is_sent_again_to_the_engine_that_is_left(tmp_path: Path) -> None:
    make_model("pangu_untied", seed=1).save_pretrained(tmp_path / "engines")
    wanted = make_model("pangu_untied", seed=2)
    wanted.save_pretrained(tmp_path / "learner")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        running = pool.submit(push_with_a_loss, tmp_path / "engines", tmp_path / "learner")
        report = running.result(timeout=280)
    assert report["num_abandoned"] == 1
    assert report["metrics"]["weight_sync/num_buckets"] > 5
    assert report["version"] == 2
    (scores,) = report["after_loss"]  # one engine was left, and serves the learner's weights
    expected = hf_logprobs(wanted, TOKENS[0][:1], TOKENS[0][1:], 1.0)
    np.testing.assert_allclose(scores[0], expected, atol=1e-4)
