"""The math_dapo verdicts: a conformance table where there is one, and hand-made cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards import REWARDS, RewardResult, load_reward
from r2vpo_megatron.rewards.extraction import last_answer_line, last_boxed
from r2vpo_megatron.rewards.math_dapo import STRING_MODES, compute_score
from r2vpo_megatron.rewards.normalization import normalize_answer

REPOSITORY = Path(__file__).resolve().parents[2]
CONFORMANCE = REPOSITORY.parent / "shared" / "conformance" / "math_dapo_cases.jsonl"


@pytest.mark.parametrize("mode", STRING_MODES)
def test_agrees_with_every_row_of_the_conformance_table(mode: str) -> None:
    if not CONFORMANCE.is_file():
        pytest.skip(f"no conformance table at {CONFORMANCE}")
    rows = [json.loads(line) for line in CONFORMANCE.read_text(encoding="utf-8").splitlines()]
    assert rows
    wrong = [
        (row["response"][-80:], row["ground_truth"], verdict, row[mode])
        for row in rows
        if (verdict := compute_score(row["response"], row["ground_truth"], mode)) != row[mode]
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("x = 5 = 34", "34"),
        ("a 34", "34"),
        ("an apple", "apple"),
        ("$34.$", "34"),
        ("\\$1,234", "1234"),
        ("1,234.5", "1,234.5"),
        ("1,2a", "1,2a"),
        ("12{,}345", "12345"),
        ("12,\\!345", "12345"),
        ("3\\ 4", "34"),
        ("34 \\mbox{ cm}", "34"),
        ("5 \\text{ m}", "5"),
        ("5 \\text{ cm}^2", "5"),
        ("5 \\text{ cm}^3", "5"),
        ("x,\\text{ and } 4", "x,4"),
        ("x \\text{ and } 4", "x,4"),
        ("3,\\text{ and } 4", "34"),  # and then only digits and commas are left
        ("7\\mathrm{th}", "7"),
        ("30^{\\circ}", "30"),
        ("90 degrees", "90"),
        ("3 feet 2 inches", "32"),
        ("3 ft", "3ft"),
        ("\\left(1, 2\\right)", "\\left(1,2\\right)"),
        ("1,2,\\ldots", "12"),
        ("x\\dots", "x"),
        ('"yes"', "yes"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\text{a}b\\text{c}", "abc"),
        ("\\textbf{(E)}", "(E)"),
        ("\\overline{AB}", "AB"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac123", "\\frac{1}{2}3"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\frac{1}2", "\\frac{1}2"),
        ("\\dfrac12", "\\dfrac{1}{2}"),
        ("\\sqrt3", "\\sqrt{3}"),
        ("2\\sqrt35", "2\\sqrt{3}5"),
        ("so $3$ or $4$", "3"),
        ("$$12$$", ""),
        ("$34", "34"),
        ("12 students", "12"),
        ("  34\t", "34"),
    ],
)
def test_normalization(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


REMOVED = r"""
    square ways integers dollars mph inches hours km units \ldots sue points feet minutes digits
    cents degrees cm gm pounds meters meals edges students childrentickets multiples
    \text{s} \text{.} \text{} \text{cm}^2 \mathrm{th} ^\circ ^{\circ} \; ,\! {,} " \dots
"""


@pytest.mark.parametrize("unit", REMOVED.split())
def test_units_and_remnants_of_tex_are_removed(unit: str) -> None:
    assert normalize_answer(f"12 {unit}") == "12"


def test_extraction_takes_the_last_answer_and_the_last_closed_box() -> None:
    assert last_answer_line("Answer: 1\nanswer :2 \nrest") == "2 "
    assert last_answer_line("no such line") == "[INVALID]"
    assert last_boxed("\\boxed{1} \\boxed{a{b}c}") == "a{b}c"
    assert last_boxed("\\boxed{1} \\boxed{2") is None
    assert last_boxed("\\fbox{1}") is None


def test_windows_are_counted_in_characters_from_the_end() -> None:
    answer = "Answer: 7"
    assert compute_score(answer + "\n" + "x" * (299 - len(answer)), "7", "minerva")["acc"]
    assert not compute_score(answer + "\n" + "x" * (300 - len(answer)), "7", "minerva")["acc"]
    assert compute_score(answer + "\n" + "x" * (999 - len(answer)), "7")["acc"]
    assert not compute_score(answer + "\n" + "x" * (1000 - len(answer)), "7")["acc"]
    box = "\\boxed{7}"
    assert compute_score(box + "x" * (100 - len(box)), "7", "strict_box")["acc"]
    assert not compute_score(box + "x" * (101 - len(box)), "7", "strict_box")["acc"]


def test_boxes_are_compared_raw() -> None:
    assert not compute_score("\\boxed{1,234}", "1234", "strict_box")["acc"]
    assert compute_score("\\boxed{1,234}", "1,234", "boxed_fallback")["acc"]
    # An answer line, though wrong, forbids the fallback.
    assert not compute_score("\\boxed{7}\nAnswer: 8", "7", "boxed_fallback")["acc"]


def test_unknown_mode_lists_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match="'sybolic'.*symbolic, minerva, boxed_fallback, strict_box"
    ):
        compute_score("Answer: 1", "1", "sybolic")


def test_default_mode_is_symbolic_and_has_exactly_three_keys() -> None:
    assert compute_score("**Answer:** 034", "34") == {"score": 1.0, "acc": True, "pred": "34"}
    assert compute_score("34", "34") == {"score": -1.0, "acc": False, "pred": None}
    assert compute_score("Answer: 5=34", "34") == {"score": -1.0, "acc": False, "pred": "5=34"}


def test_registry_gives_results_of_the_named_mode() -> None:
    prompt = Prompt("p", (1,), "34")
    assert load_reward("math_dapo")(prompt, "**Answer:** 34") == RewardResult(1.0, True, "34", True)
    assert load_reward("math_dapo")(prompt, "34") == RewardResult(-1.0, False, None, False)
    minerva = load_reward("math_dapo_minerva")
    assert minerva(prompt, "Answer: 34") == RewardResult(1.0, True, "34", True)
    assert minerva(prompt, "**Answer:** 34") == RewardResult(-1.0, False, "**34", True)
    assert minerva(prompt, "34") == RewardResult(-1.0, False, "[INVALID]", False)
    assert load_reward("math_dapo_boxed_fallback")(prompt, "\\boxed{34}").acc
    assert load_reward("math_dapo_strict_box")(prompt, "34") == RewardResult(
        -1.0, False, None, False
    )
    assert list(REWARDS) == [
        "math_dapo",
        "math_dapo_minerva",
        "math_dapo_boxed_fallback",
        "math_dapo_strict_box",
    ]


def test_importing_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, r2vpo_megatron.rewards, r2vpo_megatron.data.packing, "
        "r2vpo_megatron.data.prompts, r2vpo_megatron.replay\n"
        "print([name for name in ('torch', 'ray', 'transformers', 'sympy') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
