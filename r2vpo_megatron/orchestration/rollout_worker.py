"""Ray actor: one rollout engine. It forwards calls and holds no logic."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.cluster import current_node_id
from r2vpo_megatron.orchestration.watchdog import ENGINE, announce
from r2vpo_megatron.records import FloatArray, Generation
from r2vpo_megatron.rollout.dispatch import Additions
from r2vpo_megatron.rollout.engine import EngineReport
from r2vpo_megatron.rollout.shared_segments import list_segments, remove_segments
from r2vpo_megatron.rollout.weight_updates import WeightBucket


class RolloutWorker:
    """One vLLM engine in its own process."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Remember what `start` needs; vLLM is imported there."""
        self._config, self._model_dir = config, model_dir
        self._heartbeat = announce(ENGINE)

    def node_id(self) -> str:
        """Ray's id of the node this worker is on."""
        return current_node_id()

    def start(self, leftovers: Sequence[str] = ()) -> tuple[str, ...]:
        """Load the checkpoint into the engine; see `shared_segments` for what comes back.

        Args:
            leftovers: segments of the engine that this one replaces.
        """
        remove_segments(leftovers)
        # vLLM leaves a rendezvous file and sockets of every engine in the folder for temporary
        # files (vllm/utils/network_utils.py).
        self._scratch = tempfile.TemporaryDirectory(prefix="r2vpo-engine-")
        tempfile.tempdir = self._scratch.name
        from r2vpo_megatron.rollout.vllm_engine import VLLMEngine

        rollout = self._config.rollout
        with self._heartbeat.stage("start"):
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
        return self.shared_segments()

    def shared_segments(self) -> tuple[str, ...]:
        """What must be removed from /dev/shm if this process is killed."""
        return list_segments()

    def advance(self, additions: Additions, seconds: float) -> EngineReport:
        """Queue requests and sample for a slice of time; see `RolloutEngine`."""
        with self._heartbeat.stage("advance"):
            for requests, sampling in additions:
                self._engine.add_requests(requests, sampling)
            return self._engine.advance(seconds)

    def abort_requests(self) -> list[Generation]:
        """See `RolloutEngine.abort_requests`."""
        return self._engine.abort_requests()

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[FloatArray]:
        """See `RolloutEngine.score`."""
        with self._heartbeat.stage("score"):
            return self._engine.score(token_id_lists)

    def connect_weight_transfer(self, connection: Any, first_rank: int) -> None:
        """See `WeightReceiver.connect`."""
        self._engine.weights.connect(connection, first_rank)

    def begin_weight_update(self, version: int) -> None:
        """See `WeightReceiver.begin`."""
        self._engine.weights.begin(version)

    def load_weight_bucket(self, bucket: WeightBucket) -> dict[str, float]:
        """See `WeightReceiver.load`."""
        with self._heartbeat.stage("load_weight_bucket"):
            return self._engine.weights.load(bucket)

    def finish_weight_update(self, version: int, checksum: int) -> dict[str, float]:
        """See `WeightReceiver.finish`."""
        return self._engine.weights.finish(version, checksum)

    def stop(self) -> None:
        """End the engine's own processes."""
        if hasattr(self, "_engine"):  # it may not have come so far
            self._engine.shutdown()
            self._scratch.cleanup()
