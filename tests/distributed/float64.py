"""Run code that asks for fp32 in float64, so that only mathematics is left to differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from r2vpo_megatron.device import base

_REINTERPRETING = (Tensor.view, torch.asarray)  # a dtype given to these reads bytes as they are


class _Float64ForFloat32(TorchFunctionMode):
    """Every fp32 that a torch function is asked for becomes float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REINTERPRETING:
            return func(*args, **kwargs)
        if func is Tensor.float:
            return Tensor.double(*args, **kwargs)
        args = tuple(_wider(argument) for argument in args)
        result = func(*args, **{name: _wider(argument) for name, argument in kwargs.items()})
        if func is Tensor.to and result.dtype == torch.float32:
            return result.double()  # what comes from numpy is fp32 until it goes to its device
        return result


def _wider(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def float64_for_float32() -> Iterator[None]:
    """Inside, in this thread: parameters, buffers, activations and messages are float64.

    transformers rounds norms, softmax and rotary tables to fp32 whatever the model's dtype, the
    learner is fp32 by configuration and Megatron by many literals; all of them are raised alike.
    Checkpoints are read as they are stored and converted, which is exact.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            # The one type of full precision that Megatron's optimizers know.
            mock.patch.dict(base._CUDA_TYPE_NAMES, {torch.float64: "torch.cuda.FloatTensor"}),
            _Float64ForFloat32(),
        ):
            yield
    finally:
        torch.set_default_dtype(default)
