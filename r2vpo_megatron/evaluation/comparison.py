"""How much better one model is than another, paired by problem where both saw the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from r2vpo_megatron.evaluation.intervals import standard_error, student_quantile
from r2vpo_megatron.evaluation.results import BenchmarkResult


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: the estimate.
        error: its standard error; None where it is not known.
        degrees_of_freedom: of that error.
        paired: problem by problem; False where the two models saw different ones, or no two
            models are compared.
        bounds: 95% interval of a fraction, where it is known better than from the error.
    """

    value: float
    error: float | None
    degrees_of_freedom: float
    paired: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval, by Student's t where there are no bounds; None without an error."""
        if self.bounds is not None:
            return self.bounds
        if self.error is None:
            return None
        half = student_quantile(max(1, math.floor(self.degrees_of_freedom))) * self.error
        return self.value - half, self.value + half


def score_estimate(result: BenchmarkResult) -> Estimate:
    """Pass@1 of a benchmark."""
    scores = result.scores
    freedom = scores.num_problems - 1
    return Estimate(scores.pass_at_1, scores.standard_error, freedom, bounds=scores.interval)


def difference(result: BenchmarkResult, base: BenchmarkResult) -> Estimate:
    """Pass@1 minus the base's."""
    return _contrast(result, base, base_weight=1.0)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates, one a benchmark.

    Degrees of freedom by Welch and Satterthwaite, so that a benchmark of few problems which makes
    up most of the error also makes the interval wide.
    """
    value = math.fsum(estimate.value for estimate in estimates) / len(estimates)
    errors = [estimate.error for estimate in estimates if estimate.error is not None]
    paired = all(estimate.paired for estimate in estimates)
    if len(errors) < len(estimates):
        return Estimate(value, None, 0.0, paired)
    total = math.fsum(error**2 for error in errors)
    spread = math.fsum(
        error**4 / max(1.0, estimate.degrees_of_freedom)
        for error, estimate in zip(errors, estimates, strict=True)
    )
    freedom = total**2 / spread if spread > 0 else min(e.degrees_of_freedom for e in estimates)
    return Estimate(value, math.sqrt(total) / len(estimates), freedom, paired)


def relative_improvement(
    results: Sequence[BenchmarkResult], bases: Sequence[BenchmarkResult]
) -> Estimate | None:
    """Average Pass@1 over the base's, minus 1; None where the base's is 0.

    With the ratio R = a / b of the two averages, its error by the delta method is that of
    a - R b, R held fixed, over b: each problem gives m_i - R m_i(base), so what the two models
    have in common drops out.

    Args:
        results: One a benchmark.
        bases: The base's, in the same order.
    """
    base_average = average([score_estimate(base) for base in bases]).value
    if base_average == 0:
        return None
    ratio = average([score_estimate(result) for result in results]).value / base_average
    residual = average(
        [
            _contrast(result, base, base_weight=ratio)
            for result, base in zip(results, bases, strict=True)
        ]
    )
    error = None if residual.error is None else residual.error / base_average
    return Estimate(ratio - 1.0, error, residual.degrees_of_freedom, residual.paired)


def same_problems(result: BenchmarkResult, base: BenchmarkResult) -> bool:
    """Whether each problem of one is a problem of the other, by id and, where known, by content."""
    known = result.problems_sha256 and base.problems_sha256
    if known and result.problems_sha256 != base.problems_sha256:
        return False
    return result.scores.problem_means.keys() == base.scores.problem_means.keys()


def _contrast(result: BenchmarkResult, base: BenchmarkResult, base_weight: float) -> Estimate:
    """Pass@1 minus base_weight times the base's."""
    scores, base_scores = result.scores, base.scores
    value = scores.pass_at_1 - base_weight * base_scores.pass_at_1
    if same_problems(result, base):
        differences = [
            mean - base_weight * base_scores.problem_means[problem_id]
            for problem_id, mean in scores.problem_means.items()
        ]
        return Estimate(value, standard_error(differences), len(differences) - 1, paired=True)
    if scores.standard_error is None or base_scores.standard_error is None:
        return Estimate(value, None, 0.0)
    error = math.hypot(scores.standard_error, base_weight * base_scores.standard_error)
    return Estimate(value, error, min(scores.num_problems, base_scores.num_problems) - 1)
