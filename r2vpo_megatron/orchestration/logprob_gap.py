"""How far the engines' log-probs are from the learner's, of the same tokens and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from r2vpo_megatron.orchestration.iteration_metrics import Metrics
from r2vpo_megatron.records import FloatArray, Trajectory

NUM_WORST = 5


@dataclass(frozen=True)
class SequenceGap:
    """Differences over one sequence, in nats.

    Attributes:
        name: sample or prompt id; of several engines that score it, with the engine's number.
        num_tokens: compared.
        mean, max: of the absolute difference.
    """

    name: str
    num_tokens: int
    mean: float
    max: float

    @classmethod
    def between(cls, name: str, one: FloatArray, other: FloatArray) -> SequenceGap:
        """Compare two arrays [N] of log-probs, N at least 1."""
        differences = np.abs(one.astype(np.float64) - other)
        return cls(name, len(differences), float(differences.mean()), float(differences.max()))


@dataclass(frozen=True)
class LogprobGap:
    """Differences over several sequences; of none it says nothing."""

    sequences: tuple[SequenceGap, ...] = ()

    @property
    def mean(self) -> float:
        """Mean absolute difference over all tokens; 0 where there are none."""
        total = sum(gap.mean * gap.num_tokens for gap in self.sequences)
        return total / max(sum(gap.num_tokens for gap in self.sequences), 1)

    def worst(self) -> list[SequenceGap]:
        """The sequences with the largest single difference, the worst first."""
        # Not a number is worse than any.
        return sorted(self.sequences, key=lambda gap: (not np.isnan(gap.max), -gap.max, gap.name))[
            :NUM_WORST
        ]

    def summary(self) -> str:
        """The worst sequences in a line, as `logprob_gap/worst` of a run's metrics."""
        return ", ".join(f"{gap.name}: {gap.max:.2e}" for gap in self.worst())

    def metrics(self) -> Metrics:
        """`logprob_gap/mean` and `logprob_gap/max`; none where nothing was compared."""
        if not self.sequences:
            return {}
        return {"logprob_gap/mean": self.mean, "logprob_gap/max": self.worst()[0].max}

    def table(self) -> str:
        """The worst sequences, one to a line."""
        rows = self.worst()
        width = max((len(gap.name) for gap in rows), default=0)
        return "\n".join(
            f"  {gap.name:{width}}  {gap.num_tokens:6} tokens  mean {gap.mean:9.2e}  "
            f"max {gap.max:9.2e}"
            for gap in rows
        )


def gap_of_samples(
    trajectories: Iterable[Trajectory], logprobs: Mapping[str, FloatArray], version: int
) -> LogprobGap:
    """Compare what engines reported when they sampled with what the learner computes now.

    Args:
        trajectories: with the engines' log-probs.
        logprobs: sample id -> [R] the learner's, of its weights of `version`.
        version: tokens that other weights sampled are left out.
    """
    gaps = []
    for sample in trajectories:
        same = sample.policy_versions == version
        if same.any():
            reported, computed = sample.rollout_logprobs[same], logprobs[sample.sample_id][same]
            gaps.append(SequenceGap.between(sample.sample_id, reported, computed))
    return LogprobGap(tuple(gaps))


def gap_of_scores(
    trajectories: Sequence[Trajectory],
    logprobs: Mapping[str, FloatArray],
    scores: Sequence[Sequence[FloatArray]],
) -> LogprobGap:
    """Compare what engines and learner compute for given responses, both now.

    Args:
        trajectories: N of them; what sampled them does not matter.
        logprobs: sample id -> [R] the learner's.
        scores: [engine][N] arrays [P + R - 1] of prompt and response, but for the first token.
    """
    gaps = []
    for engine, of_engine in enumerate(scores):
        for sample, values in zip(trajectories, of_engine, strict=True):
            of_response = values[len(sample.prompt_token_ids) - 1 :]
            name = f"{sample.sample_id} (engine {engine})"
            gaps.append(SequenceGap.between(name, of_response, logprobs[sample.sample_id]))
    return LogprobGap(tuple(gaps))
