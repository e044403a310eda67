"""Gold answers in one spelling."""

from __future__ import annotations

import re

from r2vpo_megatron.data.row_fields import field_error

_PLAIN_INTEGER = re.compile(r"([+\-\u2212]?)0*(\d+?)(?:\.0*)?")
_GROUPED_INTEGER = re.compile(r"[+\-\u2212]?\d{1,3}(?:,\d{3})+(?:\.0*)?")
_GSM8K_MARK = "####"
_WORKED_SOLUTION = re.compile(r"^####\s*\S[^\n]*\Z", re.MULTILINE)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def canonical_gold(answer: str) -> str:
    """Return an integer in its plain spelling (025, 25.0, +25 -> 25), anything else stripped.

    Other forms (fractions, intervals, words) are the grader's business.
    """
    answer = answer.strip()
    match = _PLAIN_INTEGER.fullmatch(answer)
    if match is None:
        return answer
    sign, digits = match.groups()
    return f"-{digits}" if sign not in ("", "+") and digits != "0" else digits


def is_worked_solution(answer: str) -> bool:
    """Say whether a text is a solution that ends with its answer after `####`, as GSM8K's are."""
    return _WORKED_SOLUTION.search(answer.strip()) is not None


def gsm8k_gold(solution: str, where: str, name: str = "answer") -> str:
    """Return the number after `####` of a GSM8K solution.

    Calculator notes (`<<48/2=24>>`) in it, a dollar sign and thousands commas are dropped.

    Args:
        solution: The worked solution, its last line `#### 72`.
        where: The file and row, for messages.
        name: The field, for messages.

    Raises:
        ValueError: There is no such line, or no number in it.
    """
    valid = "a solution whose last line is '#### NUMBER'"
    _, mark, last = solution.rpartition(_GSM8K_MARK)
    if not mark:
        raise field_error(where, name, solution, valid)
    gold = re.sub(r"<<[^>]*>>", "", last).strip().replace("\u2212", "-")
    gold = gold.replace("$", "").removesuffix(".").strip()
    if _GROUPED_INTEGER.fullmatch(gold):
        gold = gold.replace(",", "")
    if not _NUMBER.fullmatch(gold):
        raise field_error(where, name, _GSM8K_MARK + last, valid)
    return canonical_gold(gold)
