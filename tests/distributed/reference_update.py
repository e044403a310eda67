"""What an update should be: the textbook formulas in float64, one process, one batch.

Nothing here comes from r2vpo_megatron but the names of settings and records. The model is
transformers' own, each sequence alone and unpadded; log_softmax over the whole vocabulary;
autograd; gradient clipping and AdamW written out; statistics by definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.records import Trajectory
from tests.distributed.float64 import float64_for_float32

LOG_RATIO_LIMIT = 20.0
LARGEST_LOG_STEP = 0.1  # of lambda
QUANTILES = (1, 5, 50, 95, 99)  # per cent
POLICY_VERSION = 6  # that staleness is counted from
STALENESS_NAMES = ("0", "1", "2", "3", "4_or_more")


@dataclass(frozen=True)
class Learned:
    """What a learner made of several updates; the reference's, or one layout's.

    Attributes:
        metrics: of each update.
        gradients: by Hugging Face name, of each update, reduced, before clipping.
        ratio_penalties: lambda before each update and after the last.
        weights: by Hugging Face name, after the last update.
    """

    metrics: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    ratio_penalties: list[float]
    weights: dict[str, Tensor]


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference, of the expected norm."""
    value, expected = value.double(), expected.double()
    return float((value - expected).norm() / expected.norm())


def as_vector(tensors: dict[str, Tensor]) -> Tensor:
    """All values as one vector, in the order of the names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def float64_model(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in which norms, softmax and rotary frequencies are float64 too, when run inside
    `float64_for_float32`."""
    with float64_for_float32():
        copy: torch.nn.Module = type(model)(model.config).double().eval()
        copy.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return copy


def response_logits(model: torch.nn.Module, trajectory: Trajectory, temperature: float) -> Tensor:
    """[R, V] logits that predict the response's tokens."""
    ids = torch.tensor(trajectory.prompt_token_ids + trajectory.response_token_ids)
    start = len(trajectory.prompt_token_ids)
    logits: Tensor = model(ids[None]).logits[0, start - 1 : -1] / temperature
    return logits


def response_logprobs(
    model: torch.nn.Module, trajectory: Trajectory, temperature: float
) -> tuple[Tensor, Tensor]:
    """[R] log-probs of the response's tokens and [R] entropies in nats."""
    log_softmax = response_logits(model, trajectory, temperature).log_softmax(-1)
    targets = torch.tensor(trajectory.response_token_ids)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_softmax.gather(1, targets[:, None])[:, 0], entropy


def objective_value(name: str, log_rho: Tensor, advantage: float, penalty: float) -> Tensor:
    """[R] objective of one response's tokens, whose gradient is the policy gradient."""
    rho = log_rho.exp()
    if name == "r2vpo":
        return rho * advantage - penalty * (rho - 1) ** 2
    if name == "unclipped":
        return rho * advantage
    if name == "spo":
        return rho * advantage - abs(advantage) / (2 * 0.2) * (rho - 1) ** 2
    if name in ("grpo", "grpo_clip_high"):
        highest = 1.2 if name == "grpo" else 1.28
        return torch.minimum(rho * advantage, rho.clamp(0.8, highest) * advantage)
    if name == "gppo":  # the clipped value, with rho's own slope scaled to the edge's
        held = rho.clamp(max=1.28) if advantage > 0 else rho.clamp(min=0.8)
        return (held / rho).detach() * rho * advantage
    weight = {  # TOPR
        "topr": log_rho.sum().exp(),
        "topr_geometric": log_rho.mean().exp(),
        "topr_token": rho,
    }[name].detach()
    taper = torch.ones(()) if advantage > 0 else weight.clamp(max=1.0)
    return taper * advantage * log_rho


def aggregate(aggregation: str, values: Sequence[Tensor]) -> Tensor:
    """Scalar objective of a batch from the per-token values of its responses."""
    num_tokens = sum(len(value) for value in values)
    if aggregation == "token_mean":
        return torch.cat(list(values)).sum() / num_tokens
    if aggregation == "sequence_mean":
        return torch.stack([value.mean() for value in values]).mean()
    return torch.stack([value.sum() for value in values]).mean()  # token_sum


def importance_weights(trajectory: Trajectory, cap: float) -> np.ndarray:
    """[R] truncated importance weights min(pi_learner / pi_rollout, cap); cap 0 is off."""
    gap = trajectory.behavior_logprobs.astype(np.float64) - trajectory.rollout_logprobs
    return np.minimum(np.exp(gap), cap) if cap else np.ones_like(gap)


def clipped_share(name: str, rho: np.ndarray, advantage: np.ndarray) -> float:
    """Share of tokens whose gradient the objective cuts off."""
    if name not in ("grpo", "grpo_clip_high"):
        return 0.0
    highest = 1.2 if name == "grpo" else 1.28
    above, below = (advantage > 0) & (rho > highest), (advantage < 0) & (rho < 0.8)
    return float(np.mean(above | below))


def batch_statistics(name: str, rho: np.ndarray, advantage: np.ndarray) -> dict[str, float]:
    """The reported statistics of [N] ratios, by their definitions."""
    return {
        "ratio/tokens": float(len(rho)),
        "ratio/mean": float(np.mean(rho)),
        "ratio/second_moment": float(np.mean((rho - 1) ** 2)),
        "ratio/variance": float(np.var(rho)),
        "ratio/max": float(np.max(rho)),
        "ratio/min": float(np.min(rho)),
        "ratio/effective_sample_size": float(np.sum(rho) ** 2 / np.sum(rho**2) / len(rho)),
        "ratio/clipped_fraction": clipped_share(name, rho, advantage),
        **{f"ratio/quantile_{q:02d}": float(np.percentile(rho, q)) for q in QUANTILES},
    }


