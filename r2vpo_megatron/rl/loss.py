"""From log-probs to the loss and its statistics: what one micro-batch contributes.

    log pi_theta, log pi_off -> rho -> surrogate (objective) -> token weight -> sum

A token's weight is its aggregation weight, times its truncated importance weight where those are
on. Pure: no collectives, no Megatron. The denominator is divided out once per optimizer step,
over the global batch (`aggregation`).

Shape legend: N response tokens of a micro-batch, or of a part of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from r2vpo_megatron.rl.aggregation import token_weights
from r2vpo_megatron.rl.objectives import Objective, ObjectiveInputs
from r2vpo_megatron.rl.ratios import Ratios, importance_ratios, truncated_importance_weights
from r2vpo_megatron.rl.staleness import staleness_sums
from r2vpo_megatron.rl.statistics import MicroBatchStatistics, ratio_vector


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of one micro-batch, N of them, on the rank's device.

    Attributes:
        behavior_logprobs: [N] fp32, log pi_off.
        rollout_logprobs: [N] fp32, the engine's log-probs of the same tokens and weights.
        policy_versions: [N] int64, version of the weights that sampled each token.
        advantages: [N] fp32.
        sequence_lengths: [N] fp32, response tokens of the token's whole response.
        sequence_ids: [N] int64 in 0..num_sequences-1.
        num_sequences: responses of the micro-batch.
        sum_over_context: adds a tensor up over the context-parallel ranks, which share the
            micro-batch's tokens, as a collective of theirs; None where this rank has them all.
    """

    behavior_logprobs: Tensor
    rollout_logprobs: Tensor
    policy_versions: Tensor
    advantages: Tensor
    sequence_lengths: Tensor
    sequence_ids: Tensor
    num_sequences: int
    sum_over_context: Callable[[Tensor], Tensor] | None = None

    def narrow(self, part: slice) -> ResponseTokens:
        """A contiguous part of the tokens, as views; lengths and ids stay those of the whole."""
        return replace(
            self,
            behavior_logprobs=self.behavior_logprobs[part],
            rollout_logprobs=self.rollout_logprobs[part],
            policy_versions=self.policy_versions[part],
            advantages=self.advantages[part],
            sequence_lengths=self.sequence_lengths[part],
            sequence_ids=self.sequence_ids[part],
        )


def sum_over_sequences(values_N: Tensor, tokens: ResponseTokens) -> Tensor:
    """[N] sums of `values_N`, without gradient, over each token's whole response.

    Collective: every rank of the context group must call, also one without response tokens.
    """
    sums = values_N.new_zeros(max(tokens.num_sequences, 1))
    sums = sums.index_add(0, tokens.sequence_ids, values_N.detach())
    if tokens.sum_over_context is not None:
        sums = tokens.sum_over_context(sums)
    return sums[tokens.sequence_ids]


@dataclass(frozen=True)
class LossSettings:
    """What is optimised in one update.

    Attributes:
        objective: one of OBJECTIVES.
        aggregation: one of AGGREGATIONS.
        ratio_penalty: lambda of this update.
        policy_version: what the staleness of a token is counted from, for the statistics alone.
        importance_cap: upper end of the truncated importance weights; 0 turns them off.
        entropy_coefficient: weight of the entropy, aggregated like the surrogates.
    """

    objective: Objective
    aggregation: str
    ratio_penalty: float
    policy_version: int = 0
    importance_cap: float = 0.0
    entropy_coefficient: float = 0.0

    @property
    def is_local(self) -> bool:
        """Whether a token's log-prob alone decides the loss's derivative by it."""
        return not self.objective.needs_sequence_ratio and self.entropy_coefficient == 0


