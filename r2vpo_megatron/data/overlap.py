"""Which problems of an evaluation set are among those to train on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r2vpo_megatron.data.problem_keys import letters_key
from r2vpo_megatron.data.row_files import read_rows
from r2vpo_megatron.data.sources import PROBLEM_COLUMNS, problem_text
from r2vpo_megatron.data.templates import take_off_templates

PREFIX_CHARACTERS = 60
# An evaluation problem of fewer letters and digits begins too many others.
_MIN_PREFIX_CHARACTERS = 20
_PROBLEM_COLUMNS = (*PROBLEM_COLUMNS, "meta.problem")


@dataclass(frozen=True)
class EvaluationOverlap:
    """What an evaluation set shares with a training set.

    Attributes:
        name: Of the evaluation set.
        num_problems: Different ones that it has.
        exact: (row of the evaluation file, index of the training problem) where all letters and
            digits agree.
        prefix: Likewise where the first 60 do; the exact ones are among them.
    """

    name: str
    num_problems: int
    exact: tuple[tuple[int, int], ...]
    prefix: tuple[tuple[int, int], ...]

    @property
    def num_exact(self) -> int:
        """Problems of the evaluation set that are in the training set."""
        return len({row for row, _ in self.exact})

    @property
    def num_prefix(self) -> int:
        """Problems of the evaluation set whose beginning is in the training set."""
        return len({row for row, _ in self.prefix})


def read_evaluation_problems(path: Path) -> list[tuple[int, str]]:
    """Return (row number, bare problem) of an evaluation file, each problem once.

    Raises:
        ValueError: The file cannot be read, or a row has no problem.
    """
    first_row: dict[str, int] = {}
    for number, row in read_rows(path):
        message = problem_text(row, f"{path}:{number}", _PROBLEM_COLUMNS)
        problem, _ = take_off_templates(message)
        first_row.setdefault(problem or message, number)
    return [(number, problem) for problem, number in first_row.items()]


def find_overlap(
    name: str, evaluation: Sequence[tuple[int, str]], training: Sequence[str]
) -> EvaluationOverlap:
    """Compare an evaluation set with a training set by letters and digits of every script.

    Args:
        name: Of the evaluation set.
        evaluation: Of `read_evaluation_problems`.
        training: Bare problems.
    """
    by_key = sorted((letters_key(problem), index) for index, problem in enumerate(training))
    exact: list[tuple[int, int]] = []
    prefix: list[tuple[int, int]] = []
    for row, problem in evaluation:
        key = letters_key(problem)
        start = key[:PREFIX_CHARACTERS]
        if not key:
            continue
        # Sorted, the keys that begin alike stand together.
        for position in range(bisect_left(by_key, (start, -1)), len(by_key)):
            other, index = by_key[position]
            if not other.startswith(start):
                break
            if other == key:
                exact.append((row, index))
            if other == key or len(start) >= _MIN_PREFIX_CHARACTERS:
                prefix.append((row, index))
    return EvaluationOverlap(name, len(evaluation), tuple(sorted(exact)), tuple(sorted(prefix)))
