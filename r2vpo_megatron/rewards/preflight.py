r"""Before a run: does the grader read the form of answer that the prompts ask for?

A prompt that asks for \boxed{} with a grader that reads "Answer:" lines gives -1 to every response,
and the run looks like one that does not learn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards.result import RewardFunction

# How a response in this form ends, and how a prompt asks for it.
ANSWER_FORMS = {"answer_line": "Answer: {gold}", "boxed": "So the answer is $\\boxed{{{gold}}}$."}
_ASKS_FOR = {
    "answer_line": re.compile(
        r"(?:Answer ?[:：] ?\$?\\?[A-Z(<\[{]|[\"'“`*]Answer ?[:：]|答案[:：])"
    ),
    "boxed": re.compile(r"\\f?boxed"),
}


def asked_forms(text: str) -> list[str]:
    """The forms of answer that a prompt's text names."""
    return [form for form, pattern in _ASKS_FOR.items() if pattern.search(text)]


def check_answer_form(
    prompts: Sequence[Prompt], reward: RewardFunction, max_prompts: int = 64
) -> str:
    """Grade the gold answer of prompts in the form that each asks for.

    Args:
        prompts: Of the run; evenly spread ones are tried.
        reward: Checked where it says what it reads, by an attribute `answer_forms`.
        max_prompts: As many at most.

    Returns:
        A note for the log: empty, or that prompts name no form.

    Raises:
        ValueError: a form that the reward never reads, or a gold answer that it does not accept.
    """
    forms: tuple[str, ...] | None = getattr(reward, "answer_forms", None)
    if forms is None or not prompts or max_prompts < 1:
        return ""
    step = -(-len(prompts) // max_prompts)
    tried = prompts[::step]
    num_silent = 0
    for prompt in tried:
        asked = asked_forms(prompt.text)
        if not asked:
            num_silent += 1
            continue
        readable = [form for form in asked if form in forms]
        if not readable:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} asks for the answer form {asked[0]!r}, which the "
                f"reward never reads; it reads: {', '.join(forms)}. Choose a prompt template or a "
                f"reward that agree"
            )
        _check_gold(prompt, readable[0], reward)
    if num_silent:
        return (
            f"{num_silent} of {len(tried)} prompts tried name no answer form; the reward reads: "
            f"{', '.join(forms)}"
        )
    return ""


def _check_gold(prompt: Prompt, form: str, reward: RewardFunction) -> None:
    response = ANSWER_FORMS[form].format(gold=prompt.ground_truth)
    result = reward(prompt, response)
    if not result.acc:
        raise ValueError(
            f"prompt {prompt.prompt_id!r}: the reward rejects its own ground_truth "
            f"{prompt.ground_truth!r} in the form {form!r}: it read {result.pred!r} from "
            f"{response!r}{f' ({result.failure})' if result.failure else ''}. Valid is an answer "
            f"that the reward accepts when a response repeats it"
        )
