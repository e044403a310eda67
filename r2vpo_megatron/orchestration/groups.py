"""The driver's handles on the two groups of processes: learner ranks and rollout engines.

Each method is one step of the loop: it calls all workers of the group at once, waits with a
deadline and returns plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.packing import pack_trajectories
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.orchestration.workers import LearnerWorker, RolloutWorker
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest, Trajectory
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import engine_environment


class LearnerGroup:
    """All Megatron ranks of the learner."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Create the ranks' processes; `start` builds the model in them."""
        self._config = config
        self._timeout = config.runtime.timeout_seconds
        options = _actor_options(config, {"OMP_NUM_THREADS": str(config.parallel.threads_per_rank)})
        worker = ray.remote(LearnerWorker)
        self._ranks = [
            worker.options(**options).remote(config, model_dir, rank)
            for rank in range(config.parallel.num_ranks)
        ]
        self._data_ranks: list[int] = []

    def start(self) -> list[Any]:
        """Begin building the model; `wait_started` waits."""
        init_method = ray.get(self._ranks[0].rendezvous_address.remote(), timeout=self._timeout)
        return [rank.start.remote(init_method) for rank in self._ranks]

    def wait_started(self, pending: list[Any]) -> None:
        """Wait until every rank is ready."""
        self._data_ranks = [
            layout["data_rank"] for layout in ray.get(pending, timeout=self._timeout)
        ]

    def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> dict[str, FloatArray]:
        """sample id -> [R] fp32 log-probs of the current weights."""
        merged: dict[str, FloatArray] = {}
        for part in self._call_with_batches("compute_logprobs", trajectories):
            merged.update(part)
        return merged

    def update(self, trajectories: Sequence[Trajectory], ratio_penalty: float) -> dict[str, float]:
        """One optimizer step on these samples; its metrics."""
        metrics: dict[str, float] = self._call_with_batches("update", trajectories, ratio_penalty)[
            0
        ]
        return metrics

    def save_hf(self, output_dir: Path) -> None:
        """Write the weights as a Hugging Face checkpoint."""
        self._call("save_hf", output_dir)

    def push_weights(self, rollout: RolloutGroup, version: int) -> dict[str, float]:
        """Stream the current weights to every engine, bucket by bucket, as `version`.

        An engine serves the new version only after all buckets came in and their checksum
        agreed. On a failure the push is called off and the error raised.
        """
        writer, *others = self._ranks
        joined = [rank.join_weight_push.remote() for rank in others]
        rollout.weight_update("begin_weight_update", version)
        try:
            ray.get(writer.open_weight_push.remote(version), timeout=self._timeout)
            metrics: dict[str, float] = {}
            while bucket := ray.get(writer.next_weight_bucket.remote(), timeout=self._timeout):
                for name, value in rollout.weight_update("load_weight_bucket", bucket).items():
                    metrics[name] = metrics.get(name, 0.0) + value
            checksum, sender_metrics = ray.get(
                writer.close_weight_push.remote(), timeout=self._timeout
            )
            ray.get(joined, timeout=self._timeout)
            metrics |= rollout.weight_update("finish_weight_update", version, checksum)
        except BaseException:
            rollout.weight_update("abort_weight_update")
            raise
        return {**metrics, **sender_metrics}

    def _call(self, method: str, *args: Any) -> list[Any]:
        results: list[Any] = ray.get(
            [getattr(rank, method).remote(*args) for rank in self._ranks], timeout=self._timeout
        )
        return results

    def _call_with_batches(
        self, method: str, trajectories: Sequence[Trajectory], *args: Any
    ) -> list[Any]:
        parallel = self._config.parallel
        batches = pack_trajectories(
            trajectories,
            max_tokens_per_micro_batch=parallel.max_tokens_per_micro_batch,
            num_data_parallel_ranks=parallel.data,
            pad_to_multiple_of=parallel.tensor if parallel.sequence_parallel else 1,
        )
        stored = [ray.put(rank_batches) for rank_batches in batches]
        results: list[Any] = ray.get(
            [
                getattr(rank, method).remote(stored[data_rank], *args)
                for rank, data_rank in zip(self._ranks, self._data_ranks, strict=True)
            ],
            timeout=self._timeout,
        )
        return results


class RolloutGroup:
    """All rollout engines, data parallel."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Create the engines' processes; `start` loads the model in them."""
        self._timeout = config.runtime.timeout_seconds
        device_name = get_platform(config.runtime.device).name
        options = _actor_options(config, engine_environment(device_name))
        worker = ray.remote(RolloutWorker)
        self._engines = [
            worker.options(**options).remote(config, model_dir, index)
            for index in range(config.rollout.num_engines)
        ]

    def start(self) -> list[Any]:
        """Begin loading the engines; `wait_started` waits."""
        return [engine.start.remote() for engine in self._engines]

    def wait_started(self, pending: list[Any]) -> None:
        """Wait until every engine serves."""
        ray.get(pending, timeout=self._timeout)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request, in the order of the requests."""
        num_engines = len(self._engines)
        parts = ray.get(
            [
                engine.generate.remote(requests[index::num_engines], sampling)
                for index, engine in enumerate(self._engines)
            ],
            timeout=self._timeout,
        )
        by_sample = {generation.sample_id: generation for part in parts for generation in part}
        return [by_sample[request.sample_id] for request in requests]

    def weight_update(self, method: str, *args: Any) -> dict[str, float]:
        """Call one of the engines' weight update methods on all; the slowest engine's times."""
        results = ray.get(
            [engine.weight_update.remote(method, *args) for engine in self._engines],
            timeout=self._timeout,
        )
        return {name: max(result[name] for result in results) for name in results[0]}

    def stop(self) -> None:
        """End the engines' own processes."""
        ray.get([engine.stop.remote() for engine in self._engines], timeout=60)


def _actor_options(config: RunConfig, env_vars: dict[str, str]) -> dict[str, Any]:
    """Ray options of one worker: a CPU slot, its accelerator where there is one, environment."""
    resource = get_platform(config.runtime.device).accelerator_resource()
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": env_vars}}
    if resource == "GPU":
        options["num_gpus"] = 1
    elif resource is not None:
        options["resources"] = {resource: 1}
    return options
