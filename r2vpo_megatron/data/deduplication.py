"""One problem once, and none whose label is in doubt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from r2vpo_megatron.data.language import has_chinese
from r2vpo_megatron.data.problem_keys import CONFLICT_KEYS, ascii_key, layout_key
from r2vpo_megatron.data.sources import SourceProblem


@dataclass
class RowStatistics:
    """What was seen while rows were read; counts of keys describe the whole source.

    Attributes:
        num_rows: Rows read.
        num_with_template: Rows that came with a prompt template, which was taken off.
        num_with_chinese: Rows with a Chinese character.
        num_unique_messages: Different texts of the problem column, as they stand in it.
        num_unique_texts: Different problems, without prompt template and blanks around them.
        num_layout_keys: Problems that differ in more than layout.
        num_ascii_keys: Problems that differ in a-z or 0-9.
    """

    num_rows: int = 0
    num_with_template: int = 0
    num_with_chinese: int = 0
    num_unique_messages: int = 0
    num_unique_texts: int = 0
    num_layout_keys: int = 0
    num_ascii_keys: int = 0


@dataclass(frozen=True)
class Conflict:
    """Spellings of what may be one problem, with more than one label; all are dropped.

    Attributes:
        key: What they have in common: a key of `CONFLICT_KEYS`, or "layout".
        labels: The different ones, sorted.
        rows: `file:row` of each spelling's first row.
        problem: The first spelling.
    """

    key: str
    labels: tuple[str, ...]
    rows: tuple[str, ...]
    problem: str


@dataclass
class ExactFilter:
    """Keeps the first of rows with the same problem and the same label.

    Only what is kept stays in memory: a source with a hundred copies of every row streams through.
    """

    statistics: RowStatistics = field(default_factory=RowStatistics)
    _seen: set[bytes] = field(default_factory=set)
    _texts: set[bytes] = field(default_factory=set)
    _messages: set[bytes] = field(default_factory=set)
    _row_of_id: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def is_new(self, problem: SourceProblem) -> bool:
        """Say whether this is the first such row.

        Raises:
            ValueError: Its id is taken by another problem.
        """
        self.statistics.num_rows += 1
        self.statistics.num_with_template += problem.template != "plain"
        self.statistics.num_with_chinese += has_chinese(problem.message)
        self._messages.add(_digest(problem.message))
        self.statistics.num_unique_messages = len(self._messages)
        row = _digest(problem.text + "\0" + problem.ground_truth)
        if problem.source_id is not None:
            first_where, first_row = self._row_of_id.setdefault(
                problem.source_id, (problem.where, row)
            )
            if first_row != row:
                raise ValueError(
                    f"{problem.where}: id {problem.source_id!r} is taken by another problem, of "
                    f"{first_where}; valid: an id column in which each problem has its own"
                )
        if row in self._seen:
            return False
        self._seen.add(row)
        self._texts.add(_digest(problem.text))
        self.statistics.num_unique_texts = len(self._texts)
        return True


def drop_conflicts(
    problems: Sequence[SourceProblem], key_name: str
) -> tuple[list[SourceProblem], list[Conflict]]:
    """Drop every problem that shares a key with one of another label.

    Which label is right cannot be told, so none of the group stays, nor any that differs from one
    of it in layout only.

    Args:
        problems: Of `ExactFilter`.
        key_name: Key of `CONFLICT_KEYS`.

    Returns:
        Those left, in order, and the groups that were dropped.
    """
    layouts = [layout_key(problem.text) for problem in problems]
    found = _conflicts(problems, [CONFLICT_KEYS[key_name](p.text) for p in problems], key_name)
    gone = {row for conflict in found for row in conflict.rows}
    # Formulas that differ in \\frac and \\dfrac have one layout and different letters.
    for conflict in _conflicts(problems, layouts, "layout"):
        if not gone.issuperset(conflict.rows):
            found.append(conflict)
            gone |= set(conflict.rows)
    in_doubt = {
        layout for layout, problem in zip(layouts, problems, strict=True) if problem.where in gone
    }
    left = [
        problem for layout, problem in zip(layouts, problems, strict=True) if layout not in in_doubt
    ]
    return left, found


def _conflicts(
    problems: Sequence[SourceProblem], keys: Sequence[str], key_name: str
) -> list[Conflict]:
    groups: dict[str, list[SourceProblem]] = {}
    for key, problem in zip(keys, problems, strict=True):
        groups.setdefault(key, []).append(problem)
    return [
        Conflict(
            key=key_name,
            labels=tuple(sorted(labels)),
            rows=tuple(problem.where for problem in group),
            problem=group[0].text,
        )
        for group in groups.values()
        if len(labels := {problem.ground_truth for problem in group}) > 1
    ]


def drop_repeats(problems: Iterable[SourceProblem]) -> list[SourceProblem]:
    """Keep the first of problems that differ in layout only."""
    first: dict[str, SourceProblem] = {}
    for problem in problems:
        first.setdefault(layout_key(problem.text), problem)
    return list(first.values())


def count_keys(problems: Iterable[SourceProblem], statistics: RowStatistics) -> None:
    """Write into `statistics` how many problems there are under the two keys."""
    texts = [problem.text for problem in problems]
    statistics.num_layout_keys = len({layout_key(text) for text in texts})
    statistics.num_ascii_keys = len({ascii_key(text) for text in texts})


def prompt_id_of(problem: SourceProblem) -> str:
    """Return the id column's value, or one that the problem alone decides."""
    if problem.source_id is not None:
        return problem.source_id
    return hashlib.sha256(layout_key(problem.text).encode("utf-8")).hexdigest()[:16]


def _digest(text: str) -> bytes:
    # 16 bytes: rows by the million stay small, and a collision is out of reach.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
