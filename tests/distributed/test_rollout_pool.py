"""RolloutPool with real engines in Ray: pushes under load, engines killed and stopped.

Ray and the pool live in a child process, which they may not outlive; all processes carry a mark in
their environment by which they are found.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from r2vpo_megatron.config import (
    ModelConfig,
    PipelineConfig,
    RolloutConfig,
    RunConfig,
    RuntimeConfig,
)
from r2vpo_megatron.orchestration.cluster import ray_session
from r2vpo_megatron.orchestration.placement import needed_resources
from r2vpo_megatron.orchestration.pool_engines import EngineState
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.weight_sync import SharedMemorySender
from tests.distributed.tiny_checkpoints import VOCAB_SIZE, save_checkpoint
from tests.end_to_end.ring_runs import MARK, marked_processes, orphaned_segments

pytest.importorskip("vllm")

NUM_REQUESTS = 120
NUM_NEW_TOKENS = 52
SAMPLING = SamplingSettings.for_training(NUM_NEW_TOKENS, stop_token_ids=(3,))


@dataclass
class Scene:
    """What the child process holds."""

    pool: RolloutPool
    weights: dict[str, dict[str, torch.Tensor]]
    events: list[str]
    resources: contextlib.ExitStack


SCENE: list[Scene] = []  # filled in the child process only


def open_scene(folders: dict[str, Path]) -> None:
    resources = contextlib.ExitStack()
    config = RunConfig(
        model=ModelConfig(path=str(folders["a"]), dtype="float32"),
        rollout=RolloutConfig(
            num_engines=2,
            max_prompt_tokens=8,
            max_response_tokens=NUM_NEW_TOKENS,
            max_num_seqs=8,
            kv_cache_bytes=16 << 20,
            slice_seconds=0.02,
            hang_seconds=8.0,
            max_restarts=3,
        ),
        runtime=RuntimeConfig(device="cpu", object_store_bytes=80 << 20, timeout_seconds=240),
    )
    resources.enter_context(ray_session(config, needed_resources(config, with_learner=False)))
    pool = RolloutPool(config, folders["a"])
    resources.callback(pool.stop)
    ray.get(pool.begin_start(), timeout=240)
    pool.finish_start()
    weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
    SCENE.append(Scene(pool, weights, [], resources))
    pool.on_event = SCENE[0].events.append


def close_scene() -> None:
    SCENE.pop().resources.close()


def push(weights: str, version: int, only_waiting: bool = False) -> None:
    scene = SCENE[0]
    sender = SharedMemorySender(16 << 10)
    with scene.pool.pushing(version, only_waiting) as targets:
        targets.finish(targets.start("begin_weight_update", version))
        for bucket in sender.buckets(version, scene.weights[weights].items()):
            targets.finish(targets.start("load_weight_bucket", bucket))
        targets.finish(targets.start("finish_weight_update", version, sender.push_checksum))
    sender.close()


def requests_of(prefix: str, number: int = NUM_REQUESTS) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"{prefix}.{i:03d}", (5 + i % 7, 9, 11 + i % 3), seed=1000 + i)
        for i in range(number)
    ]


def under_load(prefix: str) -> list[str]:
    """Give the engines work; back when they are in the midst of it."""
    pool = SCENE[0].pool
    pool.submit(requests_of(prefix), SAMPLING)
    pool.wait_for(lambda finished: True if len(finished) >= 5 else None)
    return [request.sample_id for request in requests_of(prefix)]


def take_all(sample_ids: Sequence[str]) -> list[Generation]:
    pool = SCENE[0].pool
    pool.wait_for(lambda finished: True if set(sample_ids) <= set(finished) else None)
    assert len(pool._dispatcher.finished) == len(sample_ids)
    return pool.take(sample_ids)


def push_under_load(in_flight: str, weights: str) -> tuple[int, list[Generation], dict[str, float]]:
    pool = SCENE[0].pool
    pool._config = replace(pool._config, pipeline=PipelineConfig(in_flight=in_flight))
    pool.metrics()
    sample_ids = under_load(in_flight)
    before = pool.policy_version
    push(weights, before + 1)
    return before, take_all(sample_ids), pool.metrics()


def engine_pids() -> list[int]:
    processes = marked_processes(os.environ[MARK])
    return sorted(pid for pid, title in processes.items() if "ray::RolloutWorker" in title)


@dataclass
class LossReport:
    """What a scene of a lost engine has come to."""

    given: list[Generation]
    later: list[Generation]
    pids: tuple[list[int], list[int]]  # before and after
    events: list[str]
    scores: list[list[FloatArray]]
    metrics: dict[str, float]


def lose_under_load(kill_signal: int, weights: str) -> LossReport:
    scene = SCENE[0]
    pool = scene.pool
    scene.events.clear()
    pool.metrics()
    pids_before = engine_pids()
    sample_ids = under_load(signal.Signals(kill_signal).name)
    os.kill(pids_before[0], kill_signal)
    given = take_all(sample_ids)

    pool.refresh = lambda: push(weights, pool.policy_version, only_waiting=True)
    pool.wait_for(
        lambda finished: True if len(pool._loop.in_state(EngineState.SERVING)) == 2 else None
    )
    deadline = time.monotonic() + 20
    while pids_before[0] in engine_pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    return LossReport(
        given=given,
        later=pool.generate(requests_of(f"after {kill_signal}"), SAMPLING),
        pids=(pids_before, engine_pids()),
        events=list(scene.events),
        scores=pool.score_on_each([[5, 9, 11, 20, 30], [6, 7]]),
        metrics=pool.metrics(),
    )


@dataclass
class Child:
    """The child process, and the models whose weights it can push."""

    executor: ProcessPoolExecutor
    models: dict[str, torch.nn.Module]
    versions: dict[int, str]  # version -> name of the weights

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.executor.submit(function, *args).result(timeout=240)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    folder = tmp_path_factory.mktemp("models")
    folders = {"a": folder / "a", "b": folder / "b"}
    models = {  # one head: vLLM's CPU kernels do not take smaller ones
        name: save_checkpoint("qwen2-untied", path, num_heads=1, num_kv_heads=1)
        for name, path in folders.items()
    }
    _perturb(models["b"], folders["b"])
    mark, segments = uuid.uuid4().hex, set(os.listdir("/dev/shm"))
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, {MARK: mark}),
        ProcessPoolExecutor(max_workers=1, mp_context=context) as executor,
    ):
        executor.submit(open_scene, folders).result(timeout=270)
        yield Child(executor, models, {0: "a"})
        executor.submit(close_scene).result(timeout=60)
        left: list[Any] = []
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            processes = marked_processes(mark)
            left = [
                title
                for title in processes.values()
                if "multiprocessing" not in title  # the child itself, and what Python gives it
            ] + orphaned_segments(segments)
            if not left:
                break
            time.sleep(0.2)
        assert not left


def _perturb(model: torch.nn.Module, folder: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


@torch.no_grad()
def assert_logprobs_are_of_their_versions(child: Child, given: Sequence[Generation]) -> None:
    """Each token's log-prob is that of the weights it names, on all tokens before it."""
    prompts = {
        generation.sample_id: requests_of("")[index].prompt_token_ids
        for index, generation in enumerate(given)
    }
    for generation in given:
        prompt = prompts[generation.sample_id]
        ids = torch.tensor([[*prompt, *generation.token_ids]])
        chosen = ids[0, len(prompt) :, None]
        for version in set(generation.policy_versions.tolist()):
            logits = child.models[child.versions[version]](ids).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits.double(), -1).gather(1, chosen)[:, 0].numpy()
            of_version = generation.policy_versions == version
            np.testing.assert_allclose(
                generation.rollout_logprobs[of_version], expected[of_version], atol=1e-3
            )


