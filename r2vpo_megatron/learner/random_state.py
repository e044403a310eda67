"""The states of a rank's random generators, as values that JSON can hold."""

from __future__ import annotations

import base64
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from r2vpo_megatron.checkpoint.host_random import HostRandom
from r2vpo_megatron.device.base import Platform


def random_state(platform: Platform) -> dict[str, Any]:
    """Of Python, numpy (its global generator), torch on host and device, and Megatron's tracker."""
    return {
        **HostRandom().state_dict(),
        "torch": {name: _encode(state) for name, state in platform.generator_states().items()},
        "megatron": {
            name: _encode(state) for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def restore_random_state(saved: Any, platform: Platform) -> None:
    """Set what `random_state` returned.

    Raises:
        ValueError: it is not that.
    """
    HostRandom().load_state_dict(saved)
    try:
        platform.set_generator_states(
            {name: _decode(state) for name, state in saved["torch"].items()}
        )
        tracked = {name: _decode(state) for name, state in saved["megatron"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"the state of the random generators is broken ({error!r})") from error
    get_cuda_rng_tracker().set_states(tracked)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)
