"""The states of a rank's random generators, as values that JSON can hold."""

from __future__ import annotations

import base64
import random
from typing import Any, cast

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from r2vpo_megatron.device.base import Platform


def random_state(platform: Platform) -> dict[str, Any]:
    """Of Python, numpy (its global generator), torch on host and device, and Megatron's tracker."""
    version, python_state, python_gauss = random.getstate()
    algorithm, keys, position, has_gauss, gauss = cast("Any", np.random.get_state())
    return {
        "python": [version, list(python_state), python_gauss],
        "numpy": [algorithm, keys.tolist(), position, has_gauss, gauss],
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
    try:
        version, python_state, python_gauss = saved["python"]
        algorithm, keys, position, has_gauss, gauss = saved["numpy"]
        random.setstate((version, tuple(python_state), python_gauss))
        np.random.set_state((algorithm, np.array(keys, np.uint32), position, has_gauss, gauss))
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
