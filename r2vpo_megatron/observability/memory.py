"""How much memory a process holds."""

from __future__ import annotations

import psutil


def resident_bytes() -> int:
    """Resident memory of the calling process, in bytes."""
    return int(psutil.Process().memory_info().rss)
