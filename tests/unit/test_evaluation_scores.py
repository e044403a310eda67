"""Scores of an evaluation: by hand, by brute force over subsets, and by simulation."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.evaluation.intervals import (
    confidence_interval,
    standard_error,
    student_quantile,
)
from r2vpo_megatron.evaluation.majority import majority_scores
from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.evaluation.scores import k_values, pass_at_k, summarize

RIGHT = "right"


def _record(problem_id: str, index: int, pred: str | None, **changes: object) -> ResponseRecord:
    fields: dict[str, object] = {
        "problem_id": problem_id,
        "sample_index": index,
        "seed": index,
        "num_tokens": 10,
        "finish_reason": "stop",
        "acc": pred == RIGHT,
        "pred": pred,
        "parsed": pred is not None,
        "failure": "",
        "text": "",
    }
    return ResponseRecord(**(fields | changes))  # type: ignore[arg-type]


def _records(answers: Sequence[Sequence[str | None]]) -> list[ResponseRecord]:
    return [
        _record(f"p{number}", index, pred)
        for number, row in enumerate(answers)
        for index, pred in enumerate(row)
    ]


def _vote(preds: Sequence[str | None]) -> float:
    """Score of one vote, as its definition has it."""
    votes = Counter(pred for pred in preds if pred is not None)
    if not votes:
        return 0.0
    top = max(votes.values())
    winners = [pred for pred, count in votes.items() if count == top]
    return (RIGHT in winners) / len(winners)


# Two problems of four samples: 3 of 4 right, 1 of 4 right.
TWO = [[RIGHT, RIGHT, "5", RIGHT], ["7", RIGHT, "7", None]]


def test_two_problems_by_hand() -> None:
    scores = summarize(_records(TWO), 4)
    assert scores.problem_means == {"p0": 0.75, "p1": 0.25}
    assert scores.pass_at_1 == 0.5
    # deviations +-1/4: sqrt((1/16 + 1/16) / (2 * 1)) = 1/4
    assert scores.standard_error == pytest.approx(0.25, abs=1e-12)
    # Wilson's of 0.25 / (1/4)^2 = 4 trials with t = 12.706: 1/2 -+ t / 2 / sqrt(4 + t^2)
    assert scores.interval == pytest.approx((0.00609, 0.99391), abs=1e-5)
    # k = 2: 1 - C(1,2)/C(4,2) = 1 and 1 - C(3,2)/C(4,2) = 1/2
    assert scores.pass_at_k == {1: 0.5, 2: 0.75, 4: 1.0}
    # k = 4: three votes to one; 7 beats right by two to one.
    # k = 2: RR 3 of 6 pairs count 1, R5 3 of 6 count 1/2: 3/4. R7 (2 pairs) 1/2, R- (1) 1: 2/6.
    assert scores.majority_at_k == pytest.approx({1: 0.5, 2: (3 / 4 + 1 / 3) / 2, 4: 0.5})
    assert (scores.num_problems, scores.num_samples) == (2, 4)
    assert scores.unparsed_fraction == 1 / 8
    assert scores.grader_failures == {}


def test_lengths_truncation_and_failures() -> None:
    records = [
        _record("p0", index, "5", num_tokens=tokens, finish_reason=reason, failure=failure)
        for index, (tokens, reason, failure) in enumerate(
            [
                (1, "stop", ""),
                (2, "stop", "timeout"),
                (3, "stop", "crash"),
                (10, "length", "timeout"),
            ]
        )
    ]
    scores = summarize(records, 4)
    tokens = scores.response_tokens
    assert (tokens.mean, tokens.median, tokens.max) == (4.0, 2.5, 10)
    assert tokens.p95 == pytest.approx(3 + 0.85 * 7)  # between the third and the last
    assert scores.num_response_tokens == 16
    assert scores.truncated_fraction == 0.25
    assert scores.grader_failures == {"crash": 1, "timeout": 2}


def test_one_problem_has_no_error() -> None:
    scores = summarize(_records([[RIGHT, "5"]]), 2)
    assert (scores.pass_at_1, scores.standard_error, scores.interval) == (0.5, None, None)


def test_equal_spellings_are_one_vote() -> None:
    records = _records([[RIGHT, RIGHT, "0.5", r"\frac{1}{2}", ".50"]])
    assert summarize(records, 5, canonical=lambda text: text).majority_at_k[5] == 1.0
    halves = {"0.5": "1/2", r"\frac{1}{2}": "1/2", ".50": "1/2"}
    assert summarize(records, 5, canonical=halves.__getitem__).majority_at_k[5] == 0.0


def test_right_answers_are_one_vote_however_they_are_spelled() -> None:
    records = [
        _record("p0", 0, "0.5", acc=True),
        _record("p0", 1, r"\frac{1}{2}", acc=True),
        _record("p0", 2, "7"),
    ]
    assert summarize(records, 3).majority_at_k[3] == 1.0


def test_the_papers_k_values() -> None:
    assert k_values(32) == [1, 2, 4, 8, 16, 32]
    assert k_values(6) == [1, 2, 4, 6]
    assert k_values(1) == [1]


@pytest.mark.parametrize("num_samples", [0, -1])
def test_no_samples_is_refused(num_samples: int) -> None:
    with pytest.raises(ValueError, match=r"num_samples \(k\) = -?\d; valid: at least 1"):
        summarize(_records(TWO), num_samples)


def test_no_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="no responses"):
        summarize([], 4)


def test_missing_doubled_and_surplus_samples_are_named() -> None:
    records = _records(TWO)
    with pytest.raises(ValueError, match=r"missing: \('p1', 2\); valid"):
        summarize(records[:6] + records[7:], 4)
    with pytest.raises(ValueError, match=r"there twice: \('p0', 1\);"):
        summarize([*records, records[1]], 4)
    with pytest.raises(ValueError, match=r"outside the samples: \('p0', 3\), \('p1', 3\);"):
        summarize(records, 3)
    with pytest.raises(ValueError, match=r"missing: .*\('p0', 8\) and 7 more"):
        summarize(records, 10)


@pytest.mark.parametrize(("k", "right"), [(0, 1), (5, 1), (2, 5), (2, -1)])
def test_pass_at_k_refuses_what_cannot_be(k: int, right: int) -> None:
    with pytest.raises(ValueError, match="valid"):
        pass_at_k(4, right, k)


def test_pass_at_k_of_many_samples_stays_exact() -> None:
    # C(2000,1000)/C(2048,1000): floats would overflow on the way.
    expected = 1.0
    for index in range(48):
        expected *= (1048 - index) / (2048 - index)
    assert pass_at_k(2048, 48, 1000) == pytest.approx(1 - expected, rel=1e-12)


ANSWERS = st.lists(
    st.lists(st.sampled_from([RIGHT, "5", "7", "8", None]), min_size=6, max_size=6),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(ANSWERS)
def test_both_scores_are_means_over_all_subsets(answers: list[list[str | None]]) -> None:
    scores = summarize(_records(answers), 6)
    for k in (1, 2, 4, 6):
        subsets = [list(itertools.combinations(row, k)) for row in answers]
        passed = [np.mean([RIGHT in subset for subset in sets]) for sets in subsets]
        voted = [np.mean([_vote(subset) for subset in sets]) for sets in subsets]
        assert scores.pass_at_k[k] == pytest.approx(np.mean(passed))
        assert scores.majority_at_k[k] == pytest.approx(np.mean(voted))


@settings(max_examples=60, deadline=None)
@given(ANSWERS, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_more_samples_pass_more(
    answers: list[list[str | None]], random_order: random.Random
) -> None:
    records = _records(answers)
    scores = summarize(records, 6)
    shuffled = records.copy()
    random_order.shuffle(shuffled)
    again = summarize(shuffled, 6)
    assert again.problem_means == scores.problem_means
    assert again.majority_at_k == pytest.approx(scores.majority_at_k)
    assert again.pass_at_k == pytest.approx(scores.pass_at_k)
    values = list(scores.pass_at_k.values())
    assert values == sorted(values)
    assert values[0] == pytest.approx(scores.pass_at_1)
    assert values[-1] == pytest.approx(np.mean([RIGHT in row for row in answers]))
    assert scores.majority_at_k[1] == pytest.approx(scores.pass_at_1)


def test_vote_of_part_of_32_samples_agrees_with_drawing_it() -> None:
    preds = [RIGHT] * 9 + ["a"] * 8 + ["b"] * 5 + ["c"] * 3 + ["d", "e", "f"] + [None] * 4
    exact = majority_scores(9, [8, 5, 3, 1, 1, 1], 4, [8, 16])
    generator = random.Random(0)
    for k, expected in zip([8, 16], exact, strict=True):
        drawn = [_vote(generator.sample(preds, k)) for _ in range(4000)]
        error = np.std(drawn) / math.sqrt(len(drawn))
        assert abs(np.mean(drawn) - expected) < 4 * error


def test_error_of_correlated_samples_is_not_the_naive_one() -> None:
    # Each problem is always right or always wrong: 32 samples tell no more than one.
    num_problems, num_samples = 20, 32
    answers = [[RIGHT if number < 8 else "5"] * num_samples for number in range(num_problems)]
    scores = summarize(_records(answers), num_samples)
    naive = math.sqrt(0.4 * 0.6 / (num_problems * num_samples))
    clustered = math.sqrt(0.4 * 0.6 / (num_problems - 1))
    assert scores.standard_error == pytest.approx(clustered)
    assert scores.standard_error == pytest.approx(
        naive * math.sqrt(num_samples * num_problems / (num_problems - 1))
    )


def test_error_is_the_spread_of_repeated_evaluations() -> None:
    # Problems of difficulty uniform in 0..1, four samples each: the standard deviation of Pass@1
    # over new problems and samples is what the standard error estimates.
    generator = np.random.default_rng(0)
    num_problems, num_samples, num_repeats = 30, 4, 3000
    difficulty = generator.uniform(size=(num_repeats, num_problems))
    means = generator.binomial(num_samples, difficulty) / num_samples
    spread = means.mean(axis=1).std(ddof=1)
    # variance of a mean: Var(p) + E[p (1 - p)] / k = 1/12 + 1/24
    assert spread == pytest.approx(math.sqrt((1 / 12 + 1 / 24) / num_problems), rel=0.05)
    estimated = [standard_error(list(row)) for row in means]
    assert np.mean(estimated) == pytest.approx(spread, rel=0.05)
    covered = [low <= 0.5 <= high for low, high in map(confidence_interval, means.tolist())]
    assert 0.93 < np.mean(covered) < 0.97


def test_student_quantiles_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 29: 2.0452}
    for freedom, quantile in table.items():
        assert student_quantile(freedom) == pytest.approx(quantile, rel=2e-3)
    assert student_quantile(10**6) == pytest.approx(1.95997, abs=1e-4)
    with pytest.raises(ValueError, match="valid: at least 1"):
        student_quantile(0)


def test_an_interval_near_nothing_covers() -> None:
    """Few problems have any right response: m -+ t SE covers 88 times in 100."""
    generator = np.random.default_rng(5)
    rates = generator.beta(0.1, 2.0, size=(3000, 30))
    means = generator.binomial(4, rates) / 4
    intervals = list(map(confidence_interval, means.tolist()))
    covered = [low <= 0.1 / 2.1 <= high for low, high in intervals]
    assert 0.93 < np.mean(covered) < 0.985
    # One problem of four at 1/2: m = 1/8 = SE, 7 trials, t = 3.182: r = t^2 / 7 = 1.446;
    # (1/8 + 0.723 -+ sqrt(1.446 * (7/64 + 0.3615))) / 2.446
    assert confidence_interval([0.5, 0, 0, 0]) == pytest.approx((0.0095, 0.6841), abs=1e-3)
    assert confidence_interval([0.25] * 3) == (0.25, 0.25)


def test_votes_fewer_than_the_right_responses() -> None:
    # 2 of 3 right, 1 wrong, one is drawn
    assert majority_scores(2, [1], 0, [1]) == pytest.approx([2 / 3])


def test_none_right_still_has_an_interval() -> None:
    # Wilson: z^2 / (n + z^2) with z^2 = 3.8415
    assert confidence_interval([0.0] * 200) == pytest.approx((0.0, 3.8415 / 203.8415), rel=1e-4)
    assert confidence_interval([1.0] * 30) == pytest.approx((1 - 3.8415 / 33.8415, 1.0), rel=1e-4)
    assert standard_error([0.0] * 200) == 0.0
    assert standard_error([0.3]) is None
    assert confidence_interval([0.3]) is None
