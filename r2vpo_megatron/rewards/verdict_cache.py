"""Verdicts that were given before, bounded in number and in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict

from r2vpo_megatron.rewards.result import Equivalence

MAX_ENTRIES = 1 << 17
MAX_BYTES = 32 << 20
ENTRY_BYTES = 400  # of Python's objects for one entry, beside its characters


class VerdictCache:
    """Least recently used verdicts on (prediction, gold); safe to use from several threads."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[tuple[str, str], Equivalence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._verdicts)

    def get(self, pair: tuple[str, str]) -> Equivalence | None:
        """The verdict on `pair`, None where there is none."""
        with self._lock:
            verdict = self._verdicts.get(pair)
            if verdict is not None:
                self._verdicts.move_to_end(pair)
            return verdict

    def put(self, pair: tuple[str, str], verdict: Equivalence) -> None:
        """Keep a verdict, unless it would be another next time; drop the oldest beyond bounds."""
        if not verdict.is_lasting:
            return
        with self._lock:
            if pair not in self._verdicts:
                self.num_bytes += _size(pair)
            self._verdicts[pair] = verdict
            self._verdicts.move_to_end(pair)
            while len(self._verdicts) > self.max_entries or self.num_bytes > self.max_bytes:
                oldest, _ = self._verdicts.popitem(last=False)
                self.num_bytes -= _size(oldest)


def _size(pair: tuple[str, str]) -> int:
    """An upper bound: four bytes a character, as Python keeps text with rare characters."""
    return ENTRY_BYTES + 4 * (len(pair[0]) + len(pair[1]))
