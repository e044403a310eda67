"""The driver's handle on the learner's ranks.

Each method is one step of the loop: it calls all ranks at once, waits with a deadline and returns
plain values.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.data.packing import pack_trajectories, packing_statistics
from r2vpo_megatron.orchestration.cluster import get_in_time, wait_for
from r2vpo_megatron.orchestration.learner_worker import LearnerWorker
from r2vpo_megatron.orchestration.placement import (
    LEARNER_GROUP,
    actor_options,
    rank_placements,
)
from r2vpo_megatron.records import FloatArray, Trajectory, UpdateResult
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from r2vpo_megatron.weight_sync.protocol import WeightBucket, WeightConnection

PUSH_STAGE = "weight push"
LOOK_SECONDS = 5.0  # for ranks to answer; those at work do not
LOSS_SECONDS = 60.0  # for Ray to find that a node has gone


class RankLost(RuntimeError):
    """The process of a rank is gone."""


class LearnerGroup:
    """All Megatron ranks of the learner."""

    def __init__(self, config: RunConfig, model_dir: Path) -> None:
        """Create the ranks' processes; `begin_start` builds the model in them."""
        self._config = config
        self._timeout = config.runtime.timeout_seconds
        threads = {"OMP_NUM_THREADS": str(config.parallel.threads_per_rank)}
        worker = ray.remote(LearnerWorker)
        options = actor_options(config, threads, group=LEARNER_GROUP)
        self._ranks = [
            worker.options(**options, **place).remote(config, model_dir, rank)
            for rank, place in enumerate(rank_placements(config))
        ]
        self._starts: list[Any] = []
        self._data_ranks: list[int] = []
        self._asked: Any = None  # the bucket asked for last, a reference
        self._joined: list[Any] = []  # the other ranks' part of the open weight push
        self.connected_members: tuple[str, ...] = ()  # engines that rank 0's connection has

    def begin_start(self) -> list[Any]:
        """Begin building the model in every rank; references to wait for."""
        init_method = self._get(self._ranks[0].rendezvous_address.remote(), "start of rank 0")
        self._starts = [rank.start.remote(init_method) for rank in self._ranks]
        return self._starts

    def finish_start(self) -> None:
        """Wait until every rank is ready, and learn which batches it wants."""
        self._data_ranks = self._get(self._starts, "start")

    @contextlib.contextmanager
    def naming_lost_ranks(self, has_time: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Replace an error of the block that the loss of a rank brought about.

        Args:
            has_time: whether Ray is to be asked which it was, which can take a minute. Where the
                whole cluster is being ended, ranks go as well, and there is none.

        Raises:
            RankLost: naming those that are gone; what they, or ranks that were in step with them,
                raised is its cause.
        """
        try:
            yield
        except (RayActorError, RayTaskError) as error:
            if not has_time():
                raise
            is_loss = isinstance(error, RayActorError)  # else a rank may have raised by itself
            if not (lost := self._lost_ranks(LOSS_SECONDS if is_loss else LOOK_SECONDS)):
                raise
            named = ", ".join(map(str, lost))
            raise RankLost(
                f"learner rank {named} is gone: its process was killed, ran out of memory or "
                "crashed"
            ) from error

    def node_id(self) -> str:
        """The node of rank 0, which sends the weights."""
        return str(self._get(self._ranks[0].node_id.remote(), "start of rank 0"))

    def memory_metrics(self) -> dict[str, float]:
        """Resident memory of the rank that holds most, as `memory/learner_bytes`."""
        return {"memory/learner_bytes": float(max(self._call_all("resident_bytes")))}

    def compute_logprobs(
        self, trajectories: Sequence[Trajectory], temperature: float | None = None
    ) -> dict[str, FloatArray]:
        """sample id -> [R] fp32 log-probs of the current weights.

        Args:
            trajectories: whose responses; sample ids are unique.
            temperature: that logits are divided by; None for that of sampling.
        """
        parts, _ = self._call_with_batches("compute_logprobs", trajectories, temperature)
        return {sample_id: logprobs for part in parts for sample_id, logprobs in part.items()}

    def update(
        self, trajectories: Sequence[Trajectory], ratio_penalty: float, policy_version: int
    ) -> UpdateResult:
        """One optimizer step on these samples.

        Args:
            trajectories: of one mini-batch; the same sample may occur more than once.
            ratio_penalty: lambda of this update.
            policy_version: of the last push; the statistics by staleness count from it.
        """
        results, packing = self._call_with_batches(
            "update", trajectories, ratio_penalty, policy_version
        )
        result: UpdateResult = results[0]
        return replace(result, metrics=result.metrics | packing)

    def begin_save_state(self, folder: Path) -> None:
        """Let every rank begin to write its part of the learner's state; see LearnerState."""
        self._call_all("begin_save_state", folder)

    def is_state_saved(self) -> bool:
        """Whether all ranks have written."""
        return all(self._call_all("is_state_saved"))

    def finish_save_state(self) -> None:
        """Wait until all ranks have written.

        Raises:
            OSError: the disk is full or failed.
        """
        self._call_all("finish_save_state")

    def load_state(self, folder: Path) -> None:
        """Continue where `begin_save_state` was called; any layout may have written it."""
        self._call_all("load_state", folder)

    def save_hf(self, output_dir: Path) -> None:
        """Write the weights as a Hugging Face checkpoint."""
        self._call_all("save_hf", output_dir)

    def offer_weight_connection(self, size: int) -> WeightConnection | None:
        """Where receivers can meet rank 0; None if the back end needs no connection.

        Args:
            size: members, rank 0 included.
        """
        # Half of what an engine has to answer: those that wait in vain for one that hangs must not
        # themselves be taken for hanging.
        timeout_seconds = self._config.rollout.hang_seconds / 2
        offered = self._ranks[0].offer_weight_connection.remote(size, timeout_seconds)
        connection: WeightConnection | None = self._get(offered, "offer of a connection")
        return connection

    def begin_joining(self) -> Any:
        """Let rank 0 join its connection; a reference for `finish_joining`."""
        return self._ranks[0].join_weight_connection.remote()

    def finish_joining(self, reference: Any) -> None:
        """Wait until rank 0 has joined.

        Raises:
            WeightTransferInterrupted: the receivers did not come.
        """
        self._get(reference, "connection to the engines")

    def begin_weight_push(self, version: int) -> None:
        """Let all ranks begin to gather the weights, as `version`."""
        writer, *others = self._ranks
        self._joined = [rank.join_weight_push.remote() for rank in others]
        self._wait_for(writer.open_weight_push.remote(version))

    def ask_for_bucket(self) -> Any:
        """Ask for the next bucket; a reference for `await_bucket`.

        It says that the receivers have loaded all buckets but the last that was given.
        """
        self._asked = self._ranks[0].next_weight_bucket.remote()
        return self._asked

    def await_bucket(self, reference: Any) -> WeightBucket | None:
        """The bucket; None at the end.

        Raises:
            WeightTransferInterrupted: a receiver has gone, and the connection with it.
        """
        bucket: WeightBucket | None = self._wait_for(reference)
        return bucket

    def finish_weight_push(self) -> tuple[int, dict[str, float]]:
        """The push's checksum, and its sizes and stage times on rank 0."""
        closed = self._ranks[0].close_weight_push.remote()
        result: tuple[int, dict[str, float]] = self._wait_for(closed)
        self._get(self._joined, PUSH_STAGE)
        return result

    def abandon_weight_push(self) -> None:
        """Give up the open push; all ranks are in step again afterwards."""
        with contextlib.suppress(WeightUpdateError):  # Ray reports errors that nobody has seen
            self._wait_for(self._asked)
        self._wait_for(self._ranks[0].abandon_weight_push.remote())
        self._get(self._joined, PUSH_STAGE)

    def _lost_ranks(self, seconds: float) -> list[int]:
        """Those whose process has ended; the others answer, or are at work.

        Args:
            seconds: until it is given up that Ray finds one.
        """
        lost: list[int] = []
        deadline = time.monotonic() + seconds
        waiting = dict(enumerate(self._ranks))
        while waiting and not lost and time.monotonic() < deadline:
            calls = {rank.node_id.remote(): number for number, rank in waiting.items()}
            ended, _ = ray.wait(list(calls), num_returns=len(calls), timeout=LOOK_SECONDS)
            for reference in ended:
                try:
                    ray.get(reference)
                except ActorDiedError as error:
                    if "creation task" not in str(error):  # that one has said why it ended
                        lost.append(calls[reference])
                except RayError:
                    continue  # Ray does not know yet: it is asked again
                del waiting[calls[reference]]
        return sorted(lost)

    def _get(self, references: Any, stage: str) -> Any:
        return get_in_time(references, self._timeout, stage)

    def _wait_for(self, reference: Any) -> Any:
        """What rank 0 gives in a weight push, in which the other ranks take part."""
        return wait_for(reference, self._joined, self._timeout, PUSH_STAGE)

    def _call_all(self, method: str, *args: Any) -> list[Any]:
        """Every rank's result."""
        calls = [getattr(rank, method).remote(*args) for rank in self._ranks]
        results: list[Any] = self._get(calls, method)
        return results

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
        calls = [
            getattr(rank, method).remote(stored[data_rank], *args)
            for rank, data_rank in zip(self._ranks, self._data_ranks, strict=True)
        ]
        results: list[Any] = self._get(calls, method)
        return results, packing_statistics(batches, parallel.max_tokens_per_micro_batch)
