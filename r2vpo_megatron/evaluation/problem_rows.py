"""Rows of a benchmark's file to problems: copies and templates off, every fault with its row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r2vpo_megatron.data.templates import take_off_templates
from r2vpo_megatron.evaluation.answers import ANSWER_FORMS, AnswerChecker
from r2vpo_megatron.evaluation.columns import choose_column, read_column


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark; `answer` is a whole number or LaTeX without delimiters."""

    problem_id: str
    problem: str
    answer: str


class ProblemReader:
    """Reads one source; which columns it has is decided by its first row.

    Args:
        name: Of the benchmark.
        source: File or data set, for messages.
        answer_form: Key of `answers.ANSWER_FORMS`.
        problem_columns: Dotted paths of the problem text, the first one present counts.
        answer_columns: Likewise, of the answer.
        id_columns: Likewise, of the id; may be absent.
    """

    def __init__(
        self,
        *,
        name: str,
        source: str,
        answer_form: str,
        problem_columns: Sequence[str],
        answer_columns: Sequence[str],
        id_columns: Sequence[str],
    ) -> None:
        self._name = name
        self._source = source
        # A number needs no grader to tell that it is one.
        self._needs_grader = answer_form == "expression"
        self._read_answer = ANSWER_FORMS[answer_form]
        self._problem_columns = problem_columns
        self._answer_columns = answer_columns
        self._id_columns = id_columns
        self._columns: tuple[str, str, str | None] | None = None
        self._problems: list[Problem] = []
        self._row_numbers: list[int] = []
        self._index_of_text: dict[str, int] = {}
        self._row_of_id: dict[str, int] = {}
        self._num_copies = 0
        self._num_templates: dict[str, int] = {}

    def read(self, rows: Iterable[tuple[int, Any]], check_answers: AnswerChecker) -> list[Problem]:
        """The problems, each once, in the order of the rows.

        Args:
            rows: (row number from 1, row).
            check_answers: Says for each answer whether the grader finds it equal to itself.

        Raises:
            ValueError: as `benchmarks.read_benchmark` says.
        """
        for row_number, row in rows:
            self._add(row_number, row)
        if not self._problems:
            raise ValueError(f"{self._source}: empty; valid: at least one problem")
        if self._needs_grader:
            self._check_answers(check_answers)
        return self._problems

    def _add(self, row_number: int, row: Any) -> None:
        where = f"{self._source}:{row_number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a {type(row).__name__}; valid: an object with columns")
        if self._columns is None:
            self._columns = (
                choose_column(row, self._problem_columns, where, "the problem"),
                choose_column(row, self._answer_columns, where, "the answer"),
                choose_column(row, self._id_columns, where),
            )
        problem_column, answer_column, id_column = self._columns
        text = self._problem_text(read_column(row, problem_column, where), where, problem_column)
        value = read_column(row, answer_column, where)
        answer = self._read_answer(value, where, answer_column)
        key = " ".join(text.split())
        if key in self._index_of_text:
            self._add_copy(self._index_of_text[key], answer, where, answer_column)
            return
        if id_column is None:
            problem_id = f"{self._name}-{row_number:04d}"
        else:
            problem_id = _read_id(read_column(row, id_column, where), where, id_column)
            if problem_id in self._row_of_id:
                raise ValueError(
                    f"{where}: column {id_column}: {problem_id!r} is taken by row "
                    f"{self._row_of_id[problem_id]} with another problem; valid: an id that "
                    "occurs once"
                )
        self._row_of_id[problem_id] = row_number
        self._index_of_text[key] = len(self._problems)
        self._row_numbers.append(row_number)
        self._problems.append(Problem(problem_id, text, answer))

    def _check_answers(self, check: AnswerChecker) -> None:
        """Ask the grader whether it can read each answer at all.

        Raises:
            ValueError: it cannot; names the row of the first one.
        """
        verdicts = check([problem.answer for problem in self._problems])
        bad = [index for index, verdict in enumerate(verdicts) if not verdict]
        if not bad:
            return
        assert self._columns is not None
        problem = self._problems[bad[0]]
        more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
        raise ValueError(
            f"{self._source}:{self._row_numbers[bad[0]]}: column {self._columns[1]}: answer "
            f"{problem.answer!r} does not parse: the grader does not find it equal to itself"
            f"{more}; valid: a number or a LaTeX expression"
        )

    def notes(self) -> list[str]:
        """What reading changed, for the user to know."""
        notes = []
        if self._num_copies:
            notes.append(f"{self._num_copies} rows were copies of an earlier problem and dropped")
        for template, num_problems in self._num_templates.items():
            notes.append(f"prompt template {template!r} was taken off {num_problems} rows")
        return notes

    def _problem_text(self, value: Any, where: str, column: str) -> str:
        if not isinstance(value, str):
            raise ValueError(
                f"{where}: column {column}: a {type(value).__name__}; valid: the text of a problem"
            )
        text, template = take_off_templates(value)
        if text != value.strip():
            self._num_templates[template] = self._num_templates.get(template, 0) + 1
        if not text:
            raise ValueError(f"{where}: column {column}: empty; valid: the text of a problem")
        _check_unicode(text, where, column)
        return text

    def _add_copy(self, index: int, answer: str, where: str, column: str) -> None:
        first = self._problems[index]
        if first.answer != answer:
            raise ValueError(
                f"{where}: column {column}: {answer!r}, but row {self._row_numbers[index]} answers "
                f"the same problem with {first.answer!r}; valid: one answer to a problem"
            )
        self._num_copies += 1


def _read_id(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise ValueError(
            f"{where}: column {column}: {value!r}; valid: a whole number or a text that is "
            "not empty"
        )
    text = str(value).strip()
    _check_unicode(text, where, column)
    return text


def _check_unicode(text: str, where: str, column: str) -> None:
    """JSON may hold half of a surrogate pair, which no tokenizer takes and no file keeps."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        sign = text[error.start]
        raise ValueError(
            f"{where}: column {column}: {sign!r} at character {error.start + 1} is half of a "
            "surrogate pair; valid: Unicode text"
        ) from None
