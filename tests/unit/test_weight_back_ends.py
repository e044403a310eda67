"""What weight pushes ask of NCCL, HCCL and CUDA IPC, held to the documented contracts by fakes."""

from __future__ import annotations

import datetime
import inspect
import os
import sys
import types
import typing
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from r2vpo_megatron.device import (
    Platform,
    TransferGroup,
    TransferGroupError,
    collective_platform,
    get_platform,
)
from r2vpo_megatron.rollout.weight_updates import WeightTransferInterrupted, WeightUpdateError
from r2vpo_megatron.weight_sync import (
    BACKENDS,
    backends_for,
    choose_backend,
    collective,
    device_memory,
    requires_one_node,
)

CPU = torch.device("cpu")
NAMED_TENSORS = [
    ("a", torch.arange(40, dtype=torch.bfloat16).view(8, 5).t()),
    ("b", torch.tensor(3, dtype=torch.int64)),
    ("c", torch.randn(30, 7, generator=torch.Generator().manual_seed(0))),
    ("d", torch.empty(0, 4)),
]


class DocumentedBackend:
    """A back end's class as torch's and torch_npu's Python bindings have it."""

    class Options:
        def __init__(self) -> None:
            self._timeout: object = None
            self.global_ranks_in_group: list[int] = [-1]
            self.group_id = ""

    made: typing.ClassVar[list[DocumentedBackend]] = []

    def __init__(self, store: object, rank: int, size: int, options: Options) -> None:
        self.store, self.rank, self.size, self.options = store, rank, size, options
        self.error_handling = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
        self.sent: list[torch.Tensor] = []
        self.aborted = False
        DocumentedBackend.made.append(self)

    def broadcast(self, tensors: list[torch.Tensor], opts: dist.BroadcastOptions) -> DoneWork:
        assert opts.rootRank == 0 and opts.rootTensor == 0
        (tensor,) = tensors
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        self.sent.append(tensor)
        return DoneWork()

    def abort(self) -> None:
        self.aborted = True


class DoneWork:
    def __init__(self, *, polls_until_done: int = 3, error: str = "") -> None:
        self._left, self._error = polls_until_done, error

    def is_completed(self) -> bool:
        self._left -= 1
        return self._left <= 0

    def wait(self) -> bool:
        assert self._left <= 0, "waited for before it was done"
        if self._error:
            raise RuntimeError(self._error)
        return True


@pytest.fixture
def made_backends() -> Iterator[list[DocumentedBackend]]:
    DocumentedBackend.made.clear()
    yield DocumentedBackend.made
    DocumentedBackend.made.clear()


def test_nccl_group_is_made_as_documented(
    monkeypatch: pytest.MonkeyPatch, made_backends: list[DocumentedBackend]
) -> None:
    monkeypatch.setattr(dist, "ProcessGroupNCCL", DocumentedBackend, raising=False)
    platform = get_platform("cuda")
    monkeypatch.setattr(type(platform), "current_device", lambda self: CPU)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    store = dist.HashStore()
    platform.transfer_group(store, 2, 5, 30.0).close()
    (backend,) = made_backends
    assert (backend.store, backend.rank, backend.size) == (store, 2, 5)
    # The watchdog must neither end the process nor come before the group's own deadline.
    assert backend.error_handling == "0"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ
    assert backend.options._timeout > datetime.timedelta(seconds=30)  # type: ignore[operator]
    assert len(backend.sent) == 1  # the communicator is made on the first use: it was used
    assert backend.aborted


def test_hccl_group_is_made_as_documented(
    monkeypatch: pytest.MonkeyPatch, made_backends: list[DocumentedBackend]
) -> None:
    npu = types.SimpleNamespace(current_device=lambda: 3)
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(npu=npu))  # type: ignore[arg-type]
    bindings = types.SimpleNamespace(ProcessGroupHCCL=DocumentedBackend)
    monkeypatch.setitem(sys.modules, "torch_npu._C._distributed_c10d", bindings)  # type: ignore[arg-type]
    platform = get_platform("npu")
    monkeypatch.setattr(type(platform), "current_device", lambda self: CPU)
    stores = [dist.HashStore(), dist.HashStore()]
    for store in stores:
        for rank in range(2):
            platform.transfer_group(dist.PrefixStore("a", store), rank, 2, 30.0)
    ids = [backend.options.group_id for backend in made_backends]
    assert ids[0] == ids[1] != ids[2] == ids[3]  # one name a group, another for the next group
    assert all(backend.options.global_ranks_in_group == [] for backend in made_backends)
    assert [backend.rank for backend in made_backends] == [0, 1, 0, 1]


