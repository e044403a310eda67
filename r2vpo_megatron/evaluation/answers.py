r"""Reference answers in one spelling: "025", 27.0, \boxed{27} and $27$ read as they are meant."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from r2vpo_megatron.rewards.equivalence import shared_judge
from r2vpo_megatron.rewards.extraction import last_boxed
from r2vpo_megatron.rewards.math_dapo import SYMBOLIC, compute_score
from r2vpo_megatron.rewards.spelling import (
    MAX_ANSWER_CHARACTERS,
    is_word,
    number_in_base,
    remove_name,
    spell_answer,
)

# Says for each answer whether the grader finds it equal to itself.
AnswerChecker = Callable[[Sequence[str]], Sequence[bool]]

_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_WHOLE_NUMBER = re.compile(r"([+-]?)(\d+|\d{1,3}(?:,\d{3})+)(?:\.0*)?", re.ASCII)
# What stands in a column when there is no answer.
_NO_ANSWER = frozenset({"", "none", "null", "nan", "n/a", "na", "unknown", "tbd", "-", "?"})


def read_integer(value: Any, where: str, column: str) -> str:
    r"""A whole number: "025" -> "25", 27.0 -> "27", \boxed{27} -> "27", "1,080" -> "1080".

    Raises:
        ValueError: anything else, 27.5 for one.
    """
    text = _read_text(value, where, column)
    number = _whole_number(text)
    if number is None:
        raise ValueError(
            f"{where}: column {column}: {value!r} is not a whole number; valid: 25, 025, 27.0, "
            "or one of these in \\boxed{} or $...$"
        )
    return number


def read_expression(value: Any, where: str, column: str) -> str:
    r"""A number or LaTeX, without \boxed{} and $...$ around it; whole numbers as `read_integer`.

    Raises:
        ValueError: no answer, braces that do not match, or longer than an answer is.
    """
    text = _read_text(value, where, column)
    if "####" in text:
        text = _unwrap(text.rsplit("####", maxsplit=1)[1])
    if text.strip("$ ").lower() in _NO_ANSWER:
        raise ValueError(f"{where}: column {column}: {value!r} is no answer")
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise ValueError(
            f"{where}: column {column}: {len(text)} characters; valid: the answer alone, "
            f"at most {MAX_ANSWER_CHARACTERS} characters"
        )
    if not _braces_match(text):
        raise ValueError(
            f"{where}: column {column}: answer {text!r} does not parse: braces do not match"
        )
    return _whole_number(text) or text


def read_gsm8k(value: Any, where: str, column: str) -> str:
    """The whole number behind GSM8K's "####"; a bare number is taken as it is.

    Raises:
        ValueError: no such mark in a text that is more than a number; no whole number behind it.
    """
    if isinstance(value, str) and "####" in value:
        value = value.rsplit("####", maxsplit=1)[1].strip().removeprefix("$")
    elif isinstance(value, str) and _whole_number(_unwrap(value)) is None:
        raise ValueError(
            f"{where}: column {column}: no '#### ANSWER' at the end of {value[-40:]!r}"
        )
    return read_integer(value, where, column)


# Answer form of a benchmark -> (value, "file:row", column) -> answer.
ANSWER_FORMS: dict[str, Callable[[Any, str, str], str]] = {
    "integer": read_integer,
    "expression": read_expression,
    "gsm8k": read_gsm8k,
}


def gold_answers_agree(answers: Sequence[str]) -> list[bool]:
    r"""Whether the symbolic grader can read each answer, and accepts it in a \boxed{}.

    A benchmark's answer that fails this could be given by no response. The workers are asked
    directly: the grader itself settles an answer against itself by its spelling, broken or not.
    """
    spellings = [remove_name(spell_answer(answer)) for answer in answers]
    # "Evelyn" is an answer, too, and compared as a word; so are the digits of 4210_5.
    is_formula = [
        not (is_word(spelling) or number_in_base(spelling) is not None) for spelling in spellings
    ]
    formulas = [text for text, flag in zip(spellings, is_formula, strict=True) if flag]
    readable = iter(shared_judge().pool.judge([(text, text) for text in formulas]))
    return [
        (not flag or next(readable).equal)
        and compute_score(f"\\boxed{{{answer}}}", answer, SYMBOLIC)["acc"]
        for answer, flag in zip(answers, is_formula, strict=True)
    ]


def _read_text(value: Any, where: str, column: str) -> str:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: column {column}: {value!r} is no answer")
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(
            f"{where}: column {column}: a {type(value).__name__}; valid: a number or a text"
        )
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{where}: column {column}: {value!r} holds a zero byte")
    return _unwrap(str(value))


def _unwrap(text: str) -> str:
    r"""Take \boxed{}, math delimiters and a final period off, in any nesting."""
    while True:
        before = text
        text = text.strip()
        if text.endswith(".") and not text.endswith("\\."):
            text = text[:-1]
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : len(text) - len(closing)]
            wrapped = text.startswith(opening) and text.endswith(closing)
            # "$1$ and $2$" is not one formula.
            if wrapped and len(text) > len(opening + closing) and opening not in inner:
                text = inner
        if text.startswith("\\boxed{") and text.endswith("}"):
            inside = last_boxed(text)
            # Only where the box is all there is: "\boxed{1}, \boxed{2}" is two answers.
            if inside is not None and text == f"\\boxed{{{inside}}}":
                text = inside
        if text == before:
            return text


def _whole_number(text: str) -> str | None:
    match = _WHOLE_NUMBER.fullmatch(text.replace("\N{MINUS SIGN}", "-").replace("{,}", ","))
    if match is None:
        return None
    sign, digits = match.groups()
    number = digits.replace(",", "").lstrip("0") or "0"
    return "-" + number if sign == "-" and number != "0" else number


def _braces_match(text: str) -> bool:
    depth = 0
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # \{ and \} are signs, not groups
            continue
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
        position += 1
    return depth == 0
