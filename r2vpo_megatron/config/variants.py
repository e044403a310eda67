"""The runs that the paper compares, of one model: objectives by regime (arXiv 2601.03320, 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from r2vpo_megatron.config.ring import PipelineConfig, ReplayConfig
from r2vpo_megatron.config.run import RunConfig

Recipe = Callable[[], RunConfig]

OBJECTIVES = ("r2vpo", "grpo", "grpo_clip_high", "gppo", "topr")
ON_POLICY_UPDATES = 4  # mini-batches that an iteration of Algorithm 1 is cut into
# E[(rho - 1)^2] that the dual variable aims at: a deviation of 0.2 from 1, and of 0.1.
OFF_POLICY_TARGET, ON_POLICY_TARGET = 0.04, 0.01


def variants(off_policy: Recipe, suffix: str = "") -> dict[str, Recipe]:
    """Recipes by name.

        OBJECTIVE_off_policy         Algorithm 2, as `off_policy` says
        OBJECTIVE_on_policy          Algorithm 1: responses used once, in 4 mini-batches
        r2vpo_*_policy_dual          lambda steered to the target of the ratio's second moment
        r2vpo_*_policy_paper_dual    lambda by Eq. 12, eta 1e-3
        r2vpo_off_policy_async       rollout and learner side by side, samples one version old

    They differ by what their names say, and by nothing else.

    Args:
        off_policy: R2VPO with replay and a fixed lambda.
        suffix: of all names.
    """
    regimes: dict[str, Recipe] = {
        "off_policy": off_policy,
        "on_policy": lambda: on_policy(off_policy()),
    }
    recipes: dict[str, Recipe] = {}
    for regime, base in regimes.items():
        for objective in OBJECTIVES:
            recipes[f"{objective}_{regime}"] = partial(_with, base, objective)
        for name, controller in (("dual", "multiplicative"), ("paper_dual", "paper")):
            recipes[f"r2vpo_{regime}_{name}"] = partial(_with, base, "r2vpo", controller)
    recipes["r2vpo_off_policy_async"] = lambda: side_by_side(off_policy())
    return {f"{name}{suffix}": recipe for name, recipe in recipes.items()}


def on_policy(config: RunConfig) -> RunConfig:
    """Algorithm 1 with the model and the sizes of a configuration of Algorithm 2."""
    return replace(
        config,
        replay=ReplayConfig(capacity_iterations=1, update_to_data=1.0),
        train=replace(
            config.train, mini_batch_samples=config.samples_per_iteration // ON_POLICY_UPDATES
        ),
        algorithm=replace(config.algorithm, dual_target=ON_POLICY_TARGET),
    )


def side_by_side(config: RunConfig) -> RunConfig:
    """Rollout and learner at the same time, samples up to one version old when new.

    The ratio's denominator is what the engines reported, as the learner has moved on by then.
    """
    return replace(
        config,
        algorithm=replace(config.algorithm, behavior_logprobs="rollout"),
        pipeline=PipelineConfig(mode="asynchronous", max_staleness=1),
    )


def _with(base: Recipe, objective: str, dual_controller: str = "fixed") -> RunConfig:
    config = base()
    algorithm = replace(config.algorithm, objective=objective, dual_controller=dual_controller)
    return replace(config, algorithm=algorithm)
