"""When two problems are one: keys, golds, languages, overlap."""

from __future__ import annotations

import pytest

from r2vpo_megatron.data.gold_answers import canonical_gold, gsm8k_gold
from r2vpo_megatron.data.language import detect_language
from r2vpo_megatron.data.overlap import find_overlap
from r2vpo_megatron.data.problem_keys import ascii_key, layout_key, letters_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Find $x$.", "Find x"),
        ("so $a = b$, and", "so \\(a=b\\) and"),
        ("\\dfrac{1}{2}", "$\\frac12$"),
        ("\\left( x \\right)", "(x)"),
        ("the sum \\[a+b.\\]", "the sum\n$$a+b$$"),
        ("a “word” here", 'a "word" here'),
        ("求 $n$ 的值。", "求n的值."),
        ("求ｎ＋１", "求n+1"),
        ("x² and 10₂", "$x^2$ and $10_{2}$"),
        ("is it so?.. yes", "is it so? yes"),
    ],
)
def test_layout_is_not_part_of_a_problem(one: str, other: str) -> None:
    assert layout_key(one) == layout_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("$x+1$", "$x-1$"),
        ("1.5", "15"),
        ("5!", "5"),
        ("f'(x)", "f(x)"),
        ("(1,2)", "(12)"),
        ("\\frac{1}{23}", "\\frac{12}{3}"),
        ("2(x+1)", "2x+1"),
        ("[0,1)", "(0,1]"),
        ("x^{2}", "x_{2}"),
        ("x^{2+y}", "x^2+y"),
        ("A", "a"),
        ("a < b", "a > b"),
        ("2:1", "21"),
        ("1 2", "12"),
        ("find 10²", "find 102"),
        ("101₂", "1012"),
        ("x²", "x₂"),
        ("chance .5 of", "chance 5 of"),
    ],
)
def test_what_changes_a_problem_is_kept(one: str, other: str) -> None:
    assert layout_key(one) != layout_key(other)


def test_the_coarse_keys() -> None:
    assert letters_key("Find $x^2+1$ 的 值!") == "findx21的值"
    assert ascii_key("Find $x^2+1$ 的 值!") == "findx21"


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("025", "25"),
        ("27.0", "27"),
        (" 7 ", "7"),
        ("+5", "5"),
        ("-0", "0"),
        ("000", "0"),
        ("\u22125", "-5"),
        ("-007.00", "-7"),
        ("2.50", "2.50"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("1,234", "1,234"),
        ("0" * 9000 + "1" * 9000, "1" * 9000),
    ],
)
def test_integers_get_their_plain_spelling(given: str, gold: str) -> None:
    assert canonical_gold(given) == gold


def test_gsm8k_golds() -> None:
    assert gsm8k_gold("#### 1 \n#### 5,000.00", "f:1") == "5000"
    assert gsm8k_gold("a <<1+1=2>>2\n####  -3.", "f:1") == "-3"
    assert gsm8k_gold("#### 2.5", "f:1") == "2.5"
    for solution in ("72", "#### ", "#### about 7", "so ####x 72", "#### 1,2"):
        with pytest.raises(ValueError, match="^f:1: field answer: got .*'#### NUMBER'"):
            gsm8k_gold(solution, "f:1")


@pytest.mark.parametrize(
    ("problem", "language"),
    [
        ("Find the largest integer $n$.", "en"),
        ("$x^2$", "en"),
        ("已知 $\\begin{aligned} x & = \\operatorname{lcm}(a, b) \\end{aligned}$ 求 x", "zh"),
        ("设 $n=1990$", "zh"),
        ("① ② ③ ④ 求 x", "zh"),
        (
            "A particle starts from rest and moves along a line; 的 find its velocity.",
            "en",
        ),
        ("素数をすべて求めよ。ただし", "other"),
        ("Найдите все простые числа", "other"),
        ("Let α and β be the angles of a triangle", "en"),
    ],
)
def test_language_goes_by_words_not_formulas(problem: str, language: str) -> None:
    assert detect_language(problem) == language


def test_short_evaluation_problems_match_whole_or_not_at_all() -> None:
    training = ["What is 5 + 5 + 5?", "What is 5", ""]
    found = find_overlap("e", [(1, "What is 5?"), (2, "?!")], training)
    assert (found.exact, found.prefix) == (((1, 1),), ((1, 1),))
