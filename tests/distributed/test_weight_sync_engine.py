"""Broadcast pushes into real vLLM engines, whole ones and broken ones.

Sender and engine are each in a child process: gloo's threads must not be in one that forks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from r2vpo_megatron.rollout.weight_receiver import INTERRUPTED
from r2vpo_megatron.rollout.weight_updates import WeightTransferInterrupted, WeightUpdateError
from r2vpo_megatron.weight_sync import BACKENDS
from tests.distributed.engine_in_child import (
    PROMPTS,
    SMALL_BUCKET_BYTES,
    EngineInChild,
    checkpoint_tensors,
    engine_process,
    hf_greedy,
    make_model,
    start_engine,
    stop_engine,
)

pytest.importorskip("vllm")


class Sender:
    """The sender's process: a back end and a push that is under way."""

    def __init__(self, backend: str) -> None:
        self._sender = BACKENDS[backend](SMALL_BUCKET_BYTES)

    def offer(self, size: int, timeout_seconds: float) -> Any:
        return self._sender.offer_connection("127.0.0.1", size, timeout_seconds)

    def join(self) -> None:
        self._sender.join_connection()

    def open(self, version: int, model: PreTrainedModel) -> None:
        self._buckets = self._sender.buckets(version, checkpoint_tensors(model))

    def next(self) -> Any:
        return next(self._buckets, None)

    def checksum(self) -> int:
        return self._sender.push_checksum

    def close(self) -> None:
        self._sender.close()


SENDER_OF_CHILD: list[Sender] = []  # filled in the child process only


def start_sender(backend: str) -> None:
    SENDER_OF_CHILD.append(Sender(backend))


def call_sender(method: str, args: tuple[Any, ...]) -> Any:
    return getattr(SENDER_OF_CHILD[0], method)(*args)


class SenderInChild:
    def __init__(self, pool: ProcessPoolExecutor, engine: EngineInChild, num_workers: int) -> None:
        self._pool, self._engine, self._size = pool, engine, 1 + num_workers

    def start(self, method: str, *args: Any) -> Any:
        return self._pool.submit(call_sender, method, args)

    def call(self, method: str, *args: Any) -> Any:
        return self.start(method, *args).result(timeout=60)

    def connect(self, timeout_seconds: float = 20.0) -> None:
        connection = self.call("offer", self._size, timeout_seconds)
        joining = self.start("join")
        self._engine.call("weights.connect", connection, 1)
        joining.result(timeout=60)

    def push(self, version: int, model: PreTrainedModel) -> dict[str, float]:
        self._engine.call("weights.begin", version)
        self.call("open", version, model)
        times: dict[str, float] = {}
        while (bucket := self.call("next")) is not None:
            times = self._engine.call("weights.load", bucket)
        self._engine.call("weights.finish", version, self.call("checksum"))
        self.call("close")
        return times


def greedy(model: PreTrainedModel) -> list[tuple[int, ...]]:
    return [hf_greedy(model, prompt) for prompt in PROMPTS]


@pytest.fixture
def sender_pool() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        yield pool


def run_pushes(tmp_path: Path, sender_pool: ProcessPoolExecutor, backend: str, tp: int) -> None:
    model_a, model_b = (make_model("pangu_tied", seed) for seed in (1, 2))
    model_a.save_pretrained(tmp_path)
    sender_pool.submit(start_sender, backend).result(timeout=60)
    with engine_process() as engine_pool:
        engine_pool.submit(start_engine, tmp_path, tp).result(timeout=120)
        engine = EngineInChild(engine_pool)
        sender = SenderInChild(sender_pool, engine, tp)
        sender.connect()
        for version, model in enumerate((model_b, model_a, model_b), start=1):
            times = sender.push(version, model)
            assert set(times) == {
                f"weight_sync/{stage}_seconds" for stage in ("receive", "verify", "load")
            }
            assert engine.call("policy_version") == version
            assert engine.greedy() == greedy(model)
        if backend == "gloo":
            _break_a_push(engine, sender, model_a)
            sender.connect()
        sender.push(4, model_a)
        assert engine.greedy() == greedy(model_a)
        engine_pool.submit(stop_engine).result(timeout=60)


def _break_a_push(engine: EngineInChild, sender: SenderInChild, model: PreTrainedModel) -> None:
    """The engine hears of buckets that are not sent: the sender waits for it, then leaves."""
    sender.connect(timeout_seconds=3.0)
    engine.call("weights.begin", 4)
    sender.call("open", 4, model)
    for _ in range(2):
        engine.call("weights.load", sender.call("next"))
    bucket = sender.call("next")
    with pytest.raises(WeightTransferInterrupted):  # the engine does not take it
        for _ in range(2):
            sender.call("next")
    sender.call("offer", 2, 1.0)  # leaves the group
    assert engine.call("weights.load", bucket) == {INTERRUPTED: 1.0}
    with pytest.raises(WeightUpdateError, match="version 4 has failed|needs a complete push"):
        engine.greedy()
    assert engine.call("policy_version") == 3


@pytest.mark.slow
def test_an_engine_takes_broadcasts_and_recovers_from_a_broken_one(
    tmp_path: Path, sender_pool: ProcessPoolExecutor
) -> None:
    run_pushes(tmp_path, sender_pool, "gloo", tp=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gloo", "shared_memory"])
def test_every_tensor_parallel_worker_is_a_member(
    tmp_path: Path, sender_pool: ProcessPoolExecutor, backend: str
) -> None:
    run_pushes(tmp_path, sender_pool, backend, tp=2)
