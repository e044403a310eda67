"""What the training loop asks of an inference engine, and when an engine may serve.

A weight update is a sequence of calls, the same on every engine:

    begin_weight_update(version)
    load_weight_bucket(bucket)                  once per bucket, in order
    finish_weight_update(version, checksum)

Between `begin` and a successful `finish` the engine holds a mixture of two policies and refuses to
generate. Nothing of vLLM or torch is needed to read or test this file.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest
from r2vpo_megatron.rollout.sampling import SamplingSettings


class WeightUpdateError(RuntimeError):
    """The engine's weights are not one complete, verified policy, or would cease to be."""


class WeightBucket(Protocol):
    """A part of a weight push, as an engine sees it (see weight_sync for the real ones).

    Buckets travel between processes as descriptors; `open` attaches to the tensors themselves.
    """

    @property
    def version(self) -> int:
        """Policy version that the push brings."""
        ...

    @property
    def index(self) -> int:
        """Position in the push, from 0."""
        ...

    @property
    def checksum(self) -> int:
        """Checksum of the bucket's names, shapes, dtypes and bytes."""
        ...

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Hugging Face names of its tensors."""
        ...

    def open(self) -> Mapping[str, Any]:
        """Attach to the bucket, verify its checksum, and give its tensors by Hugging Face name."""
        ...


class RolloutEngine(Protocol):
    """An inference engine that serves one policy at a time."""

    @property
    def policy_version(self) -> int:
        """Version of the last complete set of weights."""
        ...

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request.

        Args:
            requests: prompts with a seed each; the same seed and prompt give the same response
                up to the rounding differences of another batch.
            sampling: the distribution to draw from.

        Returns:
            Generations in the order of the requests. `rollout_logprobs` holds the log-prob of each
            token under the distribution it was drawn from.

        Raises:
            WeightUpdateError: a weight push is incomplete.
            ValueError: a prompt is empty or leaves too little room for the response.
        """
        ...

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probs of given sequences at temperature 1.

        Returns:
            One array [len - 1] per sequence: the log-probs of its tokens but the first.
        """
        ...

    def begin_weight_update(self, version: int) -> None:
        """Open a push; generation is refused until it has been finished."""
        ...

    def load_weight_bucket(self, bucket: WeightBucket) -> dict[str, float]:
        """Load one bucket of the open push and return the stage times in seconds."""
        ...

    def finish_weight_update(self, version: int, checksum: int) -> dict[str, float]:
        """Verify that the push is complete, make it the served policy, drop stale caches."""
        ...

    def abort_weight_update(self) -> None:
        """Give up the open push, if any; generation stays refused until a complete one."""
        ...

    def shutdown(self) -> None:
        """Free the engine's processes and memory. The engine cannot be used afterwards."""
        ...


def fold_checksum(checksum: int, bucket_index: int, bucket_checksum: int) -> int:
    """Extend the checksum of a push by its next bucket; a push starts from 0."""
    return zlib.crc32(f"{bucket_index}:{bucket_checksum};".encode(), checksum)


class WeightUpdateTracker:
    """Decides whether an engine's weights are one complete policy.

    It follows the calls of a push and knows neither the engine nor the transport.

    Args:
        policy_version: version of the weights that the engine starts with.
        expected_names: tensors that every push must bring; None skips this check.
    """

    def __init__(self, policy_version: int, expected_names: frozenset[str] | None = None) -> None:
        self._policy_version = policy_version
        self._expected_names = expected_names
        self._open_version: int | None = None
        self._failure: str | None = None
        self._received_names: set[str] = set()
        self._num_buckets = 0
        self._checksum = 0

    @property
    def policy_version(self) -> int:
        """Version of the last complete push."""
        return self._policy_version

    def require_complete(self) -> None:
        """Raise WeightUpdateError unless the weights are those of `policy_version`."""
        if self._failure is not None:
            raise WeightUpdateError(
                f"the last weight push failed ({self._failure}); the engine needs a complete push "
                "before it can generate"
            )
        if self._open_version is not None:
            raise WeightUpdateError(
                f"the push of version {self._open_version} is not finished: "
                f"{self._num_buckets} buckets received"
            )

    def begin(self, version: int) -> None:
        """Open a push. One that is still open or has failed is superseded.

        Raises:
            WeightUpdateError: the version is older than the served one; nothing changes then.
        """
        if version < self._policy_version:
            raise WeightUpdateError(
                f"push of version {version} refused: the engine already serves "
                f"version {self._policy_version}"
            )
        self._open_version = version
        self._failure = None
        self._received_names = set()
        self._num_buckets = 0
        self._checksum = 0

    def expect(self, bucket: WeightBucket) -> None:
        """Check, before loading it, that the bucket is the next one of the open push.

        Raises:
            WeightUpdateError: no push is open, or the version, the index or a name is wrong.
        """
        self._require_open(bucket.version)
        if bucket.index != self._num_buckets:
            raise WeightUpdateError(
                f"bucket {bucket.index} of version {bucket.version} arrived where bucket "
                f"{self._num_buckets} was due"
            )
        names = set(bucket.tensor_names)
        if repeated := sorted(names & self._received_names):
            raise WeightUpdateError(f"tensors pushed twice: {_shortened(repeated)}")
        if self._expected_names is not None and (unknown := sorted(names - self._expected_names)):
            raise WeightUpdateError(f"tensors unknown to the checkpoint: {_shortened(unknown)}")

    def accept(self, bucket: WeightBucket) -> None:
        """Record that the bucket has been loaded."""
        self._received_names.update(bucket.tensor_names)
        self._num_buckets += 1
        self._checksum = fold_checksum(self._checksum, bucket.index, bucket.checksum)

    def require_finishable(self, version: int, checksum: int) -> None:
        """Check that the open push is complete and is the one that the sender sent.

        Raises:
            WeightUpdateError: no push is open, or the version, the checksum or the names differ.
        """
        self._require_open(version)
        if checksum != self._checksum:
            raise WeightUpdateError(
                f"push of version {version}: checksum {self._checksum:#010x} received in "
                f"{self._num_buckets} buckets, the sender's is {checksum:#010x}"
            )
        if self._expected_names is not None:
            missing = sorted(self._expected_names - self._received_names)
            if missing:
                raise WeightUpdateError(
                    f"push of version {version} lacks {len(missing)} of "
                    f"{len(self._expected_names)} tensors: {_shortened(missing)}"
                )

    def commit(self) -> None:
        """Make the open push the served policy."""
        assert self._open_version is not None
        self._policy_version = self._open_version
        self._open_version = None

    def fail(self, reason: str) -> None:
        """Record why the open push cannot be completed; its first reason stays.

        Without an open push this does nothing.
        """
        if self._open_version is not None and self._failure is None:
            self._failure = reason

    def _require_open(self, version: int) -> None:
        if self._open_version is None:
            raise WeightUpdateError(f"version {version}: no weight push is open")
        if self._failure is not None:
            raise WeightUpdateError(
                f"the push of version {self._open_version} has failed ({self._failure}): "
                "begin a new one"
            )
        if version != self._open_version:
            raise WeightUpdateError(
                f"version {version} offered while version {self._open_version} is being pushed"
            )


def _shortened(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
