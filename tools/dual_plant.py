"""A simulated plant for the dual controllers: how the second moment answers to lambda.

    steady = free * exp(drift * update) / (1 + lambda_(update - delay) / half)
    level += (steady - level) / lag
    observed = level * exp(noise * normal - noise^2 / 2)

First order: replayed responses make the second moment follow the policy with a lag, and those that
wait in the buffer answer to an older lambda. A drift stands for a policy that moves faster and
faster away from its stale responses.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from r2vpo_megatron.rl.dual import DualVariable


@dataclass(frozen=True)
class Plant:
    """Settings of the equations above.

    Attributes:
        free: second moment without any penalty.
        half: lambda that halves it.
        lag: updates until the level has followed by 1 - 1/e, at least 1.
        delay: updates by which lambda acts late.
        noise: relative standard deviation of what one update observes, for small ones.
        drift: growth of `free` per update.
    """

    free: float
    half: float
    lag: float
    delay: int
    noise: float
    drift: float


def run_plant(
    plant: Plant, dual: DualVariable, num_updates: int, seed: int
) -> tuple[list[float], list[float]]:
    """Let the controller meet the plant.

    Returns:
        [num_updates] levels, without the noise that the controller saw, and [num_updates] lambda.
    """
    generator = random.Random(seed)
    level, levels, penalties = 0.0, [], []
    for update in range(num_updates):
        penalties.append(dual.value)
        acting = penalties[max(update - plant.delay, 0)]
        steady = plant.free * math.exp(plant.drift * update) / (1.0 + acting / plant.half)
        level += (steady - level) / plant.lag
        levels.append(level)
        noise = math.exp(plant.noise * generator.gauss(0.0, 1.0) - plant.noise**2 / 2)
        dual.step(level * noise)
    return levels, penalties
