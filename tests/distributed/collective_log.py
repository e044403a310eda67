"""What a rank asks of torch.distributed, in order: to be compared with what the others ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[Any, ...]  # name, then (shape, dtype) of each tensor
Ranks = tuple[int, ...]  # global ranks of a group
_POINT_TO_POINT = {"send": "send", "recv_": "receive"}


@dataclass
class CollectiveLog:
    """Collectives by group, and messages by (sender, receiver); both in order."""

    collectives: dict[Ranks, list[Call]] = field(default_factory=dict)
    sent: dict[tuple[int, int], list[Call]] = field(default_factory=dict)
    received: dict[tuple[int, int], list[Call]] = field(default_factory=dict)


class RecordCollectives(TorchDispatchMode):
    """Inside, every call of this thread that goes to a process group is written to `log`.

    It sees the operators of c10d themselves, whatever function of whatever library called them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = CollectiveLog()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        (group,) = (
            dist.ProcessGroup.unbox(argument)
            for argument in args
            if isinstance(argument, torch.ScriptObject)
            and argument._type().name() == "ProcessGroup"
        )
        ranks = tuple(dist.get_process_group_ranks(group))
        call = tuple(
            (tuple(leaf.shape), leaf.dtype)
            for leaf in tree_leaves(args)
            if isinstance(leaf, Tensor)
        )
        kind = _POINT_TO_POINT.get(name)
        if kind is None:
            self.log.collectives.setdefault(ranks, []).append((name, *call))
            return
        me, other = dist.get_rank(), ranks[args[2]]
        if kind == "send":
            self.log.sent.setdefault((me, other), []).append(call)
        else:
            self.log.received.setdefault((other, me), []).append(call)


def disagreements(logs: Sequence[CollectiveLog]) -> Iterator[str]:
    """Where the ranks' logs, by global rank, do not fit together."""
    for rank, log in enumerate(logs):
        for ranks, calls in log.collectives.items():
            for member in ranks:
                theirs = logs[member].collectives.get(ranks, [])
                if theirs != calls:
                    position = _first_difference(calls, theirs)
                    yield (
                        f"call {position} in group {ranks}: rank {rank} has "
                        f"{calls[position : position + 1]}, rank {member} "
                        f"{theirs[position : position + 1]}"
                    )
        for (sender, receiver), messages in log.sent.items():
            if logs[receiver].received.get((sender, receiver), []) != messages:
                yield f"messages from rank {sender} to rank {receiver}"
        for (sender, receiver), messages in log.received.items():
            if logs[sender].sent.get((sender, receiver), []) != messages:
                yield f"messages to rank {receiver} from rank {sender}"


def _first_difference(calls: Sequence[Call], others: Sequence[Call]) -> int:
    for position, (call, other) in enumerate(zip(calls, others, strict=False)):
        if call != other:
            return position
    return min(len(calls), len(others))
