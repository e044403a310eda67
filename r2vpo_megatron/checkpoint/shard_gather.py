"""The shards of a parameter, from all ranks of a tensor-parallel group to its first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import Shard
from r2vpo_megatron.device.process_memory import OfferedMemory, RemoteTensor
from r2vpo_megatron.parallel.state import ParallelState


class ShardGather:
    """Brings shards to TP rank 0, parameter by parameter.

    Where they lie in host memory, rank 0 reads those of its host where they are, once: the way
    through gloo and a socket costs several times as much. All others send.

    Args:
        state: where this rank stands; every rank of its TP group makes a ShardGather (collective).
        parameters: of this rank; unchanged until `finish`.
    """

    def __init__(self, state: ParallelState, parameters: Mapping[str, Tensor]) -> None:
        self._group = state.tensor_group
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._first, *self._others = dist.get_process_group_ranks(self._group)
        self._is_first = state.tensor_rank == 0
        self._is_any_readable = False
        self._memory: OfferedMemory | None = None
        self._sends = True  # to the first, which cannot read here
        self._readable: dict[int, tuple[int, Mapping[str, int]]] = {}  # by rank
        if state.device.type == "cpu" and self._others:
            self._agree_on_reading()

    def gather(self, name: str) -> list[Shard]:
        """One parameter's shards; collective over the TP group.

        Returns:
            On TP rank 0 all shards in the order of the ranks, those of its host to be read before
            `finish`. On the others nothing.
        """
        local = self._parameters[name]
        if self._is_first:
            return [local, *(self._shard_of(rank, name, local) for rank in self._others)]
        if self._sends:
            dist.send(local.contiguous(), dst=self._first, group=self._group)
        return []

    def finish(self) -> None:
        """Let the ranks change their parameters again: all has been read; collective."""
        if self._is_any_readable:
            dist.barrier(self._group)
        if self._memory is not None:
            self._memory.take_back()

    def _shard_of(self, rank: int, name: str, like: Tensor) -> Shard:
        if rank in self._readable:
            pid, addresses = self._readable[rank]
            return RemoteTensor(pid, addresses[name], torch.empty_like(like, device="meta"))
        shard = torch.empty_like(like)
        dist.recv(shard, src=rank, group=self._group)
        return shard

    def _agree_on_reading(self) -> None:
        reader = [os.getpid()]
        dist.broadcast_object_list(reader, src=self._first, group=self._group)
        memory = self._memory = OfferedMemory(reader[0])
        are_in_place = all(parameter.is_contiguous() for parameter in self._parameters.values())
        addresses = {name: parameter.data_ptr() for name, parameter in self._parameters.items()}
        offers: list[Any] = [None] * self._group.size()
        offer = (memory.offer, addresses) if are_in_place else None
        dist.all_gather_object(offers, offer, group=self._group)
        if self._is_first:
            for rank, offered in zip(self._others, offers[1:], strict=True):
                if offered is not None and offered[0].is_readable():
                    self._readable[rank] = (offered[0].pid, offered[1])
        readable = [list(self._readable)]
        dist.broadcast_object_list(readable, src=self._first, group=self._group)
        self._is_any_readable = bool(readable[0])
        self._sends = dist.get_rank() not in readable[0]
