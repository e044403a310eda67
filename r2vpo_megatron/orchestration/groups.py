"""The driver's handles on the two groups of processes: learner ranks and rollout engines.

Each method is one step of the loop: it calls all workers of the group at once, waits with a
deadline and returns plain values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.packing import pack_trajectories, packing_statistics
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.orchestration.cluster import wait_for
from r2vpo_megatron.orchestration.workers import LearnerWorker, RolloutWorker
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest, Trajectory
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import engine_environment
from r2vpo_megatron.weight_sync.protocol import WeightBucket

STOP_SECONDS = 15.0  # for engines to end their own processes


class LearnerGroup:
    """All Megatron ranks of the learner."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Create the ranks' processes; `begin_start` builds the model in them."""
        self._config = config
        self._timeout = config.runtime.timeout_seconds
        threads = {"OMP_NUM_THREADS": str(config.parallel.threads_per_rank)}
        worker = ray.remote(LearnerWorker)
        self._ranks = [
            worker.options(**_actor_options(config, threads)).remote(config, model_dir, rank)
            for rank in range(config.parallel.num_ranks)
        ]
        self._starts: list[Any] = []
        self._data_ranks: list[int] = []

    def begin_start(self) -> list[Any]:
        """Begin building the model in every rank; references to wait for."""
        init_method = ray.get(self._ranks[0].rendezvous_address.remote(), timeout=self._timeout)
        self._starts = [rank.start.remote(init_method) for rank in self._ranks]
        return self._starts

    def finish_start(self) -> None:
        """Wait until every rank is ready, and learn which batches it wants."""
        self._data_ranks = ray.get(self._starts, timeout=self._timeout)

    def node_id(self) -> str:
        """The node of rank 0, which sends the weights."""
        return str(ray.get(self._ranks[0].node_id.remote(), timeout=self._timeout))

    def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> dict[str, FloatArray]:
        """sample id -> [R] fp32 log-probs of the current weights."""
        parts, _ = self._call_with_batches("compute_logprobs", trajectories)
        return {sample_id: logprobs for part in parts for sample_id, logprobs in part.items()}

    def update(self, trajectories: Sequence[Trajectory], ratio_penalty: float) -> dict[str, float]:
        """One optimizer step on these samples; its metrics."""
        results, packing = self._call_with_batches("update", trajectories, ratio_penalty)
        return {**results[0], **packing}

    def save_hf(self, output_dir: Path) -> None:
        """Write the weights as a Hugging Face checkpoint."""
        ray.get([rank.save_hf.remote(output_dir) for rank in self._ranks], timeout=self._timeout)

    def push_weights(self, rollout: RolloutGroup, version: int) -> dict[str, float]:
        """Stream the current weights to every engine, bucket by bucket, as `version`.

        An engine serves the new version only after all buckets came in and their checksum
        agreed; from the first call on until then it refuses to generate. So an error on the way
        ends the run: no response is ever sampled from weights of unknown version.
        """
        writer, *others = self._ranks
        joined = [rank.join_weight_push.remote() for rank in others]
        rollout.begin_weight_update(version)
        metrics: dict[str, float] = {}
        wait_for(writer.open_weight_push.remote(version), joined, self._timeout)
        while bucket := wait_for(writer.next_weight_bucket.remote(), joined, self._timeout):
            for name, value in rollout.load_weight_bucket(bucket).items():
                metrics[name] = metrics.get(name, 0.0) + value
        checksum, sent = wait_for(writer.close_weight_push.remote(), joined, self._timeout)
        ray.get(joined, timeout=self._timeout)
        finished = rollout.finish_weight_update(version, checksum)
        return {**metrics, **finished, **sent}

    def _call_with_batches(
        self, method: str, trajectories: Sequence[Trajectory], *args: Any
    ) -> tuple[list[Any], dict[str, float]]:
        """Every rank's result of a method that takes micro-batches, and how they were packed."""
        parallel = self._config.parallel
        batches = pack_trajectories(
            trajectories,
            max_tokens_per_micro_batch=parallel.max_tokens_per_micro_batch,
            num_data_parallel_ranks=parallel.data,
            pad_to_multiple_of=parallel.tokens_multiple,
        )
        stored = [ray.put(rank_batches) for rank_batches in batches]
        results: list[Any] = ray.get(
            [
                getattr(rank, method).remote(stored[data_rank], *args)
                for rank, data_rank in zip(self._ranks, self._data_ranks, strict=True)
            ],
            timeout=self._timeout,
        )
        return results, packing_statistics(batches, parallel.max_tokens_per_micro_batch)


