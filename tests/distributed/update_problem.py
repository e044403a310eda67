"""What the updates that are compared learn from: mini-batches of uneven length, and a model."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.records import Trajectory
from tests.distributed.float64 import float64_for_float32
from tests.distributed.learner_runs import make_trajectories, run_config
from tests.distributed.reference_update import float64_model, response_logprobs
from tests.distributed.tiny_checkpoints import save_checkpoint

# (prompt, response) tokens of each trajectory, by mini-batch; all of more than ONE_EACH / 2. The
# last one leaves a rank of three without data.
LENGTHS = (
    ((12, 2), (3, 20), (8, 6), (11, 9), (5, 14)),
    ((4, 17), (12, 1), (6, 12), (9, 7)),
    ((7, 16), (10, 4)),
)
ADVANTAGES = ((1.3, -0.7, 0.0, -1.1, 0.5), (-0.9, 1.2, 0.4, -0.6), (0.8, -1.4))
# Token budgets: no two trajectories fit into a micro-batch, about two, all of them.
ONE_EACH, SOME, ALL = 24, 48, 1024


def save_well_conditioned(variant: str, folder: Path) -> torch.nn.Module:
    """A checkpoint with four KV heads whose gradients fp32 computes to about 1e-6.

    A residual stream that the embedding dominates loses few digits in its norms.
    """
    model = save_checkpoint(variant, folder, num_heads=8, num_kv_heads=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name and variant == "pangu-untied":
                parameter.mul_(3.0)  # not where it is the head as well
            elif any(part in name for part in ("mlp", "v_proj", "o_proj")):
                parameter.mul_(0.5)
    model.save_pretrained(folder)
    return model


def make_mini_batches(model: torch.nn.Module) -> list[list[Trajectory]]:
    """Trajectories with ratios of about 0.4 to 2.5, so that every clip is in force somewhere.

    One token, in a response without advantage, is far beyond the log-ratio's limit: with a
    denominator that no probability has, since no tiny model would get there by itself.
    """
    random = np.random.default_rng(0)
    mini_batches = []
    for seed, (lengths, advantages) in enumerate(zip(LENGTHS, ADVANTAGES, strict=True)):
        mini_batches.append(make_trajectories(lengths, seed, advantages))
    temperature = run_config(ParallelConfig()).rollout.temperature
    reference = float64_model(model)
    for trajectory in itertools.chain(*mini_batches):
        with float64_for_float32(), torch.no_grad():
            logprobs = response_logprobs(reference, trajectory, temperature)[0].numpy()
        noise, mismatch = 0.35 * random.normal(size=(2, len(logprobs)))
        trajectory.behavior_logprobs[:] = logprobs + noise
        trajectory.rollout_logprobs[:] = trajectory.behavior_logprobs + mismatch
    mini_batches[0][2].behavior_logprobs[3] = 21.0
    return mini_batches
