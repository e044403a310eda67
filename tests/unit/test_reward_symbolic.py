"""Symbolic verdicts: what is read as an answer, what counts as the same, and what does not."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

from r2vpo_megatron.rewards.equivalence import EquivalenceJudge, are_equivalent, shared_judge
from r2vpo_megatron.rewards.extraction import canonical_answer, final_answer
from r2vpo_megatron.rewards.math_dapo import MathDapoReward, compute_score
from r2vpo_megatron.rewards.spelling import plain_value
from r2vpo_megatron.rewards.verdict_cache import VerdictCache
from r2vpo_megatron.rewards.worker_pool import WorkerPool

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="module")
def judge() -> Iterator[EquivalenceJudge]:
    yield EquivalenceJudge(shared_judge().pool)


@pytest.mark.parametrize(
    "response",
    [
        "Answer: 34",
        "**Answer:** 34",
        "**Answer**: 34",
        "Answer: **34**",
        "**Answer: 34**",
        "Answer: \\(34\\)",
        "Answer: \\[34\\]",
        "Answer: $$34$$",
        "Answer:\n$$\n34\n$$",
        "Answer:\n\\[\n34\n\\]\nDone.",
        "Answer: $34$.",
        "Answer: 34.",
        "Answer: 34.0",
        "Answer: 034",
        "Answer: +34",
        "Answer: ３４",
        "answer：34",
        "答案：34。",
        "Final Answer: 34",
        "The final answer is $34$.",
        "Answer: \\boxed{34}",
        "Answer: 34 <|im_end|>",
        "Answer: 34\n\\boxed{34}",
        "So it is $\\boxed{34}$.",
        "\\boxed 34",
        "\\boxed{\\text{34}}",
        "Answer: x = 34",
        "Answer: 30+4 = 34",
        "Answer: 34 students",
        "Answer: 34^\\circ",
        "Answer: 34^{\\circ}",
        "Answer: 34°",
        "Answer: 34\\text{ cm}^2",
        "Answer: \\$34",
        "Answer: \\dfrac{68}{2}",
        "Answer: 3.4e1",
        "<think>Answer: 5</think>Answer: 34",
        "[unused16]\\boxed{5}[unused17]\\boxed{34}",
        "Answer: 34</think>",
        "Answer: $m+n = 34$",
        "Answer: $a+b+c = 10+20+4 = 34$",
        "Answer: $AB^2 = 34$.",
        "The answer is: $34$",
        "\\textbf{Answer:} 34",
        "\\text{Answer: 34}",
        "Answer: __34__",
        "\\boxed{34}\n\nAnswer:",
        "Final Answer: The final answer is $34$. I hope it is correct.",
    ],
)
def test_forms_of_34_that_are_right(response: str) -> None:
    assert compute_score(response, "34")["acc"], final_answer(response)


@pytest.mark.parametrize(
    ("response", "prediction"),
    [
        ("34", None),
        ("The answer is 34", None),
        ("Answer: 34" + "\n" + "x" * 1000, None),  # outside the window
        ("\\boxed{34", None),
        ("\\boxed{34} and \\boxed{35", None),
        ("\\fbox{34}", None),
        ("\\boxed{}", None),
        ("Answer: 5 = 34", "5=34"),
        ("Answer: 33 = 34 = 35", "33=34=35"),
        ("Answer: 34 or 35", "34 or 35"),
        ("Answer: 35, 34", "35,34"),
        ("\\boxed{33} or \\boxed{34}", "33,34"),
        ("Answer: 34 \\boxed{35}", "35"),
        ("Answer: 34\nAnswer: 35", "35"),
        ("\\boxed{34}\nAnswer: 35", "35"),
        ("Answer: 34\nNo: \\boxed{35}", "35"),
        ("Answer: 34</think>Answer: 35", "35"),
        ("Answer: 34</think>I am not sure.", None),
        ("Answer: about 34", "about 34"),
        ("Answer: 34 or more", "34 or more"),
        ("Answer: 3 4", "3 4"),
        ("Answer: 34_9", "34_9"),
        ("Answer: 34.01", "34.01"),
        ("Answer: -34", "-34"),
        ("Answer: 34!", "34!"),
        ("Answer: 34t", "34t"),
        ("Answer: 34 k", "34k"),
        ("Answer: m+n = 33 = 34", "m+n=33=34"),
        ("Answer: 34\\text{ 35}", "34 35"),
        ("Answer: 34\\text{, maybe 35}", "34,maybe 35"),
        ("Answer: 34. I hope it is correct. Or 35.", "34I hope it is correct.Or 35"),
    ],
)
def test_forms_that_are_not_right_for_34(response: str, prediction: str | None) -> None:
    assert compute_score(response, "34") == {"score": -1.0, "acc": False, "pred": prediction}


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("1,234", "1234"),
        ("1{,}234", "1234"),
        ("1\\,234", "1234"),
        ("10,\\! 080", "10080"),
        ("$\\$1,234.50$", "1234.5"),
        ("(12,102)", "(12,102)"),  # a point
        ("100, 200", "100, 200"),
        ("3, 5, 7", "3,5,7"),
        (".5", "0.5"),
        ("-0.50", "-0.5"),
        ("100", "100"),
        ("0", "0"),
        ("000", "0"),
        ("−3", "-3"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac 59", "\\frac{5}{9}"),
        ("\\frac9{19}", "\\frac{9}{19}"),
        ("\\dfrac{270}7\\text{ degrees}", "\\frac{270}{7}"),
        ("11\\sqrt2", "11\\sqrt{2}"),
        ("sqrt(2)/2", "\\sqrt{2}/2"),
        ("2^2023", "2^{2023}"),
        ("x^{2}", "x^2"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("\\cot x", "\\cot x"),
        ("2 \\pi", "2\\pi"),
        ("2π", "2\\pi"),
        ("864 \\mbox{ inches}^2", "864"),
        ("5 km/h", "5"),
        ("2 x", "2x"),
        ("\\text{(C)}", "C"),
        ("\\text{Evelyn}", "Evelyn"),
        ("y = 2x + 3", "2x+3"),
        ("f(x)=x^2", "x^2"),
        ("x \\in [-2,7]", "[-2,7]"),
        ("x=1, y=2", "x=1,y=2"),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
        ("", ""),
        ("{" * 600, "{" * 600),  # too long to be touched
    ],
)
def test_canonical_spelling(written: str, canonical: str) -> None:
    assert canonical_answer(written) == canonical
    assert canonical_answer(canonical) == canonical


def test_plain_values_are_exact() -> None:
    assert plain_value("-0.125") == (Fraction(-1, 8), False)
    assert plain_value("1\\frac{4}{5}") == (Fraction(9, 5), False)
    assert plain_value("137 1/2") == (Fraction(275, 2), False)
    assert plain_value("-\\frac{6}{4}") == plain_value("\\frac{-3}{2}") == (Fraction(-3, 2), False)
    assert plain_value("6.72e-5") == (Fraction(672, 10**7), False)
    assert plain_value("50%") == (Fraction(50), True)
    for text in ("1/0", "\\pi", "1e999", "9" * 61, "1+1", "2^2", ""):
        assert plain_value(text) is None


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "\\frac12"),
        ("50\\%", "0.5"),
        ("50\\%", "50"),
        ("\\frac{\\sqrt{3}}{2}", "\\sqrt{\\frac34}"),
        ("-2,1", "1,-2"),
        ("1-\\sqrt{19}, 1+\\sqrt{19}", "1 \\pm \\sqrt{19}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("y-2x=3", "y = 2x + 3"),
        ("2x+3", "y=2x+3"),
        ("x=2+3=5", "5"),
        ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty, 2) \\cup (3, +\\infty)"),
        (
            "\\begin{bmatrix}1/5\\\\-3.6\\end{bmatrix}",
            "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}",
        ),
        ("(1-i)(2+3i)", "5+i"),
        ("3.605551", "\\sqrt{13}"),  # six decimals
        ("2^{10}", "1024"),
        ("an ellipse", "\\text{ellipse}"),
        ("c", "\\text{(C)}"),
        ("4210", "4210_{5}"),
        ("5!", "120"),
        ("99! \\cdot 100", "100!"),
        ("x=3 or x=-3", "3,-3"),
        ("x=3\\text{ and }x=-3", "\\pm 3"),
        ("ln 2", "\\ln 2"),
        ("arctan(2)", "\\arctan 2"),
        ("10⁻³", "0.001"),
        ("x⁴+⅓", "x^4+\\frac13"),
        ("\\varnothing", "\\emptyset"),
        ("2 k", "2k"),
    ],
)
def test_equivalent(judge: EquivalenceJudge, prediction: str, gold: str) -> None:
    assert judge.judge([(prediction, gold)])[0].equal


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("3.61", "\\sqrt{13}"),
        ("0.333333", "\\frac13"),  # exact where both are plain numbers
        ("2^{2020}+1", "2^{2020}"),
        ("\\frac{1}{2^{101}}", "\\frac{1}{2^{100}}"),  # an absolute tolerance takes both for 0
        ("0.0", "\\frac{\\sqrt2}{10^{9}}"),
        ("-2,1", "(-2,1)"),
        ("[-2,1]", "(-2,1)"),
        ("1,-2", "(-2,1)"),
        ("1+\\sqrt{19}", "1 \\pm \\sqrt{19}"),
        ("seat", "\\text{east}"),  # equal as products of letters
        ("6+5i", "6-5i"),
        ("5 million", "5"),
        ("5 \\text{ or more}", "5"),
        ("40_9", "40"),
        ("40_9", "40_8"),
        ("y=2x-3", "y=2x+3"),
        ("", "5"),
        ("5", ""),
        ("\\pi", "3.14"),
        ("5", "5!"),
        ("2", "2k"),
        ("2t", "2"),
        ("2m", "2"),
        ("25", "x^2+y^2=25"),
        ("z=x+y", "x"),
        ("\\{1,2,\\ldots,10\\}", "\\{1,2,10\\}"),
    ],
)
def test_not_equivalent(judge: EquivalenceJudge, prediction: str, gold: str) -> None:
    verdict = judge.judge([(prediction, gold)])[0]
    assert not verdict.equal and verdict.failure == ""


def test_batches_keep_their_order_and_ask_each_question_once() -> None:
    judge = EquivalenceJudge(shared_judge().pool)
    before = judge.pool.counts["verdicts"]
    assert judge.judge([]) == []
    pairs = [("2\\pi", "\\pi+\\pi"), ("7", "7"), ("3\\pi", "\\pi+\\pi")] * 5
    assert [verdict.equal for verdict in judge.judge(pairs)] == [True, True, False] * 5
    assert judge.pool.counts["verdicts"] == before + 2
    judge.judge(pairs)
    assert judge.pool.counts["verdicts"] == before + 2  # from the cache


def test_plain_answers_start_no_process() -> None:
    with WorkerPool(1) as pool:
        reward = MathDapoReward("symbolic", EquivalenceJudge(pool))
        responses = ["Answer: 034", "Answer: 1/2", "Answer: 35", "no answer"]
        results = reward.judge_texts(responses, ["34", "0.5", "34", "34"])
        assert [result.score for result in results] == [1.0, 1.0, -1.0, -1.0]
        assert [result.parsed for result in results] == [True, True, True, False]
        assert pool.process_ids() == []


def test_cache_is_bounded_in_entries_and_bytes() -> None:
    right = are_equivalent("1", "1")
    cache = VerdictCache(max_entries=2)
    for name in ("a", "b"):
        cache.put((name, "x"), right)
    cache.get(("a", "x"))
    cache.put(("c", "x"), right)
    assert cache.get(("b", "x")) is None and cache.get(("a", "x")) is right
    small = VerdictCache(max_bytes=10_000)
    for index in range(100):
        small.put((f"{index:0100d}", "x"), right)
    assert small.num_bytes <= 10_000 and len(small) == 10_000 // (400 + 4 * 101)


def _load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "grading_benchmark", REPOSITORY / "benchmarks" / "grading.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _check_shares(judge: EquivalenceJudge, every: int, per_gold: int) -> None:
    """At least 99% of spellings right and 99.5% of other problems' answers wrong."""
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA}")
    grading = _load_benchmark()
    reward = MathDapoReward("symbolic", judge)
    own: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for name in grading.DATA_SETS:
        golds = grading.load_golds(DATA, name)[::every]
        for spelling in grading.SPELLINGS:
            own += grading.spelled_pairs(golds, spelling)
        for other, gold in grading.draw_other_golds(golds, per_gold, seed=7):
            others.append((f"Answer: {other}", gold))
    right = grading.accepted(reward, own)
    wrong = grading.accepted(reward, others)
    assert len(own) > 1000 and len(others) > 500
    rejected = [pair for pair, verdict in zip(own, right, strict=True) if not verdict]
    accepted = [pair for pair, verdict in zip(others, wrong, strict=True) if verdict]
    assert len(rejected) <= 0.01 * len(own), rejected
    assert len(accepted) <= 0.005 * len(others), accepted


def test_gold_answers_in_ten_spellings_and_against_others(judge: EquivalenceJudge) -> None:
    _check_shares(judge, every=4, per_gold=4)


@pytest.mark.slow
def test_all_gold_answers_in_ten_spellings_and_against_many_others(
    judge: EquivalenceJudge,
) -> None:
    _check_shares(judge, every=1, per_gold=40)
