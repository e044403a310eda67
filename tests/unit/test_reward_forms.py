"""Rewards by name or file, batches, checks of form, and the preflight of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards import (
    FORMAT_CHECKS,
    RewardResult,
    check_answer_form,
    load_reward,
    score_responses,
)

DAPO_TEXT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '1+1?\n\nRemember to put your answer on its own line after "Answer:".'
)
BOXED_TEXT = "1+1? Please reason step by step, and put your final answer within \\boxed{}."

REWARD_FILE = """
from dataclasses import dataclass
from r2vpo_megatron.rewards import RewardResult

@dataclass(frozen=True)
class Settings:
    words: int = 3

def short(prompt, response_text):
    right = len(response_text.split()) <= Settings().words
    return RewardResult(1.0 if right else 0.0, right, None, True)
"""


def test_reward_of_the_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text(REWARD_FILE)
    reward = load_reward(f"{path}:short")
    prompt = Prompt("p", (1,), "")
    assert reward(prompt, "one two three").acc
    assert not reward(prompt, "one two three four").acc
    with pytest.raises(ValueError, match=r"no function 'long'; it has: RewardResult, .*short"):
        load_reward(f"{path}:long")
    with pytest.raises(ValueError, match=r"no such file '.*missing.py'"):
        load_reward(f"{tmp_path / 'missing.py'}:short")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\ny = x / 0\n", r"broken.py:2: ZeroDivisionError: division by zero"),
        ("def f(:\n    pass\n", r"broken.py:1: SyntaxError: "),
        ("\n\nimport no_such_module_x\n", r"broken.py:3: ModuleNotFoundError: .*no_such_module_x"),
    ],
)
def test_a_broken_reward_file_is_named_with_its_line(
    tmp_path: Path, source: str, message: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message):
        load_reward(f"{path}:f")


def test_reward_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_for_test.py").write_text("def always(prompt, text):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("my_reward_for_test:always")(Prompt("p", (1,), "1"), "") == 1
    with pytest.raises(ValueError, match="no function 'never'; it has: always"):
        load_reward("my_reward_for_test:never")
    with pytest.raises(ValueError, match="cannot import 'no_such_module_x'"):
        load_reward("no_such_module_x:f")
    for name in ("math_dap", "math_dapo:", ":f", ""):
        with pytest.raises(ValueError, match="unknown; valid: math_dapo, math_dapo_minerva"):
            load_reward(name)


def _count_characters(prompt: Prompt, text: str) -> RewardResult:
    return RewardResult(float(len(text)), True, prompt.ground_truth, True)


class _Batched:
    def __call__(self, prompt: Prompt, text: str) -> RewardResult:
        raise AssertionError("one by one")

    def score_batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[RewardResult]:
        return [_count_characters(*pair) for pair in zip(prompts, texts, strict=True)][: self.most]

    most = 2


def test_responses_are_scored_in_order_and_at_once_where_the_reward_can() -> None:
    prompts = [Prompt("p", (1,), gold) for gold in ("1", "2", "3")]
    results = score_responses(_count_characters, prompts, ["a", "bb", "ccc"])
    assert [(result.score, result.pred) for result in results] == [(1, "1"), (2, "2"), (3, "3")]
    assert score_responses(_Batched(), prompts[:2], ["a", "bb"]) == results[:2]
    with pytest.raises(ValueError, match="2 results for 3 responses"):
        score_responses(_Batched(), prompts, ["a", "bb", "ccc"])
    with pytest.raises(ValueError, match="3 prompts for 1 responses"):
        score_responses(_count_characters, prompts, ["a"])
    for wrong, message in (
        (1.0, "'p' .*returned float, not a RewardResult"),
        (RewardResult(float("nan"), True, None, True), "'p' .*score nan: must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            score_responses(lambda prompt, text, wrong=wrong: wrong, prompts[:1], ["a"])
    reward = load_reward("math_dapo")
    texts = ["Answer: 1", "no", "**Answer:** 03"]
    assert [result.acc for result in score_responses(reward, prompts, texts)] == [True, False, True]


@pytest.mark.parametrize(
    ("check", "response", "in_order"),
    [
        ("answer_line", "So\nAnswer: 5", True),
        ("answer_line", "So\n**Answer:** 5\n", True),
        ("answer_line", "So\n答案", False),
        ("answer_line", "Answer: 4\nAnswer: 5", False),
        ("answer_line", "Answer: 5\nThat is it.", False),
        ("answer_line", "So the answer: 5 is here", False),
        ("answer_line", "Answer:", False),
        ("answer_line", "Answer: 4</think>\nAnswer: 5", True),
        ("answer_line", "", False),
        ("boxed", "So \\boxed{5}.", True),
        ("boxed", "So \\boxed{\\frac{1}{2}}.", True),
        ("boxed", "\\boxed{5} or \\boxed{6}", False),
        ("boxed", "\\boxed{5", False),
        ("boxed", "\\boxed{ }", False),
        ("boxed", "\\boxed{4}</think>\\boxed{5}", True),
        ("think_closed", "<think>hm</think>5", True),
        ("think_closed", "[unused16]hm[unused17]5", True),
        ("think_closed", "<think>hm", False),
        ("think_closed", "<think>hm</think> \n", False),
        ("think_closed", "a</think>b</think>c", False),
        ("think_closed", "a</think>b[unused17]c", False),
        ("no_repetition", "", True),
        ("no_repetition", "wait, " * 100, False),
        ("no_repetition", "x" * 400, False),
        ("no_repetition", "x" * 300, True),  # too short to judge
        ("no_repetition", " ".join(map(str, range(300))), True),
        ("no_repetition", "0" * 1000 + " ".join(map(str, range(300))), True),  # got out of it
    ],
)
def test_format_checks(check: str, response: str, in_order: bool) -> None:
    assert FORMAT_CHECKS[check](response) is in_order


def _prompts(text: str, *golds: str) -> list[Prompt]:
    return [Prompt(f"p{index}", (1,), gold, text) for index, gold in enumerate(golds)]


def test_preflight_accepts_forms_that_the_reward_reads() -> None:
    for name, text in (
        ("math_dapo", DAPO_TEXT),
        ("math_dapo", BOXED_TEXT),
        ("math_dapo_minerva", DAPO_TEXT),
        ("math_dapo_boxed_fallback", BOXED_TEXT),
        ("math_dapo_strict_box", BOXED_TEXT),
    ):
        assert check_answer_form(_prompts(text, "34", "\\frac{1}{2}"), load_reward(name)) == ""


def test_preflight_refuses_a_form_that_the_reward_never_reads() -> None:
    with pytest.raises(ValueError, match="'p0' asks for .*'boxed'.*it reads: answer_line"):
        check_answer_form(_prompts(BOXED_TEXT, "34"), load_reward("math_dapo_minerva"))
    with pytest.raises(ValueError, match="'p0' asks for .*'answer_line'.*it reads: boxed"):
        check_answer_form(_prompts(DAPO_TEXT, "34"), load_reward("math_dapo_strict_box"))


def test_preflight_refuses_a_gold_answer_that_is_not_accepted() -> None:
    with pytest.raises(
        ValueError, match="'p1'.*rejects its own ground_truth '' in .*'answer_line'"
    ):
        check_answer_form(_prompts(DAPO_TEXT, "34", ""), load_reward("math_dapo"))
    with pytest.raises(ValueError, match="'p0'.*too_long"):
        check_answer_form(_prompts(BOXED_TEXT, "x+" * 300 + "x"), load_reward("math_dapo"))
    with pytest.raises(ValueError, match="'p0'.*it read '4'"):
        check_answer_form(_prompts(DAPO_TEXT, "4\n5"), load_reward("math_dapo_minerva"))


def test_preflight_only_notes_prompts_that_name_no_form() -> None:
    note = check_answer_form(_prompts("2+6-8+6=?", "6", "7"), load_reward("math_dapo"))
    assert note == "2 of 2 prompts tried name no answer form; the reward reads: answer_line, boxed"
    assert check_answer_form(_prompts("2+6-8+6=?", "6"), _count_characters) == ""
    assert check_answer_form([], load_reward("math_dapo")) == ""


def test_preflight_tries_evenly_spread_prompts_and_no_more_than_asked() -> None:
    seen: list[str] = []

    class Recording:
        answer_forms = ("answer_line",)

        def __call__(self, prompt: Prompt, text: str) -> RewardResult:
            seen.append(prompt.prompt_id)
            assert text == f"Answer: {prompt.ground_truth}"
            return RewardResult(1.0, True, prompt.ground_truth, True)

    check_answer_form(_prompts(DAPO_TEXT, *map(str, range(100))), Recording(), max_prompts=4)
    assert seen == ["p0", "p25", "p50", "p75"]
