"""A verifiable arithmetic task: sums of four one-digit numbers, worked in partial sums.

A question is `2+6-8+6=?` and its solution is

    2+6=8
    8-8=0
    0+6=6
    Answer: 6

No partial sum is negative. Questions are split into train and held-out by a hash of their text,
so no question of one split can ever appear in the other, whatever the seed that drew it.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["train", "held_out"]

NUM_OPERANDS = 4
MIN_OPERAND = 1
MAX_OPERAND = 9
HELD_OUT_SHARE = 8  # one question in eight is held out


@dataclass(frozen=True)
class Problem:
    """One question with its worked solution; the solution's last line is `Answer: N`."""

    prompt_id: str
    question: str
    solution: str
    ground_truth: str


def split_of(question: str) -> Split:
    """Return the split that a question belongs to, decided by the hash of its text alone."""
    return "held_out" if _question_hash(question) % HELD_OUT_SHARE == 0 else "train"


def generate_problems(split: Split, num_problems: int, seed: int) -> list[Problem]:
    """Draw distinct problems of one split.

    Args:
        split: "train" or "held_out".
        num_problems: how many to draw, at least 1.
        seed: seed of the draw; the same arguments give the same list on every platform.

    Raises:
        ValueError: for an unknown split or a count below 1.
    """
    if split not in get_args(Split):
        raise ValueError(f"split={split!r}; valid: {', '.join(get_args(Split))}")
    if num_problems < 1:
        raise ValueError(f"num_problems={num_problems}; valid: an integer >= 1")
    rng = random.Random(f"{split}/{seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < num_problems:
        problem = _draw(rng)
        if split_of(problem.question) == split:
            problems.setdefault(problem.question, problem)
    return list(problems.values())


def solve_with_slips(problem: Problem, slip_probability: float, rng: random.Random) -> str:
    """Work a problem as an imperfect teacher does; returns a solution that may be wrong.

    Each line's result is, with `slip_probability`, one to three too large, and the next line goes
    on from there. A model that imitates such a teacher knows better than it samples.
    """
    return _work(problem.question, slip_probability, rng)


def _work(question: str, slip_probability: float, rng: random.Random) -> str:
    first, *terms = re.findall(r"[+-]?\d+", question)
    total = int(first)
    lines = []
    for term in terms:
        result = total + int(term)
        if rng.random() < slip_probability:
            result += rng.randint(1, 3)  # upwards only: no later partial sum turns negative
        lines.append(f"{total}{term}={result}")
        total = result
    return "\n".join([*lines, f"Answer: {total}"])


def _draw(rng: random.Random) -> Problem:
    total = rng.randint(MIN_OPERAND, MAX_OPERAND)
    question = str(total)
    for _ in range(NUM_OPERANDS - 1):
        operand = rng.randint(MIN_OPERAND, MAX_OPERAND)
        sign = rng.choice("+-") if total >= operand else "+"
        total += operand if sign == "+" else -operand
        question += f"{sign}{operand}"
    question += "=?"
    prompt_id = f"arithmetic-{_question_hash(question):016x}"
    solution = _work(question, 0.0, rng)
    return Problem(prompt_id, question, solution, ground_truth=str(total))


def _question_hash(question: str) -> int:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big")
