"""When an engine's weights are one complete policy.

A weight update is a sequence of calls, the same on every engine:

    begin(version)
    load(bucket)                  once per bucket, in order
    finish(version, checksum)

Between `begin` and a successful `finish` the engine holds a mixture of two policies and refuses to
generate. Nothing of vLLM or torch is needed to read or test this file.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class WeightUpdateError(RuntimeError):
    """The engine's weights are not one complete, verified policy, or would cease to be."""


class WeightTransferInterrupted(WeightUpdateError):
    """A member of the connection has gone; the push must be sent again to those that are left."""


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

    def open(
        self, link: Any = None, stage_seconds: dict[str, float] | None = None
    ) -> Mapping[str, Any]:
        """Come to the bucket's memory, verify its checksum, give its tensors by Hugging Face name.

        Args:
            link: what joining the sender's connection gave, where the back end has one.
            stage_seconds: gets "receive" and "verify".

        Raises:
            WeightTransferInterrupted: the connection broke.
        """
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
