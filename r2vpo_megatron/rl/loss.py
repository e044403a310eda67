"""From log-probs to the loss and its statistics: what one micro-batch contributes.

    log pi_theta, log pi_off -> rho -> surrogate (objective) -> weight (aggregation) -> sum

Pure: no collectives, no Megatron. The denominator is divided out once per optimizer step, over
the global batch (`aggregation`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from r2vpo_megatron.rl.aggregation import token_weights
from r2vpo_megatron.rl.objectives import Objective, ObjectiveInputs
from r2vpo_megatron.rl.ratios import importance_ratios
from r2vpo_megatron.rl.statistics import ratio_vector


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of one micro-batch, N of them, on the rank's device.

    Attributes:
        behavior_logprobs: [N] fp32, log pi_off.
        advantages: [N] fp32.
        sequence_lengths: [N] fp32, response tokens of the token's whole response.
        sequence_ids: [N] int64 in 0..num_sequences-1.
        num_sequences: responses of the micro-batch.
    """

    behavior_logprobs: Tensor
    advantages: Tensor
    sequence_lengths: Tensor
    sequence_ids: Tensor
    num_sequences: int


def sum_over_sequences(values_N: Tensor, tokens: ResponseTokens) -> Tensor:
    """[N] sums of `values_N` over each token's response, on this rank."""
    sums = values_N.new_zeros(max(tokens.num_sequences, 1))
    return sums.index_add(0, tokens.sequence_ids, values_N)[tokens.sequence_ids]


def policy_loss(
    policy_logprobs_N: Tensor,
    tokens: ResponseTokens,
    objective: Objective,
    aggregation: str,
    ratio_penalty: float,
    entropy_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Minus the weighted sum of surrogates, and the statistics vector of the micro-batch.

    Args:
        policy_logprobs_N: [N] fp32, log pi_theta with gradient.
        tokens: what is known of these N tokens.
        objective: one of OBJECTIVES.
        aggregation: one of AGGREGATIONS.
        ratio_penalty: lambda of this update.
        entropy_N: [N] fp32 in nats, reported alone, where it was computed.

    Returns:
        Scalar fp32 loss (a sum, not yet divided) and the [9] fp32 vector of `ratio_vector`.
    """
    ratios = importance_ratios(policy_logprobs_N, tokens.behavior_logprobs)
    sequence_log_ratio = None
    if objective.needs_sequence_ratio:
        sequence_log_ratio = sum_over_sequences(ratios.log_ratio.detach(), tokens)
    inputs = ObjectiveInputs(
        ratios=ratios,
        advantages=tokens.advantages,
        sequence_log_ratio=sequence_log_ratio,
        sequence_lengths=tokens.sequence_lengths,
        ratio_penalty=ratio_penalty,
    )
    weighted = objective.surrogate(inputs) * token_weights(aggregation, tokens.sequence_lengths)
    with torch.no_grad():
        gradient_weights = objective.gradient_weight(inputs)
    vector = ratio_vector(ratios, tokens.advantages, gradient_weights, weighted, entropy_N)
    return -weighted.sum(), vector
