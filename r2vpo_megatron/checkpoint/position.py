"""Where in a run a checkpoint was written, and the name that says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_NAME = re.compile(r"iteration-(\d{6,})(?:-update-(\d{3,}))?")


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a checkpoint was written.

    Attributes:
        iteration: number of iterations that are complete.
        num_mini_batches: of the next one that have been learned from.
    """

    iteration: int
    num_mini_batches: int = 0

    @property
    def name(self) -> str:
        """Of its folder; in the order of positions."""
        name = f"iteration-{self.iteration:06d}"
        return f"{name}-update-{self.num_mini_batches:03d}" if self.num_mini_batches else name

    @classmethod
    def parse(cls, name: str) -> Self:
        """The position of a folder's name.

        Raises:
            ValueError: it is none.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is not the name of a checkpoint, as iteration-000012 is one"
            )
        return cls(int(match[1]), int(match[2] or 0))


def is_position(name: str) -> bool:
    """Whether this is the name of one."""
    return _NAME.fullmatch(name) is not None
