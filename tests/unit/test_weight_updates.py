"""The rules by which an engine accepts a weight push."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from r2vpo_megatron.rollout.weight_updates import (
    WeightUpdateError,
    WeightUpdateTracker,
    fold_checksum,
)


@dataclass(frozen=True)
class Bucket:
    """A bucket's description; its tensors do not matter here."""

    tensor_names: tuple[str, ...]
    version: int
    index: int
    checksum: int = 12345

    def open(
        self, link: Any = None, stage_seconds: dict[str, float] | None = None
    ) -> Mapping[str, Any]:
        raise AssertionError("the rules look at descriptions alone")


def plain_bucket(*names: str, version: int = 1, index: int = 0) -> Bucket:
    return Bucket(names, version, index)


def push(tracker: WeightUpdateTracker, version: int, *buckets: Bucket) -> int:
    """Begin a push and receive buckets; returns the checksum that the sender would give."""
    tracker.begin(version)
    checksum = 0
    for bucket in buckets:
        tracker.expect(bucket)
        tracker.accept(bucket)
        checksum = fold_checksum(checksum, bucket.index, bucket.checksum)
    return checksum


def test_a_complete_push_becomes_the_served_policy() -> None:
    tracker = WeightUpdateTracker(0, frozenset("abc"))
    tracker.require_complete()
    checksum = push(
        tracker, 4, plain_bucket("a", "b", version=4), plain_bucket("c", version=4, index=1)
    )
    assert tracker.policy_version == 0
    with pytest.raises(WeightUpdateError, match="version 4 is not finished: 2 buckets"):
        tracker.require_complete()
    tracker.require_finishable(4, checksum)
    tracker.commit()
    tracker.require_complete()
    assert tracker.policy_version == 4


def test_a_bucket_of_another_version_index_or_content_is_refused() -> None:
    tracker = WeightUpdateTracker(0, frozenset("abc"))
    with pytest.raises(WeightUpdateError, match="no weight push is open"):
        tracker.expect(plain_bucket("a"))
    push(tracker, 2, plain_bucket("a", version=2))
    for bucket, message in [
        (plain_bucket("b", version=1, index=1), "version 1 offered while version 2"),
        (plain_bucket("b", version=2, index=0), "bucket 0 .* where bucket 1 was due"),
        (plain_bucket("b", version=2, index=2), "bucket 2 .* where bucket 1 was due"),
        (plain_bucket("a", version=2, index=1), "pushed twice: a"),
        (plain_bucket("z", version=2, index=1), "unknown to the checkpoint: z"),
    ]:
        with pytest.raises(WeightUpdateError, match=message):
            tracker.expect(bucket)


def test_an_incomplete_or_different_push_cannot_be_finished() -> None:
    tracker = WeightUpdateTracker(0, frozenset("abc"))
    checksum = push(tracker, 1, plain_bucket("a", "b"))
    with pytest.raises(WeightUpdateError, match="lacks 1 of 3 tensors: c"):
        tracker.require_finishable(1, checksum)
    with pytest.raises(WeightUpdateError, match="checksum"):
        tracker.require_finishable(1, checksum ^ 1)
    with pytest.raises(WeightUpdateError, match="version 2 offered while version 1"):
        tracker.require_finishable(2, checksum)


def test_a_failed_push_blocks_until_a_new_one_is_complete() -> None:
    tracker = WeightUpdateTracker(0)
    checksum = push(tracker, 1, plain_bucket("a"))
    tracker.fail("the learner died")
    tracker.fail("aborted")  # what follows from the first failure does not hide it
    for refused in [
        tracker.require_complete,
        lambda: tracker.expect(plain_bucket("b", index=1)),
        lambda: tracker.require_finishable(1, checksum),
    ]:
        with pytest.raises(WeightUpdateError, match="the learner died"):
            refused()
    checksum = push(tracker, 1, plain_bucket("a"))
    tracker.require_finishable(1, checksum)
    tracker.commit()
    tracker.require_complete()


def test_an_older_version_is_refused_and_leaves_the_engine_serving() -> None:
    tracker = WeightUpdateTracker(7)
    with pytest.raises(WeightUpdateError, match=r"version 6 refused.* serves version 7"):
        tracker.begin(6)
    tracker.fail("no push is open: nothing fails")
    tracker.require_complete()
