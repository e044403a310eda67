"""What the workers of a run ask of Ray."""

from __future__ import annotations

from typing import Any

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.device import get_platform


def needed_resources(config: RunConfig, *, with_learner: bool = True) -> dict[str, int]:
    """What all workers of a run ask of Ray: a CPU slot and their devices each.

    Args:
        config: of the run.
        with_learner: False where there are engines only.
    """
    num_ranks = config.parallel.num_ranks if with_learner else 0
    num_devices = num_ranks + config.rollout.num_engines * config.rollout.tensor_parallel
    device = get_platform(config.runtime.device).accelerator_resource()
    num_actors = num_ranks + config.rollout.num_engines
    return {"CPU": num_actors} | ({device: num_devices} if device else {})


def actor_options(
    config: RunConfig, env_vars: dict[str, str], num_devices: int = 1
) -> dict[str, Any]:
    """Ray options of one worker: a CPU slot, its devices where there are any, its environment."""
    device = get_platform(config.runtime.device).accelerator_resource()
    if device is None:
        env_vars = {**env_vars, "CUDA_VISIBLE_DEVICES": ""}  # the CPU was asked for
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": env_vars}}
    if device == "GPU":
        options["num_gpus"] = num_devices
    elif device is not None:
        options["resources"] = {device: num_devices}
    return options
