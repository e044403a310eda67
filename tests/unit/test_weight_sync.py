"""Weight pushes through shared memory: every bit arrives, and no memory is left."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import pickle
import signal
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from r2vpo_megatron.weight_sync import BACKENDS, SharedMemorySender
from r2vpo_megatron.weight_sync.protocol import TENSOR_ALIGNMENT_BYTES, TensorMeta, WeightBucket
from r2vpo_megatron.weight_sync.shared_memory import is_free

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
NAMED_TENSORS = [
    ("matrix", torch.arange(12, dtype=torch.float32).view(3, 4)),
    ("transposed", torch.arange(12, dtype=torch.bfloat16).view(3, 4).t()),
    ("special", torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])),
    ("scalar", torch.tensor(7, dtype=torch.int64)),
    ("empty", torch.empty(0, 5)),
    ("flags", torch.tensor([True, False, True])),
]


def bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """What must survive: dtype, shape, and every bit of the values."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), data


def memfd_count() -> int:
    """Buckets that this process holds open."""
    links = set()  # a mapping holds another descriptor of the same file
    for entry in Path("/proc/self/fd").iterdir():
        try:
            links.add(os.readlink(entry))
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return sum(link.startswith("/memfd:r2vpo-weights-") for link in links)


def mapping_count() -> int:
    """Buckets that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:r2vpo-weights-")


@pytest.fixture(autouse=True)
def no_memory_left() -> Iterator[None]:
    files = set(os.listdir("/dev/shm"))
    yield
    gc.collect()
    assert memfd_count() == 0
    assert mapping_count() == 0
    left = set(os.listdir("/dev/shm")) - files
    assert not [name for name in left if "r2vpo" in name]


shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
tensor_specs = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(specs=tensor_specs, bucket_bytes=st.integers(1, 4096), seed=st.integers(0, 1000))
def test_buckets_hold_every_tensor_once_in_order_within_their_size(
    specs: list[tuple[tuple[int, ...], torch.dtype]], bucket_bytes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        (f"t{i}", torch.randint(0, 2**8, shape, generator=generator).to(dtype))
        for i, (shape, dtype) in enumerate(specs)
    ]
    sender = SharedMemorySender(bucket_bytes)
    received: list[tuple[str, tuple[str, tuple[int, ...], bytes]]] = []
    previous_end = 0
    for index, bucket in enumerate(sender.buckets(3, tensors)):
        assert (bucket.version, bucket.index) == (3, index)
        ends = [meta.offset_bytes + meta.num_bytes for meta in bucket.tensors]
        starts = [meta.offset_bytes for meta in bucket.tensors]
        assert all(start % TENSOR_ALIGNMENT_BYTES == 0 for start in starts)
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
        assert len(bucket.tensors) == 1 or ends[-1] <= bucket_bytes
        if index > 0:  # no bucket was closed too early
            padded = -(-previous_end // TENSOR_ALIGNMENT_BYTES) * TENSOR_ALIGNMENT_BYTES
            assert padded + bucket.tensors[0].num_bytes > bucket_bytes
        previous_end = ends[-1]
        received += [(name, bits(tensor)) for name, tensor in bucket.open().items()]
    assert received == [(name, bits(tensor)) for name, tensor in tensors]
    assert sender.metrics()["weight_sync/num_tensors"] == len(tensors)


def _receive(descriptors: Connection, answers: Connection) -> None:
    while (descriptor := descriptors.recv()) is not None:
        bucket = pickle.loads(descriptor)
        answers.send([(name, bits(tensor)) for name, tensor in bucket.open().items()])


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_another_process_receives_every_bit(bucket_bytes: int) -> None:
    context = multiprocessing.get_context("fork")
    child_descriptors, descriptors = context.Pipe(duplex=False)
    answers, child_answers = context.Pipe(duplex=False)
    receiver = context.Process(target=_receive, args=(child_descriptors, child_answers))
    receiver.start()  # before any bucket exists: it cannot inherit one
    received = []
    for bucket in SharedMemorySender(bucket_bytes).buckets(1, NAMED_TENSORS):
        descriptor = pickle.dumps(bucket)
        assert len(descriptor) < 2000  # no tensor data travels with it
        descriptors.send(descriptor)
        assert answers.poll(30)
        received += answers.recv()
    descriptors.send(None)
    receiver.join(30)
    assert receiver.exitcode == 0
    assert received == [(name, bits(tensor)) for name, tensor in NAMED_TENSORS]


def test_two_buckets_are_held_from_push_to_push_and_none_after_the_sender_is_closed() -> None:
    held_while_gathering = []

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        for named_tensor in NAMED_TENSORS:
            held_while_gathering.append(memfd_count())
            yield named_tensor

    sender = SharedMemorySender(bucket_bytes=1)
    held = [memfd_count() for _ in sender.buckets(1, gathered())]
    # Asked for a bucket, the sender keeps the one that receivers may be loading.
    assert held == [1] + [2] * (len(NAMED_TENSORS) - 1)
    assert max(held_while_gathering) == 2
    assert sender.push_checksum > 0
    sender.end_push()
    assert memfd_count() == 2
    assert [memfd_count() for _ in sender.buckets(2, NAMED_TENSORS)] == [2] * len(NAMED_TENSORS)
    sender.close()
    assert memfd_count() == 0


def test_receivers_map_each_file_once_for_all_pushes_and_no_file_that_has_been_given_up() -> None:
    sender = SharedMemorySender(bucket_bytes=4096)
    link = sender.offer_connection("", 2, 1.0).join(1)
    small = [(f"t{i}", torch.full((1000,), float(i))) for i in range(4)]
    large = [(f"large{i}", torch.full((1000 * (i + 2),), float(i))) for i in range(3)]
    mapped = []
    for version, tensors in enumerate((small, small, small + large, large + small)):
        for bucket in sender.buckets(version, tensors):
            opened = bucket.open(link)
            assert all(torch.equal(opened[name], dict(tensors)[name]) for name in opened)
            # The sender itself maps each file, too.
            mapped.append(mapping_count() - memfd_count())
            del opened
        sender.end_push()
    assert max(mapped) == 2 and mapped[1:8] == [2] * 7
    # Files for outsized tensors took the place of those that were too small: two of the largest.
    assert sorted(file.capacity_bytes for file in sender._spare) == [16000, 16000]
    link.close()
    sender.close()


def test_the_last_bucket_can_be_opened_after_the_end_was_asked_for() -> None:
    sender = SharedMemorySender(bucket_bytes=1)
    buckets = sender.buckets(1, NAMED_TENSORS)
    given = [next(buckets) for _ in NAMED_TENSORS]
    assert next(buckets, None) is None
    name, tensor = NAMED_TENSORS[-1]
    assert bits(given[-1].open()[name]) == bits(tensor)
    # The one before may be open still; the one before that has been filled again.
    with pytest.raises(WeightUpdateError, match="damaged"):
        given[-3].open()
    sender.close()


@pytest.mark.parametrize("end", ["close", "error", "new push"])
def test_a_push_given_up_half_way_frees_its_bucket(end: str) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield from NAMED_TENSORS[:2]
        raise RuntimeError("gather failed")

    sender = SharedMemorySender(bucket_bytes=1)
    buckets = sender.buckets(1, failing())
    next(buckets)
    assert memfd_count() == 1
    if end == "close":
        sender.close()
    elif end == "error":
        with pytest.raises(RuntimeError, match="gather failed"):
            next(buckets)
    else:
        new = sender.buckets(2, NAMED_TENSORS)
        assert next(new).version == 2
        assert list(buckets) == []  # the old iterator is at its end and frees nothing of the new
        assert memfd_count() == 1
        assert len(list(new)) == len(NAMED_TENSORS) - 1
    sender.close()
    assert memfd_count() == 0
    if end != "new push":
        with pytest.raises(WeightUpdateError, match="no complete push"):
            _ = sender.push_checksum


def test_received_tensors_outlive_the_senders_bucket_and_free_it_when_dropped() -> None:
    sender = SharedMemorySender(bucket_bytes=1)
    bucket = next(sender.buckets(1, NAMED_TENSORS))
    kept = bucket.open()["matrix"]
    sender.close()
    with pytest.raises(WeightUpdateError):  # the sender has let go of it
        bucket.open()
    gc.collect()
    assert mapping_count() == 1
    assert bits(kept) == bits(NAMED_TENSORS[0][1])
    del kept
    gc.collect()
    assert mapping_count() == 0


@pytest.mark.parametrize("connected", [False, True])
def test_memory_is_filled_again_unless_a_receiver_still_has_tensors_of_it(connected: bool) -> None:
    sender = SharedMemorySender(bucket_bytes=4096)
    link = sender.offer_connection("", 2, 1.0).join(1) if connected else None
    tensors = [(f"t{i}", torch.full((1000,), float(i))) for i in range(9)]
    files, kept = [], {}
    for index, bucket in enumerate(sender.buckets(1, tensors)):
        files.append(bucket.handle.fd)  # type: ignore[attr-defined]
        opened = bucket.open(link)
        if index == 2:
            kept = opened
        del opened
    assert len(set(files[:4])) == 2 and files[0] == files[2]  # two files, in turn
    assert files[2] not in files[3:]  # while its tensors are kept
    assert len(set(files)) == 3
    assert torch.equal(kept["t2"], tensors[2][1])
    kept.clear()
    files = [bucket.handle.fd for bucket in sender.buckets(2, tensors)]  # type: ignore[attr-defined]
    assert len(set(files)) == 2
    if link is not None:
        link.close()
    sender.close()


def test_a_receiver_that_dies_does_not_keep_memory_from_being_filled() -> None:
    context = multiprocessing.get_context("fork")
    sender = SharedMemorySender(bucket_bytes=1)
    buckets = sender.buckets(1, NAMED_TENSORS)
    bucket = next(buckets)
    ready, child_ready = context.Pipe(duplex=False)

    def keep_open() -> None:
        kept = bucket.open()
        child_ready.send(len(kept))
        signal.pause()

    process = context.Process(target=keep_open, daemon=True)
    process.start()
    assert ready.poll(30)
    file = sender._sent[0]._file  # type: ignore[attr-defined]
    assert not is_free(file)
    process.kill()
    process.join(30)
    assert is_free(file)
    sender.close()


def test_a_receiver_cannot_change_what_others_receive() -> None:
    sender = SharedMemorySender()
    bucket = next(sender.buckets(1, NAMED_TENSORS))
    bucket.open()["matrix"].zero_()
    assert bits(bucket.open()["matrix"]) == bits(NAMED_TENSORS[0][1])
    sender.close()


def _send_one_bucket(connection: Connection) -> None:
    sender = SharedMemorySender()
    connection.send(next(sender.buckets(5, NAMED_TENSORS)))
    signal.pause()


def test_nothing_is_left_of_a_killed_sender() -> None:
    context = multiprocessing.get_context("fork")
    connection, child_connection = context.Pipe(duplex=False)
    process = context.Process(target=_send_one_bucket, args=(child_connection,))
    process.start()
    assert connection.poll(30)
    bucket: WeightBucket = connection.recv()
    tensors = bucket.open()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert bits(tensors["special"]) == bits(NAMED_TENSORS[2][1])
    with pytest.raises(WeightUpdateError, match="No such file or directory"):
        bucket.open()
    del tensors  # the last mapping: the fixture sees that nothing remains


def test_an_unreachable_or_foreign_file_is_refused_with_the_hosts_named(tmp_path: Path) -> None:
    sender = SharedMemorySender()
    bucket = next(sender.buckets(1, NAMED_TENSORS))
    elsewhere = dataclasses.replace(bucket.handle, host="learner-node", fd=9999)  # type: ignore[type-var]
    with pytest.raises(WeightUpdateError, match=r"of host learner-node on host .*one host"):
        dataclasses.replace(bucket, handle=elsewhere).open()
    with (tmp_path / "other").open("wb") as file:
        foreign = dataclasses.replace(bucket.handle, fd=file.fileno())  # type: ignore[type-var]
        with pytest.raises(WeightUpdateError, match=r"it is '.*/other'"):
            dataclasses.replace(bucket, handle=foreign).open()
    sender.close()


@dataclasses.dataclass(frozen=True)
class BytesHandle:
    """A bucket's buffer in ordinary memory, which a test can damage."""

    data: bytearray

    def attach(self, link: object = None) -> bytearray:
        return self.data


