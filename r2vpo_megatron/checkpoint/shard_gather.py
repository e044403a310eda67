"""The shards of a parameter, from all ranks of a tensor-parallel group to its first."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.device.host_memory import LaneOffer, MemoryLane, join_lane, reach_lane
from r2vpo_megatron.parallel.state import ParallelState


class ShardGather:
    """Brings shards to TP rank 0, parameter by parameter.

    Where they lie in host memory, the ranks on rank 0's host copy theirs into memory that it maps:
    the way through gloo and a socket costs several times as much. All others send.

    Args:
        state: where this rank stands; every rank of its TP group makes a ShardGather (collective).
        largest_shard_bytes: of the parameters to come, the same on all ranks; each rank but the
            first shares so much memory.
    """

    def __init__(self, state: ParallelState, largest_shard_bytes: int) -> None:
        self._group = state.tensor_group
        self._first, *self._others = dist.get_process_group_ranks(self._group)
        self._is_first = state.tensor_rank == 0
        self._lanes: dict[int, MemoryLane] = {}  # by the rank at the other end
        if state.device.type == "cpu" and self._others:
            if self._is_first:
                self._join_lanes()
            else:
                self._offer_lane(largest_shard_bytes)

    def gather(self, local: Tensor) -> list[Tensor]:
        """One parameter's shards; collective over the TP group.

        Args:
            local: this rank's, of one shape on all ranks.

        Returns:
            On TP rank 0 all shards in the order of the ranks, to be read before the next call:
            they may be other ranks' memory. On the others nothing.
        """
        if self._is_first:
            # All may fill their memory before the first of them is waited for.
            for lane in self._lanes.values():
                lane.make_room(local)
            return [local, *(self._receive(local, rank) for rank in self._others)]
        if self._first in self._lanes:
            self._lanes[self._first].write(local)
        else:
            dist.send(local.contiguous(), dst=self._first, group=self._group)
        return []

    def _receive(self, local: Tensor, rank: int) -> Tensor:
        if rank in self._lanes:
            return self._lanes[rank].read(local)
        shard = torch.empty_like(local)
        dist.recv(shard, src=rank, group=self._group)
        return shard

    def _offer_lane(self, capacity_bytes: int) -> None:
        offer = LaneOffer()
        dist.send_object_list([offer.address], dst=self._first, group=self._group)
        came: list[Any] = [None]
        dist.recv_object_list(came, src=self._first, group=self._group)
        if came[0]:
            self._lanes[self._first] = offer.accept(capacity_bytes)
        offer.close()

    def _join_lanes(self) -> None:
        for rank in self._others:
            address: list[Any] = [None]
            dist.recv_object_list(address, src=rank, group=self._group)
            line = None
            with contextlib.suppress(OSError):  # it is on another host
                line = reach_lane(address[0])
            dist.send_object_list([line is not None], dst=rank, group=self._group)
            if line is not None:
                self._lanes[rank] = join_lane(line)
