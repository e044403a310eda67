"""What every back end's sender does: fill buckets, keep two of them, sum them up.

A back end adds a `BucketWriter`, which knows the memory that a bucket lies in and how others come
to it.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch

from r2vpo_megatron.checkpoint.layout import TensorPieces
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError, fold_checksum
from r2vpo_megatron.weight_sync.checksums import begin_digest, bucket_checksum, finish_digests
from r2vpo_megatron.weight_sync.protocol import (
    BucketHandle,
    SourceTensor,
    TensorMeta,
    WeightBucket,
    WeightConnection,
    aligned,
    describe_tensor,
)


@dataclass
class StageTimes:
    """What a push has moved so far, and how long the stages took on the sending rank.

    Seconds: of getting tensors from their source (gather), of putting shards together in the
    bucket (convert), of copying whole tensors and handing buckets over (send), of checksums.
    """

    num_buckets: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    gather_seconds: float = 0.0
    convert_seconds: float = 0.0
    send_seconds: float = 0.0
    checksum_seconds: float = 0.0


class BucketWriter(ABC):
    """A bucket that is being filled, and after `seal` the memory of one that receivers read.

    Args:
        bucket_bytes: size of the bucket.
        times: of the push.
    """

    def __init__(self, bucket_bytes: int, times: StageTimes) -> None:
        self._bucket_bytes = bucket_bytes
        self._times = times
        self._metas: list[TensorMeta] = []
        self._digests: list[int | torch.Tensor] = []
        self._end_bytes = 0

    def has_room_for(self, tensor: SourceTensor) -> bool:
        """Whether the tensor fits; an empty bucket takes one of any size."""
        meta = describe_tensor("", tensor, self._end_bytes)
        return not self._metas or meta.offset_bytes + meta.num_bytes <= self._bucket_bytes

    def write(self, name: str, tensor: SourceTensor) -> None:
        """Append a tensor."""
        start = time.perf_counter()
        meta = describe_tensor(name, tensor, self._end_bytes)
        data = self._store(meta, tensor)
        stored = time.perf_counter()
        self._digests.append(begin_digest(data))
        self._metas.append(meta)
        self._end_bytes = meta.offset_bytes + meta.num_bytes
        self._times.num_tensors += 1
        self._times.num_bytes += meta.num_bytes
        if isinstance(tensor, TensorPieces):
            self._times.convert_seconds += stored - start
        else:
            self._times.send_seconds += stored - start
        self._times.checksum_seconds += time.perf_counter() - stored

    def seal(self, version: int, index: int) -> WeightBucket:
        """Make the bucket ready for receivers and describe it."""
        start = time.perf_counter()
        checksum = bucket_checksum(self._metas, finish_digests(self._digests))
        summed = time.perf_counter()
        num_bytes = max(aligned(self._end_bytes), 64)
        handle = self._publish(num_bytes)
        self._times.num_buckets += 1
        self._times.checksum_seconds += summed - start
        self._times.send_seconds += time.perf_counter() - summed
        return WeightBucket(version, index, tuple(self._metas), num_bytes, checksum, handle)

    @abstractmethod
    def _store(self, meta: TensorMeta, tensor: SourceTensor) -> torch.Tensor:
        """Put a tensor where `meta` says; its bytes, uint8, in memory that is fast to read."""

    @abstractmethod
    def _publish(self, num_bytes: int) -> BucketHandle:
        """Let receivers come to the first `num_bytes` of the memory, which is complete."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until the memory may be freed or changed, where its back end needs to.

        Raises:
            WeightTransferInterrupted: a receiver has gone.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of the memory, whatever is under way. May be called again."""


class BucketSender(ABC):
    """Sends weights in buckets of bounded size; at any time it holds two, and the next tensor.

    Args:
        bucket_bytes: size of a bucket; a larger tensor gets a bucket of its own.

    Raises:
        ValueError: bucket_bytes is not positive.
    """

    needs_connection = False

    def __init__(self, bucket_bytes: int = 256 << 20) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes={bucket_bytes}: must be at least 1")
        self._bucket_bytes = bucket_bytes
        self._push: Generator[WeightBucket, None, None] | None = None
        self._push_checksum: int | None = None
        self._sent: list[BucketWriter] = []  # at most one while the next is being filled
        self._times = StageTimes()

    @abstractmethod
    def _new_writer(self, first: SourceTensor) -> BucketWriter:
        """An empty bucket, for `first` and what fits with it."""

    def offer_connection(self, host: str, size: int, timeout_seconds: float) -> WeightConnection:
        """Not for this back end: see `needs_connection`."""
        raise NotImplementedError(f"{type(self).__name__} needs no connection")

    def join_connection(self) -> None:
        """Not for this back end: see `needs_connection`."""
        raise NotImplementedError(f"{type(self).__name__} needs no connection")

    def buckets(
        self, version: int, named_tensors: Iterable[tuple[str, SourceTensor]]
    ) -> Iterator[WeightBucket]:
        """Send tensors bucket by bucket. Ends a push that is still open.

        While receivers load a bucket the next one may be asked for. Whoever asks for one says
        that every receiver has loaded all but the last that was given; those are freed then, and
        the last two by `end_push`. If `named_tensors` gathers from other ranks, each step is as
        collective as it is.

        Args:
            version: policy version that the weights are.
            named_tensors: (Hugging Face name, full tensor on any device); read once, lazily, and
                each copied before the next is asked for. Left where it is, not closed, when the
                push breaks off.

        Returns:
            An iterator of descriptors to pass to the receivers. It raises ValueError where a name
            comes a second time and WeightTransferInterrupted where a receiver has gone and
            the others cannot be served without it.
        """
        self.end_push()
        self._push_checksum = None
        self._times = StageTimes()
        self._push = self._generate(version, self._gathered(named_tensors))
        return self._push

    @property
    def push_checksum(self) -> int:
        """Checksum of the last push, for the receivers' `finish_weight_update`.

        Raises:
            WeightUpdateError: no push has been sent to its end.
        """
        if self._push_checksum is None:
            raise WeightUpdateError("no complete push: ask for buckets until there are no more")
        return self._push_checksum

    def metrics(self) -> dict[str, float]:
        """Sizes (bytes, counts) and stage times (seconds) of the last push."""
        return {
            f"weight_sync/{name}": float(value)
            for name, value in dataclasses.asdict(self._times).items()
        }

    def end_push(self) -> None:
        """End the open push, if any, and let go of its buckets. The sender can be used again."""
        if self._push is not None:
            self._push.close()
            self._push = None
        while self._sent:
            self._sent.pop().release()

    def close(self) -> None:
        """End the open push, if any, and free all memory. The sender can be used again."""
        self.end_push()

    def _generate(
        self, version: int, named_tensors: Iterator[tuple[str, SourceTensor]]
    ) -> Generator[WeightBucket, None, None]:
        filling: BucketWriter | None = None
        push_checksum = 0
        try:
            pending = next(named_tensors, None)
            while pending is not None:
                filling = self._new_writer(pending[1])
                while pending is not None and filling.has_room_for(pending[1]):
                    filling.write(*pending)
                    pending = None  # not held while the next one is gathered
                    pending = next(named_tensors, None)
                bucket = filling.seal(version, self._times.num_buckets)
                push_checksum = fold_checksum(push_checksum, bucket.index, bucket.checksum)
                self._sent.append(filling)
                filling = None
                yield bucket
                if len(self._sent) > 1:
                    self._finish(self._sent[0])
                    self._sent.pop(0).release()
            for writer in self._sent:
                self._finish(writer)
            self._push_checksum = push_checksum
        finally:
            if filling is not None:
                filling.release()

    def _finish(self, writer: BucketWriter) -> None:
        start = time.perf_counter()
        writer.finish()
        self._times.send_seconds += time.perf_counter() - start

    def _gathered(
        self, named_tensors: Iterable[tuple[str, SourceTensor]]
    ) -> Iterator[tuple[str, SourceTensor]]:
        """Pass the tensors on, each name once, and take the time that their source needs."""
        names: set[str] = set()
        start = time.perf_counter()
        for name, tensor in named_tensors:
            self._times.gather_seconds += time.perf_counter() - start
            if name in names:
                raise ValueError(f"tensor name {name!r} comes twice in one push")
            names.add(name)
            yield name, tensor
            del tensor
            start = time.perf_counter()
        self._times.gather_seconds += time.perf_counter() - start
