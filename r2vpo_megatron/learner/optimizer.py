"""Megatron's gradient buffers and AdamW around a policy's model chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from r2vpo_megatron.config import OptimizerConfig
from r2vpo_megatron.device.base import Platform
from r2vpo_megatron.parallel.state import ParallelState


@dataclass(frozen=True)
class TrainableModel:
    """Model chunks with gradient buffers, and their optimizer."""

    chunks: list[Any]
    optimizer: Any
    platform: Platform

    def zero_gradients(self) -> None:
        """Clear the gradient buffers of all chunks."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, lr: float) -> float:
        """Clip, update, and return the global gradient norm before clipping.

        Collective: every rank must call, after gradients are finalised.

        Raises:
            FloatingPointError: the norm is not finite; on every rank, and no weight is changed.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.platform.optimizer_context():
            # Optimizer.step would go on with a norm that is not finite: without a loss scaler
            # Megatron does not look at it. It computes the norm again; a pass over the gradients.
            self.optimizer.prepare_grads()
            gradient_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(gradient_norm):
                raise FloatingPointError(f"the gradient norm is not finite: {gradient_norm}")
            self.optimizer.step()
        return gradient_norm


def make_trainable(
    models: Sequence[Any],
    config: OptimizerConfig,
    dtype: torch.dtype,
    state: ParallelState,
    platform: Platform,
) -> TrainableModel:
    """Wrap a rank's model chunks for training.

    Gradients are accumulated and reduced in fp32, and normalised once by Megatron with the
    denominator that the loss function reports.

    Collective: every rank must call.

    Args:
        models: this rank's PolicyModels, one per virtual stage.
        config: AdamW's settings.
        dtype: parameter dtype; bfloat16 gets fp32 main parameters.
        state: where this rank stands.
        platform: the device layer.
    """
    transformer_config = models[0].config
    # On one rank there is nothing to shard, and gloo's thread would copy all gradients and weights:
    # with threads of its own, for which those of the model then yield the processor (a tenth of
    # the time of an update).
    is_distributed = config.distributed and state.data_size * state.context_size > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=is_distributed,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    chunks = [
        DistributedDataParallel(config=transformer_config, ddp_config=ddp_config, module=model)
        for model in models
    ]
    with platform.optimizer_context():
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=0.0,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                weight_decay=config.weight_decay,
                clip_grad=config.max_gradient_norm,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=is_distributed,
            ),
            chunks,
        )
    for group in optimizer.param_groups:
        # Megatron leaves biases and norms out of weight decay by this factor, which only its
        # OptimizerParamScheduler would apply.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's AdamW: neither Transformer Engine's nor Apex's is installed
            group["fused"] = platform.fuses_adamw
    transformer_config.finalize_model_grads_func = finalize_model_grads
    transformer_config.grad_scale_func = optimizer.scale_loss
    transformer_config.no_sync_func = None
    return TrainableModel(chunks, optimizer, platform)