def test_a_group_waits_until_done_and_names_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = DocumentedBackend(None, 0, 2, DocumentedBackend.Options())
    group = TransferGroup(backend, timeout_seconds=0.05)
    group.wait(DoneWork(polls_until_done=5))
    with pytest.raises(TransferGroupError, match="a broadcast failed: peer is gone"):
        group.wait(DoneWork(error="peer is gone"))
    with pytest.raises(TransferGroupError, match=r"a broadcast was not done in 0\.05 s"):
        group.wait(DoneWork(polls_until_done=10**9))
    group.close()
    group.close()
    assert backend.aborted


def test_cuda_memory_is_exported_and_opened_as_torch_documents_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.multiprocessing import reductions

    from r2vpo_megatron.device import cuda

    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[cuda._DEVICE_ARGUMENT] == "storage_device"
    arguments = tuple(f"<{name}>" for name in names)
    memory = torch.arange(4)
    opened: list[tuple[object, ...]] = []

    def rebuild(*given: object) -> torch.Tensor:
        opened.append(given)
        return memory

    monkeypatch.setattr(cuda, "rebuild_cuda_tensor", rebuild)
    monkeypatch.setattr(cuda, "reduce_tensor", lambda tensor: (rebuild, arguments))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 6)
    platform = get_platform("cuda")
    exported = platform.export_memory(memory)
    assert exported == arguments
    assert platform.open_memory(exported) is memory
    assert opened[0][cuda._DEVICE_ARGUMENT] == 6  # its own device, not the exporter's number
    assert [*opened[0][:6], *opened[0][7:]] == [*arguments[:6], *arguments[7:]]

    monkeypatch.setattr(cuda, "reduce_tensor", lambda tensor: (print, ()))
    with pytest.raises(RuntimeError, match="a tensor on cpu has no IPC handle"):
        platform.export_memory(memory)


@pytest.mark.parametrize("name", ["cpu", "npu"])
def test_where_memory_has_no_handle_it_is_said(name: str) -> None:
    platform = get_platform(name)
    with pytest.raises(RuntimeError, match=f"platform {name}: device memory cannot be shared"):
        platform.export_memory(torch.zeros(1))
    with pytest.raises(RuntimeError, match=f"platform {name}: device memory cannot be shared"):
        platform.open_memory(())


def test_each_collective_back_end_has_its_platform() -> None:
    for backend, name in [("gloo", "cpu"), ("nccl", "cuda"), ("hccl", "npu")]:
        assert collective_platform(backend).name == name
    with pytest.raises(ValueError, match="backend='mpi': must be one of gloo, nccl, hccl"):
        collective_platform("mpi")


# --- senders over them ---------------------------------------------------------------------------


class FakeGroup:
    """A group whose broadcasts are done when they are waited for, and seen by the test."""

    def __init__(self, fails_at: int = -1) -> None:
        self.begun: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []
        self._fails_at = fails_at

    def begin_broadcast(self, tensor: torch.Tensor) -> int:
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        self.begun.append(tensor)
        return len(self.begun) - 1

    def wait(self, work: int) -> None:
        if work == self._fails_at:
            raise TransferGroupError("peer is gone")
        self.copies.append(self.begun[work].clone())  # as it is now: must not have changed

    def close(self) -> None:
        pass


def connected_sender(bucket_bytes: int, group: FakeGroup, backend: str = "nccl") -> typing.Any:
    sender: typing.Any = BACKENDS[backend](bucket_bytes)
    sender._group = group
    return sender


class FixedLink:
    """A receiver's link that gives one buffer."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer

    def receive(self, num_bytes: int) -> torch.Tensor:
        assert self._buffer.numel() * 4 == num_bytes
        return self._buffer.view(torch.uint8)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the platforms' buffers lie in host memory."""
    monkeypatch.setattr(collective, "collective_platform", lambda backend: get_platform("cpu"))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("backend", ["gloo", "nccl", "hccl"])
def test_broadcast_buckets_arrive_unchanged_though_their_memory_is_used_again(backend: str) -> None:
    group = FakeGroup()
    sender = connected_sender(64, group, backend)
    tensors = [(f"{name}{i}", tensor + i) for i in range(4) for name, tensor in NAMED_TENSORS]
    buckets = list(sender.buckets(1, tensors))
    received = {}
    for bucket, copy in zip(buckets, group.copies, strict=True):
        received |= bucket.open(FixedLink(copy))
    assert list(received) == [name for name, _ in tensors]
    assert all(torch.equal(received[name], tensor) for name, tensor in tensors)
    # Two buffers serve all buckets of ordinary size.
    ordinary = {t.data_ptr() for t in group.begun if t.numel() * 4 == 64}
    assert len(buckets) > 8 and len(ordinary) <= 3
    sender.close()