def plain_bucket(*names: str, version: int = 1, index: int = 0) -> WeightBucket:
    """A bucket of one int32 per name, at offsets 0, 64, ...; its checksum by hand."""
    data = bytearray(64 * len(names))
    metas = []
    described = ""
    for i, name in enumerate(names):
        data[64 * i : 64 * i + 4] = (i + 1).to_bytes(4, "little")
        metas.append(TensorMeta(name, (1,), "int32", 64 * i, 4))
        digest = xxhash.xxh3_64_intdigest((i + 1).to_bytes(4, "little"))
        described += f"{name}:int32:(1,):{digest:016x};"
    checksum = xxhash.xxh3_64_intdigest(described.encode())
    return WeightBucket(version, index, tuple(metas), len(data), checksum, BytesHandle(data))


def test_the_checksum_covers_names_shapes_dtypes_and_bytes() -> None:
    bucket = plain_bucket("a", "b")
    assert [tensor.item() for tensor in bucket.open().values()] == [1, 2]

    first, second = bucket.tensors
    damaged_data = bytearray(bucket.handle.attach())
    damaged_data[66] ^= 4
    exchanged = (
        dataclasses.replace(first, name="b"),
        dataclasses.replace(second, name="a"),
    )
    for damaged in [
        dataclasses.replace(bucket, handle=BytesHandle(damaged_data)),
        dataclasses.replace(bucket, tensors=exchanged),
        dataclasses.replace(bucket, tensors=(first, dataclasses.replace(second, shape=()))),
        dataclasses.replace(bucket, tensors=(first, dataclasses.replace(second, dtype="float32"))),
        dataclasses.replace(bucket, tensors=(first,)),
        dataclasses.replace(bucket, checksum=bucket.checksum ^ 1),
    ]:
        with pytest.raises(WeightUpdateError, match="bucket 0 of version 1 is damaged"):
            damaged.open()


def test_the_senders_checksums_are_those_computed_by_hand() -> None:
    tensors = [(name, torch.tensor([i + 1], dtype=torch.int32)) for i, name in enumerate("ab")]
    sender = SharedMemorySender()
    (bucket,) = sender.buckets(1, tensors)
    assert bucket.checksum == plain_bucket("a", "b").checksum
    assert sender.push_checksum == zlib.crc32(f"0:{bucket.checksum};".encode())


def test_a_repeated_name_and_a_bad_size_are_refused() -> None:
    sender = SharedMemorySender()
    with pytest.raises(ValueError, match="'matrix' comes twice"):
        list(sender.buckets(1, [NAMED_TENSORS[0], NAMED_TENSORS[0]]))
    with pytest.raises(ValueError, match="bucket_bytes=0"):
        BACKENDS["shared_memory"](0)
