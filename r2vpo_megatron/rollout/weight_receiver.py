"""The engine's end of a weight push: bookkeeping, and the calls to vLLM's workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from r2vpo_megatron.rollout.weight_updates import (
    WeightBucket,
    WeightUpdateError,
    WeightUpdateTracker,
)

# In what `load` returns: 1.0 where the connection to the sender broke, which is not
# this engine's fault. The push has failed then and must be begun again over a new connection.
INTERRUPTED = "weight_sync/interrupted"


class WeightReceiver:
    """Replaces an engine's weights in place, push by push.

    Args:
        llm: the `vllm.LLM`, with the weight transfer engine "r2vpo" and WeightPushExtension.
        tracker: decides whether the weights are one complete policy.
        drop_caches: called once new weights are in place, to forget what old ones computed.
    """

    def __init__(
        self, llm: Any, tracker: WeightUpdateTracker, drop_caches: Callable[[], None]
    ) -> None:
        self._llm = llm
        self._tracker = tracker
        self._drop_caches = drop_caches

    @property
    def policy_version(self) -> int:
        """Version of the last complete set of weights."""
        return self._tracker.policy_version

    def connect(self, connection: Any, first_rank: int) -> None:
        """Join the sender's connection, leaving that of before; for back ends that need one.

        Where the other members do not come, the sender knows it too, and `load` tells.

        Args:
            connection: from the sender's `offer_connection`.
            first_rank: member that the engine's first worker becomes; the others follow.
        """
        join = {"connection": connection, "first_rank": first_rank}
        self._llm.collective_rpc("init_weight_transfer_engine", args=(join,))
        self._llm.collective_rpc("take_weight_push_report")

    def begin(self, version: int) -> None:
        """Open a push; generation is refused until it has been finished."""
        self._tracker.begin(version)
        self._call_workers("abandon_weight_push")
        self._call_workers("start_weight_update")

    def load(self, bucket: WeightBucket) -> dict[str, float]:
        """Load one bucket of the open push.

        Returns:
            Stage times in seconds, of the slowest tensor-parallel rank; or {INTERRUPTED: 1.0}, and
            nothing was loaded then.

        Raises:
            WeightUpdateError: the bucket is not the next one of the open push, or is damaged.
        """
        try:
            self._tracker.expect(bucket)
        except WeightUpdateError as error:
            self._tracker.fail(str(error))
            raise
        self._call_workers("update_weights", {"bucket": bucket})
        reports = self._call_workers("take_weight_push_report")
        interruptions = [report.interruption for report in reports if report.interruption]
        if interruptions:
            self._tracker.fail(interruptions[0])
            return {INTERRUPTED: 1.0}
        self._tracker.accept(bucket)
        return {
            f"weight_sync/{stage}_seconds": max(report.seconds[stage] for report in reports)
            for stage in reports[0].seconds
        }

    def finish(self, version: int, checksum: int) -> dict[str, float]:
        """Verify that the push is complete, make it the served policy, drop stale caches.

        Raises:
            WeightUpdateError: the push is not complete; generation stays refused.
        """
        start = time.perf_counter()
        try:
            self._tracker.require_finishable(version, checksum)
        except WeightUpdateError as error:
            self._tracker.fail(str(error))
            raise
        self._call_workers("finish_weight_update")
        self._drop_caches()
        self._tracker.commit()
        return {"weight_sync/finish_seconds": time.perf_counter() - start}

    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker within the open push, which fails with it.

        Whatever breaks off a load leaves a mixture of two policies, so every error counts; those
        of other processes come as RuntimeError anyway.
        """
        try:
            return list(self._llm.collective_rpc(method, args=args))
        except Exception as error:
            self._tracker.fail(f"{type(error).__name__}: {error}")
            raise WeightUpdateError(f"{method} failed: {error}") from error
