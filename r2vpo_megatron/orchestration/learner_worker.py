"""Ray actor: one learner rank. It forwards calls and holds no logic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.observability.memory import resident_bytes
from r2vpo_megatron.orchestration.cluster import current_node_id, free_tcp_address
from r2vpo_megatron.orchestration.watchdog import announce, learner_name
from r2vpo_megatron.records import FloatArray, PackedBatch, UpdateResult
from r2vpo_megatron.weight_sync import BACKENDS
from r2vpo_megatron.weight_sync.protocol import WeightBucket, WeightConnection


class LearnerWorker:
    """One Megatron rank in its own process.

    Its heartbeat enters the same stages on every rank, for the watchdog to compare.
    """

    def __init__(self, config: RunConfig, model_dir: Path, rank: int) -> None:
        """Remember what `start` needs; nothing heavy is imported yet."""
        self._config, self._model_dir, self._rank = config, model_dir, rank
        self._heartbeat = announce(learner_name(rank))
        self._buckets: Iterator[WeightBucket] = iter(())
        self._weights: Any = None  # HfWeights, of the open push
        self._num_buckets = 0  # asked for in the open push

    def rendezvous_address(self) -> str:
        """A free address on this rank's node."""
        return free_tcp_address()

    def node_id(self) -> str:
        """Ray's id of the node this worker is on."""
        return current_node_id()

    def resident_bytes(self) -> int:
        """Resident memory of this process, in bytes."""
        return resident_bytes()

    def start(self, init_method: str) -> int:
        """Join the learner's process group and build the model; this rank's data parallel rank.

        Collective: every rank must call.
        """
        from r2vpo_megatron.learner.start import start_learner

        with self._heartbeat.stage("start"):
            self._actor, state = start_learner(
                self._config, self._model_dir, self._rank, init_method
            )
        self._sender = BACKENDS[self._config.weight_sync.backend](
            self._config.weight_sync.bucket_bytes
        )
        return state.data_rank

    def compute_logprobs(
        self, batches: Sequence[PackedBatch], temperature: float | None
    ) -> dict[str, FloatArray]:
        """See MegatronActor.compute_logprobs."""
        with self._heartbeat.stage("compute_logprobs"):
            return self._actor.compute_logprobs(self._heartbeat.counted(batches), temperature)

    def update(
        self, batches: Sequence[PackedBatch], ratio_penalty: float, policy_version: int
    ) -> UpdateResult:
        """See MegatronActor.update; what it refuses is a result as well."""
        from r2vpo_megatron.learner.non_finite import NonFiniteUpdate

        with self._heartbeat.stage("update"):
            counted = self._heartbeat.counted(batches)
            try:
                return UpdateResult(self._actor.update(counted, ratio_penalty, policy_version))
            except NonFiniteUpdate as error:
                return UpdateResult({}, error.reason, error.sample_ids)

    def begin_save_state(self, folder: Path) -> None:
        """See MegatronActor.begin_save_state."""
        with self._heartbeat.stage("begin_save_state"):
            self._actor.begin_save_state(folder)

    def is_state_saved(self) -> bool:
        """See MegatronActor.is_state_saved."""
        return self._actor.is_state_saved()

    def finish_save_state(self) -> None:
        """See MegatronActor.finish_save_state."""
        with self._heartbeat.stage("finish_save_state"):
            self._actor.finish_save_state()

    def load_state(self, folder: Path) -> None:
        """See MegatronActor.load_state."""
        with self._heartbeat.stage("load_state"):
            self._actor.load_state(folder)

    def save_hf(self, output_dir: Path) -> None:
        """See MegatronActor.save_hf."""
        with self._heartbeat.stage("save_hf"):
            self._actor.save_hf(output_dir)

    def offer_weight_connection(self, size: int, timeout_seconds: float) -> WeightConnection | None:
        """On rank 0: where `size` - 1 receivers can meet it; None if the back end needs none."""
        if not self._sender.needs_connection:
            return None
        return self._sender.offer_connection(ray.util.get_node_ip_address(), size, timeout_seconds)

    def join_weight_connection(self) -> None:
        """On rank 0: join what was offered, as the receivers do at the same time."""
        self._sender.join_connection()

    def open_weight_push(self, version: int) -> None:
        """On rank 0: get ready to hand out buckets."""
        self._heartbeat.enter("weight_push")
        self._num_buckets = 0
        self._weights = self._actor.hf_weights()
        self._buckets = self._sender.buckets(version, self._weights.in_pieces())

    def next_weight_bucket(self) -> WeightBucket | None:
        """On rank 0: the next bucket, freeing all but the last one given; None at the end."""
        self._num_buckets += 1
        self._heartbeat.step(self._num_buckets)
        return next(self._buckets, None)

    def close_weight_push(self) -> tuple[int, dict[str, float]]:
        """On rank 0: checksum and metrics of the push."""
        checksum, metrics = self._sender.push_checksum, self._sender.metrics()
        self._sender.end_push()
        self._heartbeat.leave()
        return checksum, metrics

    def abandon_weight_push(self) -> None:
        """On rank 0: give up the open push, gathering to the end as the other ranks do."""
        from r2vpo_megatron.learner.megatron_actor import exhaust

        self._sender.end_push()
        exhaust(self._weights.in_pieces())
        self._heartbeat.leave()

    def join_weight_push(self) -> None:
        """On the other ranks: take part in gathering the weights."""
        from r2vpo_megatron.learner.megatron_actor import exhaust

        with self._heartbeat.stage("weight_push"):
            exhaust(self._actor.hf_weights().in_pieces())