def staleness_statistics(
    rho: np.ndarray, advantage: np.ndarray, versions: np.ndarray
) -> dict[str, float]:
    """The statistics of the tokens of each age, by their definitions."""
    metrics = {}
    behind = np.minimum(POLICY_VERSION - versions, 4)
    for age in np.unique(behind):
        ratios = rho[behind == age]
        values = {
            "tokens": len(ratios),
            "token_fraction": len(ratios) / len(rho),
            "mean_ratio": np.mean(ratios),
            "second_moment": np.mean((ratios - 1) ** 2),
            "effective_sample_size": np.sum(ratios) ** 2 / np.sum(ratios**2) / len(ratios),
            "mean_advantage": np.mean(advantage[behind == age]),
        }
        name = f"staleness_{STALENESS_NAMES[age]}"
        metrics |= {f"{name}/{key}": float(value) for key, value in values.items()}
    return metrics


class AdamW:
    """Decoupled weight decay (Loshchilov and Hutter 2019), spared by biases and norms."""

    def __init__(self, model: torch.nn.Module, config: RunConfig) -> None:
        self.settings = config.optimizer
        self.parameters = dict(model.named_parameters())
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.count = 0

    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """Clip by the global norm, update, and return that norm and the learning rate."""
        settings, beta1, beta2 = self.settings, self.settings.beta1, self.settings.beta2
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in self.parameters.values()))
        scale = min(1.0, settings.max_gradient_norm / (norm + 1e-6))  # torch's convention
        self.count += 1
        lr = settings.lr * min(1.0, self.count / max(settings.warmup_updates, 1))
        for name, parameter in self.parameters.items():
            gradient = parameter.grad * scale
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * gradient
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * gradient**2
            mean = self.first[name] / (1 - beta1**self.count)
            root = (self.second[name] / (1 - beta2**self.count)).sqrt()
            if not (name.endswith(".bias") or "norm" in name):
                parameter.mul_(1 - lr * settings.weight_decay)
            parameter.sub_(lr * mean / (root + settings.eps))
        return norm, lr


def next_penalty(penalty: float, second_moment: float, config: RunConfig) -> float:
    """Lambda's multiplicative step toward the target second moment."""
    algorithm = config.algorithm
    step = algorithm.dual_gain * (second_moment / algorithm.dual_target - 1)
    step = max(-LARGEST_LOG_STEP, min(LARGEST_LOG_STEP, step))
    moved = penalty * math.exp(step)
    return max(algorithm.ratio_penalty_min, min(algorithm.ratio_penalty_max, moved))


def reference_updates(
    model: torch.nn.Module, config: RunConfig, mini_batches: Sequence[Sequence[Trajectory]]
) -> Learned:
    """Train a float64 copy of `model`, one update for each mini-batch."""
    model = float64_model(model)
    optimizer = AdamW(model, config)
    penalty = config.algorithm.ratio_penalty
    learned = Learned([], [], [penalty], {})
    with float64_for_float32():
        for mini_batch in mini_batches:
            metrics = _backward(model, config, mini_batch, penalty)
            learned.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
            metrics["optimizer/gradient_norm"], metrics["optimizer/lr"] = optimizer.step()
            learned.metrics.append(metrics)
            penalty = next_penalty(penalty, metrics["ratio/second_moment"], config)
            learned.ratio_penalties.append(penalty)
    learned.weights.update({name: p.detach() for name, p in model.named_parameters()})
    return learned


def _backward(
    model: torch.nn.Module, config: RunConfig, mini_batch: Sequence[Trajectory], penalty: float
) -> dict[str, float]:
    """Gradients of minus the objective, and the statistics of the batch."""
    name, aggregation = config.algorithm.objective, config.algorithm.aggregation
    cap = config.algorithm.truncated_importance_cap
    values, ratios, entropies, advantages, clamped, weights = [], [], [], [], [], []
    for trajectory in mini_batch:
        logprobs, entropy = response_logprobs(model, trajectory, config.rollout.temperature)
        raw = logprobs - torch.from_numpy(trajectory.behavior_logprobs).double()
        # Limited in value, not in gradient.
        log_rho = raw + (raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) - raw).detach()
        advantage = float(np.float32(trajectory.advantage))
        weight = importance_weights(trajectory, cap)
        values.append(objective_value(name, log_rho, advantage, penalty) * torch.from_numpy(weight))
        weights.append(weight)
        ratios.append(log_rho.detach().exp().numpy())
        entropies.append(entropy)
        advantages.append(np.full(len(raw), advantage))
        clamped.append((raw.abs() > LOG_RATIO_LIMIT).numpy())
    objective = aggregate(aggregation, values)
    bonus = config.algorithm.entropy_coefficient * aggregate(aggregation, entropies)
    model.zero_grad()
    (-objective - bonus).backward()
    importance = {
        "importance/mean_weight": float(np.mean(np.concatenate(weights))),
        "importance/truncated_fraction": float(np.mean(np.concatenate(weights) == cap)),
    }
    return {
        **(importance if cap else {}),
        **batch_statistics(name, np.concatenate(ratios), np.concatenate(advantages)),
        **staleness_statistics(
            np.concatenate(ratios),
            np.concatenate(advantages),
            np.concatenate([trajectory.policy_versions for trajectory in mini_batch]),
        ),
        "ratio/clamped_fraction": float(np.mean(np.concatenate(clamped))),
        "policy/entropy": float(torch.cat(entropies).detach().mean()),
        "objective/mean": float(objective.detach()),
    }
