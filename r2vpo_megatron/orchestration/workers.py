"""Ray actors: a learner rank and a rollout engine. They forward calls and hold no logic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.cluster import current_node_id, free_tcp_address
from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest, PackedBatch
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.weight_sync import BACKENDS
from r2vpo_megatron.weight_sync.protocol import WeightBucket


class LearnerWorker:
    """One Megatron rank in its own process."""

    def __init__(self, config: RunConfig, model_dir: Path, rank: int) -> None:
        """Remember what `start` needs; nothing heavy is imported yet."""
        self._config, self._model_dir, self._rank = config, model_dir, rank
        self._buckets: Iterator[WeightBucket] = iter(())

    def rendezvous_address(self) -> str:
        """A free address on this rank's node."""
        return free_tcp_address()

    def node_id(self) -> str:
        """Ray's id of the node this worker is on."""
        return current_node_id()

    def start(self, init_method: str) -> int:
        """Join the learner's process group and build the model; this rank's data parallel rank.

        Collective: every rank must call.
        """
        from r2vpo_megatron.learner.start import start_learner

        self._actor, state = start_learner(self._config, self._model_dir, self._rank, init_method)
        self._sender = BACKENDS[self._config.weight_sync.backend](
            self._config.weight_sync.bucket_bytes
        )
        return state.data_rank

    def compute_logprobs(self, batches: Sequence[PackedBatch]) -> dict[str, FloatArray]:
        """See MegatronActor.compute_logprobs."""
        return self._actor.compute_logprobs(batches)

    def update(self, batches: Sequence[PackedBatch], ratio_penalty: float) -> dict[str, float]:
        """See MegatronActor.update."""
        return self._actor.update(batches, ratio_penalty)

    def save_hf(self, output_dir: Path) -> None:
        """See MegatronActor.save_hf."""
        self._actor.save_hf(output_dir)

    def open_weight_push(self, version: int) -> None:
        """On rank 0: get ready to hand out buckets."""
        self._buckets = self._sender.buckets(version, self._actor.hf_weights())

    def next_weight_bucket(self) -> WeightBucket | None:
        """On rank 0: the next bucket, freeing the one before; None at the end."""
        return next(self._buckets, None)

    def close_weight_push(self) -> tuple[int, dict[str, float]]:
        """On rank 0: checksum and metrics of the push."""
        checksum, metrics = self._sender.push_checksum, self._sender.metrics()
        self._sender.close()
        return checksum, metrics

    def join_weight_push(self) -> None:
        """On the other ranks: take part in gathering the weights."""
        from r2vpo_megatron.learner.megatron_actor import exhaust

        exhaust(self._actor.hf_weights())


class RolloutWorker:
    """One vLLM engine in its own process."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Remember what `start` needs; vLLM is imported there."""
        self._config, self._model_dir = config, model_dir

    def node_id(self) -> str:
        """Ray's id of the node this worker is on."""
        return current_node_id()

    def start(self) -> None:
        """Load the checkpoint into the engine."""
        from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

        rollout = self._config.rollout
        self._engine = VLLMEngine(
            self._model_dir,
            dtype=self._config.model.dtype,
            max_model_len=self._config.max_sequence_tokens,
            kv_cache_bytes=rollout.kv_cache_bytes,
            max_num_seqs=rollout.max_num_seqs,
            tensor_parallel=rollout.tensor_parallel,
            seed=self._config.train.seed,
            device_name=self._config.runtime.device,
            memory_fraction=rollout.memory_fraction,
        )

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """See RolloutEngine.generate."""
        return self._engine.generate(requests, sampling)

    def begin_weight_update(self, version: int) -> None:
        """See RolloutEngine.begin_weight_update."""
        self._engine.begin_weight_update(version)

    def load_weight_bucket(self, bucket: WeightBucket) -> dict[str, float]:
        """See VLLMEngine.load_weight_bucket."""
        return self._engine.load_weight_bucket(bucket)

    def finish_weight_update(self, version: int, checksum: int) -> dict[str, float]:
        """See RolloutEngine.finish_weight_update."""
        return self._engine.finish_weight_update(version, checksum)

    def stop(self) -> None:
        """End the engine's own processes."""
        self._engine.shutdown()