def policy_loss(
    policy_logprobs_N: Tensor,
    tokens: ResponseTokens,
    settings: LossSettings,
    entropy_N: Tensor | None = None,
    denominator: int = 0,
) -> tuple[Tensor, MicroBatchStatistics]:
    """Minus the weighted sum of surrogates, and the statistics of the micro-batch.

    Args:
        policy_logprobs_N: [N] fp32, log pi_theta with gradient.
        tokens: what is known of these N tokens.
        settings: of this update.
        entropy_N: [N] fp32 in nats, where it was computed; with gradient where it has a
            coefficient.
        denominator: what these tokens add to what the loss is divided by.

    Returns:
        Scalar fp32 loss (a sum, not yet divided) and what the statistics need of these tokens.
    """
    ratios = importance_ratios(policy_logprobs_N, tokens.behavior_logprobs)
    inputs = _objective_inputs(ratios, tokens, settings)
    importance_N = _importance_weights(tokens, settings)
    weighted = settings.objective.surrogate(inputs) * _token_weights(tokens, settings, importance_N)
    with torch.no_grad():
        gradient_weights = settings.objective.gradient_weight(inputs)
        non_finite_N = _non_finite(policy_logprobs_N, tokens, weighted)
    vector = ratio_vector(
        ratios,
        tokens.advantages,
        gradient_weights,
        weighted,
        entropy_N,
        importance_N,
        settings.importance_cap,
        non_finite_N,
        denominator,
    )
    loss = -weighted.sum()
    if settings.entropy_coefficient:
        assert entropy_N is not None
        weights = token_weights(settings.aggregation, tokens.sequence_lengths)
        loss = loss - settings.entropy_coefficient * (entropy_N * weights).sum()
    excess = ratios.excess.detach().float()
    staleness = staleness_sums(
        excess, tokens.advantages, tokens.policy_versions, settings.policy_version
    )
    at_fault = excess.new_zeros(tokens.num_sequences)
    at_fault = at_fault.index_add(0, tokens.sequence_ids, non_finite_N.float())
    return loss, MicroBatchStatistics(vector, excess, staleness, at_fault)


def loss_gradient(
    policy_logprobs_N: Tensor, tokens: ResponseTokens, settings: LossSettings
) -> Tensor:
    """d policy_loss / d log pi_theta per token in closed form, without gradient.

    For settings that are local to a token, so it holds for any part of a micro-batch,
    `tokens.narrow(part)`, as well as for the whole.

    Args:
        policy_logprobs_N: [N] fp32, log pi_theta.
        tokens, settings: as for `policy_loss`.

    Returns:
        [N] fp32, -(aggregation weight x importance weight x gradient_weight).
    """
    assert settings.is_local, "the gradient of a token needs its whole response or its entropy"
    with torch.no_grad():
        ratios = importance_ratios(policy_logprobs_N, tokens.behavior_logprobs)
        inputs = _objective_inputs(ratios, tokens, settings)
        weights_N = _token_weights(tokens, settings, _importance_weights(tokens, settings))
        return -settings.objective.gradient_weight(inputs) * weights_N


def _non_finite(policy_logprobs_N: Tensor, tokens: ResponseTokens, weighted_N: Tensor) -> Tensor:
    """[N] bool: tokens with something that is not finite, whatever the objective makes of it."""
    is_finite = policy_logprobs_N.isfinite() & tokens.behavior_logprobs.isfinite()
    return ~(is_finite & tokens.advantages.isfinite() & weighted_N.isfinite())


def _objective_inputs(
    ratios: Ratios, tokens: ResponseTokens, settings: LossSettings
) -> ObjectiveInputs:
    sequence_log_ratio = None
    if settings.objective.needs_sequence_ratio:
        sequence_log_ratio = sum_over_sequences(ratios.log_ratio.detach(), tokens)
    return ObjectiveInputs(
        ratios=ratios,
        advantages=tokens.advantages,
        sequence_log_ratio=sequence_log_ratio,
        sequence_lengths=tokens.sequence_lengths,
        ratio_penalty=settings.ratio_penalty,
    )


def _importance_weights(tokens: ResponseTokens, settings: LossSettings) -> Tensor | None:
    """[N] truncated importance weights; None where they are off."""
    if settings.importance_cap == 0:
        return None
    return truncated_importance_weights(
        tokens.behavior_logprobs, tokens.rollout_logprobs, settings.importance_cap
    )


def _token_weights(
    tokens: ResponseTokens, settings: LossSettings, importance_N: Tensor | None
) -> Tensor:
    """[N] factors of the surrogates."""
    weights_N = token_weights(settings.aggregation, tokens.sequence_lengths)
    return weights_N if importance_N is None else weights_N * importance_N
