"""Every recipe is valid, and what should be alike among them is."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.rl.objectives import OBJECTIVES
from recipes import tiny_cpu

RECIPES = {
    name: function
    for name, function in inspect.getmembers(tiny_cpu, inspect.isfunction)
    if function.__module__ == tiny_cpu.__name__ and not name.startswith("_") and name != "self_test"
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_is_valid_and_named_after_its_objective(name: str) -> None:
    config: RunConfig = RECIPES[name]()
    config.validate()
    assert config.algorithm.objective in OBJECTIVES
    assert name.startswith(config.algorithm.objective + "_o")
    assert config.updates_per_iteration == (2 if name.endswith("_dual") else 4)


@pytest.mark.parametrize("regime", ["on_policy", "off_policy"])
def test_a_comparison_differs_by_its_objective_alone(regime: str) -> None:
    configs = [RECIPES[f"{name}_{regime}"]() for name in ("r2vpo", "grpo", "gppo", "topr")]
    stripped = {
        replace(config, algorithm=replace(config.algorithm, objective="r2vpo"))
        for config in configs
    }
    assert len(stripped) == 1


def test_side_by_side_differs_by_the_pipeline_and_its_denominator_alone() -> None:
    base, config = tiny_cpu.r2vpo_off_policy(), tiny_cpu.r2vpo_off_policy_async()
    assert (config.pipeline.mode, config.iterations_ahead) == ("asynchronous", 1)
    algorithm = replace(config.algorithm, behavior_logprobs=base.algorithm.behavior_logprobs)
    assert replace(config, pipeline=base.pipeline, algorithm=algorithm) == base


def test_the_self_test_is_small_and_valid() -> None:
    config = tiny_cpu.self_test()
    config.validate()
    assert config.train.num_iterations == 50
    assert config.samples_per_iteration == 64
