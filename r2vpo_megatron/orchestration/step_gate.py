"""The gate at step 0: fresh data must have a ratio of 1.

A run's first update takes its statistics with the weights that sampled, so every rho is 1 but for
rounding. If not, prompts, temperature, positions or weights differ between the two places that
compute log-probs, and training would optimise that difference.
"""

from __future__ import annotations

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.iteration_metrics import Metrics

# Largest E[(rho - 1)^2]. In fp32 that is a root mean square of 3e-5, which one token off by 0.1
# among ten million reaches; in bf16 activations differ with the shape of a micro-batch.
TOLERANCE = {"float32": 1e-9, "bfloat16": 1e-2}
MAX_DEVIATION = {"float32": 1e-3, "bfloat16": float("inf")}  # of one token's ratio


def check_first_update(update: Metrics, config: RunConfig) -> None:
    """Stop the run if the first update's ratios are not 1, or no target can be met.

    With `algorithm.behavior_logprobs: rollout` the denominator carries the engine's rounding.
    That puts a floor under the second moment, below which a dual controller cannot get.

    Raises:
        RuntimeError: naming the second moment and what is allowed.
    """
    algorithm, second_moment = config.algorithm, update["ratio/second_moment"]
    if algorithm.behavior_logprobs == "learner":
        allowed = TOLERANCE[config.model.dtype]
        deviation = max(update["ratio/max"] - 1.0, 1.0 - update["ratio/min"])
        if second_moment > allowed or deviation > MAX_DEVIATION[config.model.dtype]:
            raise RuntimeError(
                f"at the first update E[(rho - 1)^2] is {second_moment:.2g} (allowed: "
                f"{allowed:g} in {config.model.dtype}) and a ratio is off 1 by {deviation:.2g}: "
                f"the learner does not reproduce its own log-probs"
            )
    elif algorithm.dual_controller != "fixed" and algorithm.dual_target <= second_moment:
        raise RuntimeError(
            f"algorithm.dual_target = {algorithm.dual_target:g} cannot be reached: engine and "
            f"learner disagree by E[(rho - 1)^2] = {second_moment:.2g} before any update; choose "
            f"a target above it, or algorithm.behavior_logprobs learner"
        )
