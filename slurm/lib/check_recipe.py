"""Check a recipe and its overrides against the devices of the two groups of nodes.

check_recipe.py LEARNER_DEVICES ROLLOUT_DEVICES RECIPE_FILE.py:function [--section.field value ...]
"""

from __future__ import annotations

import re
import sys

from r2vpo_megatron.cli.command_line import parse_command_line
from r2vpo_megatron.config import RunConfig


def main(arguments: list[str]) -> int:
    """0 and a line on what runs where, or 2 and what is wrong."""
    learner_devices, rollout_devices = int(arguments[0]), int(arguments[1])
    # As cli.train reads its command line.
    words = [re.sub(r"^--resume(?==|$)", "--checkpoint.resume", word) for word in arguments[2:]]
    try:
        config = parse_command_line("check_recipe.py", __doc__ or "", words).config
        require_devices(config, learner_devices, rollout_devices)
    except (ValueError, OSError) as error:
        print(error)
        return 2
    parallel, rollout = config.parallel, config.rollout
    print(
        f"learner: {parallel.num_ranks} ranks (TP {parallel.tensor}, PP {parallel.pipeline}, "
        f"CP {parallel.context}, DP {parallel.data}) on {learner_devices} devices; rollout: "
        f"{rollout.num_engines} engines of TP {rollout.tensor_parallel} on {rollout_devices}"
    )
    return 0


def require_devices(config: RunConfig, learner_devices: int, rollout_devices: int) -> None:
    """Check that each group's devices are all used, and are enough.

    Raises:
        ValueError: naming the variables at fault.
    """
    num_ranks = config.parallel.num_ranks
    if num_ranks != learner_devices:
        raise ValueError(
            f"the learner has {num_ranks} ranks (TENSOR_PARALLEL x PIPELINE_PARALLEL x "
            f"CONTEXT_PARALLEL x DATA_PARALLEL), and its nodes {learner_devices} devices "
            "(LEARNER_NODES, DEVICES_PER_NODE): must be equal"
        )
    num_used = config.rollout.num_engines * config.rollout.tensor_parallel
    if num_used != rollout_devices:
        raise ValueError(
            f"the engines use {num_used} devices (NUM_ENGINES x ENGINE_TENSOR_PARALLEL), and "
            f"their nodes have {rollout_devices} (ROLLOUT_NODES, DEVICES_PER_NODE): must be equal"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
