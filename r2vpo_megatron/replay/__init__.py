"""Replay of the samples of past iterations."""

from __future__ import annotations

from r2vpo_megatron.replay.buffer import ReplayBuffer

__all__ = ["ReplayBuffer"]
