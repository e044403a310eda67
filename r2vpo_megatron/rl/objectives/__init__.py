"""Objectives by the names that recipes use."""

from __future__ import annotations

from r2vpo_megatron.rl.objectives.base import Objective, ObjectiveInputs
from r2vpo_megatron.rl.objectives.baselines import GPPO, GRPO, SPO, TOPR, Unclipped
from r2vpo_megatron.rl.objectives.r2vpo import R2VPO

OBJECTIVES: dict[str, Objective] = {
    "r2vpo": R2VPO(),
    "grpo": GRPO(eps_low=0.2, eps_high=0.2),
    "grpo_clip_high": GRPO(eps_low=0.2, eps_high=0.28),
    "gppo": GPPO(),
    "topr": TOPR(),
    "topr_geometric": TOPR(ratio_level="sequence_geometric"),
    "topr_token": TOPR(ratio_level="token"),
    "spo": SPO(),
    "unclipped": Unclipped(),
}

__all__ = ["OBJECTIVES", "Objective", "ObjectiveInputs"]