@pytest.mark.usefixtures("on_cpu")
def test_a_lost_receiver_ends_the_push_but_not_the_source() -> None:
    sender = connected_sender(1, FakeGroup(fails_at=0))
    source = iter(NAMED_TENSORS)
    with pytest.raises(WeightTransferInterrupted, match="sending a bucket: peer is gone"):
        list(sender.buckets(1, source))
    with pytest.raises(WeightUpdateError, match="no complete push"):
        _ = sender.push_checksum
    assert [name for name, _ in source] == ["d"]  # the rest can still be gathered
    sender.close()


def test_without_a_connection_nothing_is_sent_or_received() -> None:
    with pytest.raises(WeightTransferInterrupted, match="has joined no connection"):
        next(BACKENDS["gloo"](64).buckets(1, NAMED_TENSORS))
    with pytest.raises(WeightTransferInterrupted, match="has not joined"):
        collective.BroadcastHandle(64).attach()


def test_no_sender_at_the_address_is_an_interruption() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    connection = collective.CollectiveConnection("gloo", "127.0.0.1", port, 2, 1.0)
    with pytest.raises(WeightTransferInterrupted, match=f"no weight sender at 127.0.0.1:{port}"):
        connection.join(1)


class HandlePlatform(Platform):
    """Device memory by handle, played in host memory: the handle is the tensor's address."""

    name = "cuda"
    exports: typing.ClassVar[list[torch.Tensor]] = []

    def current_device(self) -> torch.device:
        return CPU

    def synchronize(self) -> None:
        pass

    def export_memory(self, tensor: torch.Tensor) -> int:
        assert all(tensor.data_ptr() != other.data_ptr() for other in self.exports)
        self.exports.append(tensor)
        return tensor.data_ptr()

    def open_memory(self, exported: int) -> torch.Tensor:
        for tensor in self.exports:
            if tensor.data_ptr() == exported:
                return tensor
        raise RuntimeError("invalid handle")


HandlePlatform.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def test_buckets_in_device_memory_are_copied_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = HandlePlatform()  # type: ignore[abstract]
    platform.exports.clear()
    monkeypatch.setattr(device_memory, "get_platform", lambda name: platform)
    sender = BACKENDS["cuda_ipc"](64)
    received = {}
    for bucket in sender.buckets(1, NAMED_TENSORS):
        received |= bucket.open()
    for memory in platform.exports:
        memory.zero_()
    assert all(torch.equal(received[name], tensor) for name, tensor in NAMED_TENSORS)
    platform.exports.clear()
    with pytest.raises(WeightUpdateError, match=r"must be on one node.*: invalid handle"):
        bucket.open()
    sender.close()


def test_back_ends_by_device() -> None:
    assert backends_for("cpu") == ("shared_memory", "gloo")
    assert backends_for("cuda") == ("nccl", "cuda_ipc", "shared_memory", "gloo")
    assert backends_for("npu") == ("hccl", "shared_memory", "gloo")
    assert set(BACKENDS) == {name for d in ("cpu", "cuda", "npu") for name in backends_for(d)}
    with pytest.raises(ValueError, match="device_name='tpu': must be one of cpu, cuda, npu"):
        backends_for("tpu")
    assert [name for name in BACKENDS if requires_one_node(name)] == ["shared_memory", "cuda_ipc"]


def test_auto_is_what_the_device_does_best_and_what_reaches_all_nodes() -> None:
    chosen = {
        (device, is_one): choose_backend("auto", device, is_one)
        for device in ("cpu", "cuda", "npu")
        for is_one in (True, False)
    }
    assert chosen == {
        ("cpu", True): "shared_memory",
        ("cpu", False): "gloo",
        ("cuda", True): "nccl",
        ("cuda", False): "nccl",
        ("npu", True): "hccl",
        ("npu", False): "hccl",
    }
    assert choose_backend("cuda_ipc", "cuda", is_one_machine=False) == "cuda_ipc"
    with pytest.raises(ValueError, match=r"weight_sync.backend = 'hccl'.*'auto', 'nccl'"):
        choose_backend("hccl", "cuda", is_one_machine=True)
