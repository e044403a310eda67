"""One weight push: from the learner's ranks to the engines, bucket by bucket.

While the engines load a bucket the learner gathers the next one; no more than these two are alive.
An engine serves the new version only after all buckets came in and their checksum agreed; from
`begin_weight_update` until then it refuses to generate. So no response is ever sampled from
weights of unknown version.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.push_targets import PushTargets, TargetsLost
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.rollout.weight_receiver import INTERRUPTED
from r2vpo_megatron.rollout.weight_updates import WeightTransferInterrupted, WeightUpdateError


def push_weights(
    learner: LearnerGroup, rollout: RolloutPool, version: int, *, only_waiting: bool = False
) -> dict[str, float]:
    """Give the engines the learner's current weights, as `version`.

    An engine that is lost on the way is left behind. Where the back end's connection breaks with
    it, the push is sent once more, to those that are left; where all are lost, to those that
    replace them.

    Args:
        learner: all ranks; none may be at work on anything else.
        rollout: the engines.
        version: of the weights; not below that which the engines serve.
        only_waiting: to restarted engines that lack weights; the others sample meanwhile.

    Returns:
        Sizes and stage times, "weight_sync/..."; the engines' times are of the slowest of them.
        Stages of the learner and of the engines overlap; push_seconds is the time of it all.

    Raises:
        WeightUpdateError: the connection broke twice.
        TargetsLost: with `only_waiting`, no engine was left.
        RuntimeError: more engines were lost than `rollout.max_restarts`.
    """
    start = time.perf_counter()
    while True:
        try:
            with rollout.pushing(version, only_waiting=only_waiting) as targets:
                metrics = _push_twice(learner, targets, version)
            return {**metrics, "weight_sync/push_seconds": time.perf_counter() - start}
        except TargetsLost:  # their replacements get it; `rollout.max_restarts` ends this
            if only_waiting:
                raise


def _push_twice(learner: LearnerGroup, targets: PushTargets, version: int) -> dict[str, float]:
    """Push, and once more over a new connection if the first one breaks."""
    try:
        return _push(learner, targets, version)
    except WeightTransferInterrupted:
        learner.connected_members = ()
        return _push(learner, targets, version)


def _push(learner: LearnerGroup, targets: PushTargets, version: int) -> dict[str, float]:
    targets.finish(targets.start("begin_weight_update", version))
    _connect(learner, targets)
    learner.begin_weight_push(version)
    try:
        metrics = _stream_buckets(learner, targets)
        checksum, sent = learner.finish_weight_push()
    except (WeightUpdateError, TargetsLost):
        learner.abandon_weight_push()
        raise
    finished = targets.finish(targets.start("finish_weight_update", version, checksum))
    return {**sent, **metrics, **_slowest(finished)}


def _connect(learner: LearnerGroup, targets: PushTargets) -> None:
    """Join learner and engines, if the back end needs it and the engines are not those of before.

    Raises:
        WeightTransferInterrupted: not all came.
    """
    members = targets.membership
    if members and members == learner.connected_members:
        return
    learner.connected_members = ()  # whatever comes of this, the connection of before is left
    size = 1 + len(members) * targets.workers_per_engine
    connection = learner.offer_weight_connection(size)
    if connection is not None:
        first_ranks = itertools.count(1, targets.workers_per_engine)
        joining = learner.begin_joining()
        joins = [(connection, rank) for _, rank in zip(members, first_ranks, strict=False)]
        targets.finish(targets.start_each("connect_weight_transfer", joins))
        learner.finish_joining(joining)
    learner.connected_members = members


def _stream_buckets(learner: LearnerGroup, targets: PushTargets) -> dict[str, float]:
    metrics: dict[str, float] = {}
    asked = learner.ask_for_bucket()
    while (bucket := learner.await_bucket(asked)) is not None:
        loading = targets.start("load_weight_bucket", bucket)
        asked = learner.ask_for_bucket()
        loaded = targets.finish(loading)
        if any(INTERRUPTED in result for result in loaded):
            raise WeightTransferInterrupted(f"bucket {bucket.index} did not reach every engine")
        for name, value in _slowest(loaded).items():
            metrics[name] = metrics.get(name, 0.0) + value
    return metrics


def _slowest(results: list[dict[str, Any]]) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in results[0]}