def assert_whole(given: Sequence[Generation], prefix: str) -> None:
    assert [g.sample_id for g in given] == [r.sample_id for r in requests_of(prefix)]
    for generation in given:
        num_tokens = len(generation.token_ids)
        assert len(generation.rollout_logprobs) == len(generation.policy_versions) == num_tokens
        assert 3 not in generation.token_ids[:-1]
        if generation.finish_reason == "stop":
            assert generation.token_ids[-1] == 3
        else:
            assert generation.finish_reason == "length"
            assert num_tokens == NUM_NEW_TOKENS
        assert max(generation.token_ids) < VOCAB_SIZE


@pytest.mark.parametrize(("in_flight", "weights"), [("keep", "b"), ("abort", "a"), ("drain", "b")])
def test_a_push_under_load(child: Child, in_flight: str, weights: str) -> None:
    before, given, metrics = child.call(push_under_load, in_flight, weights)
    child.versions[before + 1] = weights
    assert_whole(given, in_flight)
    assert_logprobs_are_of_their_versions(child, given)
    sampled_by = [tuple(sorted(set(g.policy_versions.tolist()))) for g in given]
    assert (before,) in sampled_by
    assert (before + 1,) in sampled_by  # what came to an engine after the push
    is_mixed = (before, before + 1) in sampled_by
    assert is_mixed == (in_flight != "drain")
    assert metrics["rollout/num_restarts"] == metrics["rollout/num_resent"] == 0
    assert 0 <= metrics["rollout/idle_fraction"] < 1
    assert metrics["memory/rollout_bytes"] > 100 << 20


@pytest.mark.parametrize(
    ("kill_signal", "cause"),
    [
        pytest.param(signal.SIGKILL, "ActorDiedError: ", id="killed"),
        pytest.param(signal.SIGSTOP, "no report in 8 s", id="stopped", marks=pytest.mark.slow),
    ],
)
def test_an_engine_is_lost_under_load(child: Child, kill_signal: int, cause: str) -> None:
    """Every response comes once; the engine comes back, with the weights of the last push."""
    version = max(child.versions)
    report = child.call(lose_under_load, kill_signal, child.versions[version])
    assert_whole(report.given, signal.Signals(kill_signal).name)
    assert_whole(report.later, f"after {kill_signal}")
    for given in (report.given, report.later):
        assert {version} == {v for g in given for v in g.policy_versions.tolist()}
        assert_logprobs_are_of_their_versions(child, given)
    (event,) = report.events
    assert f" was lost ({cause}" in event
    assert report.metrics["rollout/num_restarts"] == 1
    assert 1 <= report.metrics["rollout/num_resent"] <= 10  # max_num_seqs and a quarter

    before, after = report.pids
    assert len(before) == len(after) == 2
    assert len(set(before) & set(after)) == 1  # the lost process is gone
    assert len(report.scores) == 2
    model = child.models[child.versions[version]]
    for of_engine in report.scores:
        for token_ids, scored in zip([[5, 9, 11, 20, 30], [6, 7]], of_engine, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([token_ids])).logits[0, :-1].double()
            expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids[1:])[:, None])
            np.testing.assert_allclose(scored, expected[:, 0].numpy(), atol=1e-3)
