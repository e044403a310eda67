"""Prompt templates: the words around a problem that say how its answer is to be given.

Not chat templates: those put a model's turn markers around the whole message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AnswerForm = Literal["answer_line", "boxed", ""]


@dataclass(frozen=True)
class PromptTemplate:
    r"""Fixed words before and after a problem.

    Attributes:
        name: Its key in `PROMPT_TEMPLATES`.
        prefix: What comes before the problem.
        suffix: What comes after it.
        answer_form: What it asks for: a last line `Answer: ...`, a `\boxed{...}`, or nothing.
    """

    name: str
    prefix: str
    suffix: str
    answer_form: AnswerForm

    def apply(self, problem: str) -> str:
        """Return the user's message for a bare problem."""
        return f"{self.prefix}{problem}{self.suffix}"

    def strip(self, text: str) -> str | None:
        """Return the bare problem of a message, or None where it has not this template."""
        if len(text) < len(self.prefix) + len(self.suffix):
            return None
        if not (text.startswith(self.prefix) and text.endswith(self.suffix)):
            return None
        return text[len(self.prefix) : len(text) - len(self.suffix)]


PROMPT_TEMPLATES: dict[str, PromptTemplate] = {
    # As DAPO-Math-17k has it; the graders of that line of work look for the answer line.
    "dapo": PromptTemplate(
        name="dapo",
        prefix=(
            "Solve the following math problem step by step. The last line of your response should "
            "be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
            "problem.\n\n"
        ),
        suffix='\n\nRemember to put your answer on its own line after "Answer:".',
        answer_form="answer_line",
    ),
    "boxed": PromptTemplate(
        name="boxed",
        prefix="",
        suffix="\n\nThink step by step, and end with your final answer inside \\boxed{}.",
        answer_form="boxed",
    ),
    "plain": PromptTemplate(name="plain", prefix="", suffix="", answer_form=""),
}


def take_off_templates(text: str) -> tuple[str, str]:
    """Return a message's bare problem, and the name of its template; "plain" where it shows none.

    Blanks around the message do not hide a template. Where one stands inside another both are taken
    off, and the outer one is named: left inside, it would ask for its own form of answer.
    """
    problem, outermost = text.strip(), ""
    found = True
    while found:
        found = False
        for template in PROMPT_TEMPLATES.values():
            inner = template.strip(problem)
            if inner is not None and inner != problem:
                problem, outermost = inner.strip(), outermost or template.name
                found = True
    return problem, outermost or "plain"
