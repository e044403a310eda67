"""A process group of its own between processes that share no default group.

The learner's sender and the engines' workers belong to different worlds, each with a default
process group. A group made directly from a back end's class touches neither.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_FIRST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.0002, 0.005


class TransferGroupError(RuntimeError):
    """A member of the group has gone, or did not answer in time."""


class TransferGroup:
    """Broadcasts from rank 0 to all other ranks, none of which can hang the caller.

    Args:
        backend: an instance of a torch.distributed back end's class.
        timeout_seconds: that a broadcast may take.
    """

    def __init__(self, backend: Any, timeout_seconds: float) -> None:
        self._backend = backend
        self._timeout_seconds = timeout_seconds

    def begin_broadcast(self, tensor: Tensor) -> Any:
        """Begin to send (rank 0) or receive (the others) a contiguous tensor in place.

        Returns:
            What `wait` takes. The tensor must live, unchanged by others, until then.

        Raises:
            TransferGroupError: a member has gone.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            return self._backend.broadcast([tensor], options)
        except RuntimeError as error:
            raise TransferGroupError(f"the broadcast did not begin: {error}") from error

    def wait(self, work: Any) -> None:
        """Wait until a broadcast is done, on the device too.

        Raises:
            TransferGroupError: a member has gone or did not answer in time. The group is of no
                use then.
        """
        # A back end's own waiting blocks a stream rather than the process (NCCL, HCCL), and on its
        # own timeout it may end the process.
        deadline = time.monotonic() + self._timeout_seconds
        pause = _FIRST_POLL_SECONDS
        try:
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise TransferGroupError(
                        f"a broadcast was not done in {self._timeout_seconds:g} s"
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL_SECONDS)
            work.wait()
        except TransferGroupError:
            raise
        except RuntimeError as error:
            raise TransferGroupError(f"a broadcast failed: {error}") from error

    def check(self, device: torch.device) -> None:
        """One small broadcast: communicators are made lazily, and all members must be there.

        Raises:
            TransferGroupError: they are not.
        """
        self.wait(self.begin_broadcast(torch.zeros(16, dtype=torch.int32, device=device)))

    def close(self) -> None:
        """Leave the group at once, whatever is still under way."""
        backend, self._backend = self._backend, None
        if backend is not None:
            with contextlib.suppress(RuntimeError):  # not every back end can
                backend.abort()
