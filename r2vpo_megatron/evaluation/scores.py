"""From judged responses to Pass@1 with its error, pass@k, maj@k, lengths and what went wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from r2vpo_megatron.evaluation.intervals import confidence_interval, standard_error
from r2vpo_megatron.evaluation.majority import majority_scores
from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.rewards.extraction import canonical_answer


@dataclass(frozen=True)
class TokenCounts:
    """Lengths of the responses, in tokens, the stop token included."""

    mean: float
    median: float
    p95: float
    max: int


@dataclass(frozen=True)
class BenchmarkScores:
    """What a benchmark's responses amount to. Fractions lie in 0..1.

    Attributes:
        num_problems: problems of the benchmark.
        num_samples: responses to each of them.
        pass_at_1: fraction of right responses: the mean over problems of each problem's mean.
        standard_error: of `pass_at_1`, clustered by problem; None with a single problem.
        interval: 95% interval of `pass_at_1`; None with a single problem.
        pass_at_k: k -> expected fraction of problems with a right one among k responses.
        majority_at_k: k -> expected fraction of problems that a vote of k responses gets right.
        response_tokens: lengths of the responses.
        truncated_fraction: responses cut off at the length limit.
        unparsed_fraction: responses without an answer.
        grader_failures: why the grader gave up -> number of responses.
        num_response_tokens: of all responses together.
        problem_means: problem id -> fraction of its responses that are right; what paired
            comparisons need.
    """

    num_problems: int
    num_samples: int
    pass_at_1: float
    standard_error: float | None
    interval: tuple[float, float] | None
    pass_at_k: dict[int, float]
    majority_at_k: dict[int, float]
    response_tokens: TokenCounts
    truncated_fraction: float
    unparsed_fraction: float
    grader_failures: dict[str, int]
    num_response_tokens: int
    problem_means: dict[str, float]


def summarize(
    records: Sequence[ResponseRecord],
    num_samples: int,
    *,
    canonical: Callable[[str], str] = canonical_answer,
) -> BenchmarkScores:
    r"""Score the responses to a benchmark.

    With m_i the fraction of right responses to problem i of n, Pass@1 is their mean m, and its
    standard error sqrt(sum_i (m_i - m)^2 / (n (n - 1))): the problems are what was drawn, and the
    responses to one problem are not independent draws. The 95% interval is that of
    `intervals.confidence_interval`.

    Args:
        records: In any order.
        num_samples: Responses to each problem.
        canonical: One spelling for equal answers; wrong answers of one spelling are one vote.

    Raises:
        ValueError: num_samples is below 1; no records; a response is missing, there twice or
            over. Names the problems and samples.
    """
    by_problem = _group(records, num_samples)
    counts = [sum(record.acc for record in group) for group in by_problem.values()]
    means = {
        problem_id: count / num_samples
        for problem_id, count in zip(by_problem, counts, strict=True)
    }
    lengths = np.array([record.num_tokens for record in records])
    values = list(means.values())
    ks = k_values(num_samples)
    failures = Counter(record.failure for record in records if record.failure)
    return BenchmarkScores(
        num_problems=len(by_problem),
        num_samples=num_samples,
        pass_at_1=math.fsum(values) / len(values),
        standard_error=standard_error(values),
        interval=confidence_interval(values),
        pass_at_k={
            k: math.fsum(pass_at_k(num_samples, count, k) for count in counts) / len(counts)
            for k in ks
        },
        majority_at_k=_mean_majority(by_problem, ks, canonical),
        response_tokens=TokenCounts(
            mean=float(lengths.mean()),
            median=float(np.median(lengths)),
            p95=float(np.percentile(lengths, 95)),
            max=int(lengths.max()),
        ),
        truncated_fraction=_fraction(record.finish_reason == "length" for record in records),
        unparsed_fraction=_fraction(not record.parsed for record in records),
        grader_failures=dict(sorted(failures.items())),
        num_response_tokens=int(lengths.sum()),
        problem_means=means,
    )


def k_values(num_samples: int) -> list[int]:
    """1, 2, 4, ... up to num_samples, and num_samples itself."""
    powers = [1 << exponent for exponent in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that k of a problem's responses, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k), the unbiased estimate from n responses of which c are right.

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}; valid: 1 to the number of samples, {num_samples}")
    if not 0 <= num_right <= num_samples:
        raise ValueError(f"{num_right} right of {num_samples} samples; valid: 0 to {num_samples}")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def _group(
    records: Sequence[ResponseRecord], num_samples: int
) -> Mapping[str, list[ResponseRecord]]:
    if num_samples < 1:
        raise ValueError(f"num_samples (k) = {num_samples}; valid: at least 1")
    if not records:
        raise ValueError("no responses to score; valid: at least one problem's")
    by_problem: dict[str, dict[int, ResponseRecord]] = {}
    doubled: list[str] = []
    outside: list[str] = []
    for record in records:
        pair = f"({record.problem_id!r}, {record.sample_index})"
        samples = by_problem.setdefault(record.problem_id, {})
        if record.sample_index in samples:
            doubled.append(pair)
        elif not 0 <= record.sample_index < num_samples:
            outside.append(pair)
        samples[record.sample_index] = record
    missing = [
        f"({problem_id!r}, {index})"
        for problem_id, samples in by_problem.items()
        for index in range(num_samples)
        if index not in samples
    ]
    faults = {"there twice": doubled, "outside the samples": outside, "missing": missing}
    found = [f"{name}: {_shorten(pairs)}" for name, pairs in faults.items() if pairs]
    if found:
        raise ValueError(
            f"(problem, sample) pairs {'; '.join(found)}; valid: each problem with samples 0 to "
            f"{num_samples - 1}, once each"
        )
    return {
        problem_id: [samples[index] for index in range(num_samples)]
        for problem_id, samples in by_problem.items()
    }


def _shorten(pairs: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(pairs) - shown} more" if len(pairs) > shown else ""
    return ", ".join(pairs[:shown]) + more


def _mean_majority(
    by_problem: Mapping[str, list[ResponseRecord]],
    ks: Sequence[int],
    canonical: Callable[[str], str],
) -> dict[int, float]:
    totals = dict.fromkeys(ks, 0.0)
    for group in by_problem.values():
        wrong = Counter(
            canonical(record.pred)
            for record in group
            if not record.acc and record.parsed and record.pred is not None
        )
        num_right = sum(record.acc for record in group)
        num_silent = len(group) - num_right - wrong.total()
        scores = majority_scores(num_right, list(wrong.values()), num_silent, ks)
        for k, score in zip(ks, scores, strict=True):
            totals[k] += score
    return {k: total / len(by_problem) for k, total in totals.items()}


def _fraction(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