class RolloutGroup:
    """All rollout engines, data parallel."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Create the engines' processes; `begin_start` loads the model in them."""
        self._timeout = config.runtime.timeout_seconds
        environment = engine_environment(config.runtime.device, config.rollout.threads_per_engine)
        options = _actor_options(config, environment, config.rollout.tensor_parallel)
        worker = ray.remote(RolloutWorker)
        self._engines = [
            worker.options(**options).remote(config, model_dir)
            for _ in range(config.rollout.num_engines)
        ]

    def begin_start(self) -> list[Any]:
        """Begin loading the model in every engine; references to wait for."""
        return [engine.start.remote() for engine in self._engines]

    def node_ids(self) -> set[str]:
        """The nodes that engines are on."""
        return set(
            ray.get([engine.node_id.remote() for engine in self._engines], timeout=self._timeout)
        )

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request, in the order of the requests.

        Consecutive requests go to one engine, so that the responses of a group share the cache
        of their prompt.
        """
        share = math.ceil(len(requests) / len(self._engines))
        parts = ray.get(
            [
                engine.generate.remote(requests[index * share : (index + 1) * share], sampling)
                for index, engine in enumerate(self._engines)
            ],
            timeout=self._timeout,
        )
        by_sample = {generation.sample_id: generation for part in parts for generation in part}
        return [by_sample[request.sample_id] for request in requests]

    def generate_unordered(
        self, chunks: Iterable[Sequence[GenerationRequest]], sampling: SamplingSettings
    ) -> Iterator[list[Generation]]:
        """Give each chunk's responses, in the order of its requests, as chunks are finished.

        Every engine has a chunk under way while the caller works on what it got; `chunks` is
        asked for the next one when an engine is free.

        Raises:
            TimeoutError: no engine finished a chunk in `runtime.timeout_seconds`.
        """
        waiting = iter(chunks)
        engine_of: dict[Any, Any] = {}

        def hand_out(engine: Any) -> None:
            chunk = next(waiting, None)
            if chunk is not None:
                engine_of[engine.generate.remote(chunk, sampling)] = engine

        for engine in self._engines:
            hand_out(engine)
        while engine_of:
            ready, _ = ray.wait(list(engine_of), num_returns=1, timeout=self._timeout)
            if not ready:
                raise TimeoutError(f"no engine finished a chunk in {self._timeout:g} s")
            generations: list[Generation] = ray.get(ready[0])
            hand_out(engine_of.pop(ready[0]))
            yield generations

    def begin_weight_update(self, version: int) -> None:
        """Open a push on every engine."""
        ray.get(
            [engine.begin_weight_update.remote(version) for engine in self._engines],
            timeout=self._timeout,
        )

    def load_weight_bucket(self, bucket: WeightBucket) -> dict[str, float]:
        """Load one bucket into every engine; the slowest engine's times."""
        return self._slowest([engine.load_weight_bucket.remote(bucket) for engine in self._engines])

    def finish_weight_update(self, version: int, checksum: int) -> dict[str, float]:
        """Verify and activate the push on every engine; the slowest engine's times."""
        return self._slowest(
            [engine.finish_weight_update.remote(version, checksum) for engine in self._engines]
        )

    def _slowest(self, references: list[Any]) -> dict[str, float]:
        results = ray.get(references, timeout=self._timeout)
        return {name: max(result[name] for result in results) for name in results[0]}

    def stop(self) -> None:
        """End the engines' own processes, as far as they answer in time; Ray ends the others."""
        ray.wait(
            [engine.stop.remote() for engine in self._engines],
            num_returns=len(self._engines),
            timeout=STOP_SECONDS,
        )


def needed_resources(config: RunConfig, *, with_learner: bool = True) -> dict[str, int]:
    """What all workers of a run ask of Ray: a CPU slot and their devices each.

    Args:
        config: of the run.
        with_learner: False where there are engines only.
    """
    num_ranks = config.parallel.num_ranks if with_learner else 0
    num_devices = num_ranks + config.rollout.num_engines * config.rollout.tensor_parallel
    device = get_platform(config.runtime.device).accelerator_resource()
    num_actors = num_ranks + config.rollout.num_engines
    return {"CPU": num_actors} | ({device: num_devices} if device else {})


def _actor_options(
    config: RunConfig, env_vars: dict[str, str], num_devices: int = 1
) -> dict[str, Any]:
    """Ray options of one worker: a CPU slot, its devices where there are any, its environment."""
    device = get_platform(config.runtime.device).accelerator_resource()
    if device is None:
        env_vars = {**env_vars, "CUDA_VISIBLE_DEVICES": ""}  # the CPU was asked for
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": env_vars}}
    if device == "GPU":
        options["num_gpus"] = num_devices
    elif device is not None:
        options["resources"] = {device: num_devices}
    return options
