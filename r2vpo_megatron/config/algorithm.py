"""The section of a run's configuration that says what is optimised."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo_megatron.config.checks import require, require_choice


@dataclass(frozen=True)
class AlgorithmConfig:
    """The objective, its advantages and the ratio penalty's dual variable."""

    objective: str = "r2vpo"
    """Policy-gradient objective by name (r2vpo_megatron.rl.objectives.OBJECTIVES)."""
    advantage: str = "group_normalized"
    """group_normalized: (reward - mean) / (std + 1e-6) in each group; group_centered: no std."""
    aggregation: str = "token_mean"
    """Mean over the optimizer step: token_mean, sequence_mean or token_sum (1/G, Eq. 2)."""
    behavior_logprobs: str = "learner"
    """Denominator of the ratio: learner (recomputed at sampling time) or rollout (the engine's)."""
    truncated_importance_cap: float = 0.0
    """Weight tokens by min(pi_learner / pi_rollout, cap); 0 is off, 2 is usual; learner only."""
    entropy_coefficient: float = 0.0
    """Weight of the policy's entropy in the objective; at 0 it is reported without gradient."""
    overlong_buffer_tokens: int = 0
    """Tokens before rollout.max_response_tokens over which a reward falls by up to 1; 0: off."""
    format_checks: str = ""
    """Checks of a response's form, by name with commas between
    (r2vpo_megatron.rewards.FORMAT_CHECKS); the share that fails is a metric."""
    format_penalty: float = 0.0
    """What a response that fails any of format_checks loses of its reward."""
    filter_zero_advantage_groups: bool = False
    """Leave groups whose rewards are all equal out of the updates."""
    ratio_penalty: float = 0.04
    """Lambda, the weight of (rho - 1)^2: fixed, or where the dual controller starts."""
    dual_controller: str = "fixed"
    """fixed; paper (Eq. 12, linear); multiplicative (log-space, reaches its target)."""
    dual_target: float = 0.04
    """Delta, the second moment of the ratio, E[(rho - 1)^2], that a controller aims at."""
    dual_step_size: float = 1e-3
    """Eta of Eq. 12, lambda's step per unit of violation (paper only)."""
    dual_gain: float = 0.2
    """k, the step of log lambda per relative violation (multiplicative only)."""
    ratio_penalty_min: float = 1e-3
    """Lower end of lambda under the multiplicative controller."""
    ratio_penalty_max: float = 1e3
    """Upper end of lambda under the multiplicative controller."""

    @property
    def format_check_names(self) -> tuple[str, ...]:
        """`format_checks` one by one."""
        return tuple(name.strip() for name in self.format_checks.split(",") if name.strip())

    def __post_init__(self) -> None:
        require_choice(
            "algorithm.advantage", self.advantage, ("group_normalized", "group_centered")
        )
        require_choice(
            "algorithm.behavior_logprobs", self.behavior_logprobs, ("learner", "rollout")
        )
        cap = self.truncated_importance_cap
        require(
            cap == 0 or 1 <= cap < float("inf"),
            "algorithm.truncated_importance_cap",
            cap,
            "0 (off), or at least 1 and finite: below 1 it would cut tokens without any mismatch",
        )
        require(
            cap == 0 or self.behavior_logprobs == "learner",
            "algorithm.truncated_importance_cap",
            cap,
            f"0 with algorithm.behavior_logprobs {self.behavior_logprobs!r}, whose ratio already "
            "has the engine's log-probs as its denominator",
        )
        require_choice(
            "algorithm.dual_controller",
            self.dual_controller,
            ("fixed", "paper", "multiplicative"),
        )
        require(
            self.overlong_buffer_tokens >= 0,
            "algorithm.overlong_buffer_tokens",
            self.overlong_buffer_tokens,
            "0 (off) or above",
        )
        require(
            0 <= self.format_penalty < float("inf"),
            "algorithm.format_penalty",
            self.format_penalty,
            "0 or above, and finite",
        )
        require(
            self.format_penalty == 0 or bool(self.format_check_names),
            "algorithm.format_penalty",
            self.format_penalty,
            "0 without algorithm.format_checks",
        )
        require(
            0 <= self.entropy_coefficient < float("inf"),
            "algorithm.entropy_coefficient",
            self.entropy_coefficient,
            "0 or above, and finite",
        )
        require(
            0 <= self.ratio_penalty < float("inf"),
            "algorithm.ratio_penalty",
            self.ratio_penalty,
            "at least 0 and finite",
        )
        for name in ("dual_target", "dual_step_size", "dual_gain", "ratio_penalty_max"):
            value = getattr(self, name)
            is_valid = 0 < value < float("inf")
            require(is_valid, f"algorithm.{name}", value, "above 0 and finite")
        require(
            self.dual_controller == "fixed" or self.objective == "r2vpo",
            "algorithm.dual_controller",
            self.dual_controller,
            f"'fixed', since algorithm.objective {self.objective!r} has no lambda",
        )
        require(
            0 < self.ratio_penalty_min <= self.ratio_penalty_max,
            "algorithm.ratio_penalty_min",
            self.ratio_penalty_min,
            "above 0 and at most algorithm.ratio_penalty_max",
        )
        low, high = self.ratio_penalty_min, self.ratio_penalty_max
        require(
            self.dual_controller != "multiplicative" or low <= self.ratio_penalty <= high,
            "algorithm.ratio_penalty",
            self.ratio_penalty,
            f"{low:g} to {high:g} (algorithm.ratio_penalty_min and _max) with the multiplicative "
            "controller",
        )
