"""The gate at step 0: fresh data must have a ratio of 1.

At a run's first update the learner's weights are those that sampled, so every rho is 1 but for
rounding. If not, prompts, temperature, positions or weights differ between the two places that
compute log-probs, and training would optimise that difference.
"""

from __future__ import annotations

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.iteration_metrics import Metrics

# Largest |rho - 1| of a token. bf16 activations differ with the shape of a micro-batch.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}


def check_first_update(update: Metrics, config: RunConfig) -> None:
    """Stop the run if the first update's ratios are not 1.

    Only where the learner itself computed the denominator; the engine's log-probs carry the
    engine's own rounding, which `logprob_gap/*` reports.

    Raises:
        RuntimeError: naming the deviation and what is allowed.
    """
    if config.algorithm.behavior_logprobs != "learner" or "ratio/max" not in update:
        return
    deviation = max(update["ratio/max"] - 1.0, 1.0 - update["ratio/min"])
    allowed = TOLERANCE[config.model.dtype]
    if deviation > allowed:
        raise RuntimeError(
            f"at the first update a ratio is off 1 by {deviation:.2g} (allowed: {allowed:g} in "
            f"{config.model.dtype}): the learner does not reproduce its own log-probs"
        )
