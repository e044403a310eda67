"""Megatron is imported once, in the parent; every rank is a fork of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from r2vpo_megatron.device import get_platform


@pytest.fixture(scope="session", autouse=True)
def _megatron_in_the_parent() -> Iterator[None]:
    """One thread (OpenMP's do not survive a fork), and the slow imports before any fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    get_platform("cpu").prepare()
    importlib.import_module("r2vpo_megatron.models.build")
    yield
    torch.set_num_threads(threads)
