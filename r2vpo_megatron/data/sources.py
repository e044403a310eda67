"""Where problems come from, and how each source spells them: table `SOURCES`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r2vpo_megatron.data.gold_answers import canonical_gold, gsm8k_gold, is_worked_solution
from r2vpo_megatron.data.hub import read_hub_rows
from r2vpo_megatron.data.row_fields import (
    ANSWER_VALUES,
    answer_text,
    check_encodable,
    field_error,
    get_field,
    get_text,
)
from r2vpo_megatron.data.row_files import read_rows
from r2vpo_megatron.data.templates import take_off_templates

PROBLEM_COLUMNS = ("problem", "question", "prompt", "messages")
_FILE_TYPES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """One kind of source.

    Attributes:
        name: Its key in `SOURCES`.
        hub_id: Data set on the hub where no path is given; "" where there is no such.
        config_name: Configuration of that data set.
        problem_columns: Where the problem may be; the first that a row has is taken.
        answer_columns: Likewise the answer.
        answer_form: "worked": a solution that ends with `#### answer`; "bare": the answer alone.
        conflict_key: Key of `CONFLICT_KEYS` under which labels are compared.
    """

    name: str
    hub_id: str = ""
    config_name: str | None = None
    problem_columns: tuple[str, ...] = PROBLEM_COLUMNS
    answer_columns: tuple[str, ...] = ("answer", "ground_truth", "reward_model.ground_truth")
    answer_form: Literal["bare", "worked"] = "bare"
    conflict_key: Literal["letters", "ascii"] = "letters"


SOURCES: dict[str, Source] = {
    "dapo-math-17k": Source(
        name="dapo-math-17k",
        hub_id="BytedTsinghua-SIA/DAPO-Math-17k",
        problem_columns=("prompt",),
        answer_columns=("reward_model.ground_truth", "ground_truth"),
        # Its Chinese problems come reworded; this key meets them.
        conflict_key="ascii",
    ),
    "gsm8k": Source(
        name="gsm8k",
        hub_id="openai/gsm8k",
        config_name="main",
        problem_columns=("question",),
        answer_columns=("answer",),
        answer_form="worked",
    ),
    "jsonl": Source(name="jsonl"),
    "parquet": Source(name="parquet"),
}


@dataclass(frozen=True)
class SourceProblem:
    """One row of a source.

    Attributes:
        message: The problem column's text, as it stands there.
        text: The bare problem, no prompt template around it.
        ground_truth: Its answer, integers in their plain spelling.
        where: The file and row it came from.
        source_id: What the id column says; None where none was asked for.
        data_source: Name of the data set.
        template: Name of the prompt template that was taken off, the outer of two.
    """

    message: str
    text: str
    ground_truth: str
    where: str
    source_id: str | None
    data_source: str
    template: str


@dataclass(frozen=True)
class SourceOptions:
    """What to read.

    Attributes:
        source: Key of `SOURCES`.
        location: File, folder or hub id; "": the source's own place on the hub.
        split: Of a data set on the hub.
        config_name: Of a data set on the hub; "": the source's own where it is at its own place.
        revision: Of a data set on the hub: branch, tag or commit.
        problem_column, answer_column, id_column: Dotted names; "" takes the source's own, or makes
            ids from the problems.
    """

    source: str
    location: str = ""
    split: str = "train"
    config_name: str = ""
    revision: str | None = None
    problem_column: str = ""
    answer_column: str = ""
    id_column: str = ""

    def resolved(self) -> tuple[str, Path | None]:
        """Return the location, and its path where it is a file.

        Raises:
            ValueError: The source is unknown, no location is known, there is no such file, or it is
                one and something within a data set of the hub is asked for.
        """
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r}; valid: {', '.join(SOURCES)}")
        location = self.location or SOURCES[self.source].hub_id
        if not location:
            raise ValueError(
                f"source {self.source}: no location; valid: a file, or a hub id owner/name"
            )
        path = Path(location)
        # A folder may be called anything, and is read as a copy of a hub data set.
        if path.is_file() or (path.suffix in _FILE_TYPES and not path.is_dir()):
            if not path.is_file():
                raise ValueError(f"{path}: no such file")
            required = f".{self.source}"
            if required in _FILE_TYPES and path.suffix != required:
                raise ValueError(
                    f"{path}: source {self.source} reads {required}; valid: --source "
                    f"{path.suffix.removeprefix('.')}"
                )
            self._refuse_hub_options(path)
            return location, path
        return location, None

    def _refuse_hub_options(self, path: Path) -> None:
        for name, value, default in (
            ("split", self.split, "train"),
            ("config", self.config_name, ""),
            ("revision", self.revision or "", ""),
        ):
            if value != default:
                raise ValueError(
                    f"--{name} {value}: {path} is one file, read whole; valid: --{name} with a "
                    "data set of the hub"
                )


def read_problems(options: SourceOptions) -> Iterator[SourceProblem]:
    """Yield every problem of a source, in its order; memory stays bounded.

    Raises:
        ValueError: The source cannot be read or a row is no problem with an answer; names the file,
            the row and the column.
    """
    location, path = options.resolved()
    source = SOURCES[options.source]
    if path is not None:
        rows = read_rows(path)
        stem = path.stem
    else:
        own = source.config_name if location == source.hub_id else None
        config_name = options.config_name or own
        rows = read_hub_rows(location, options.split, config_name, options.revision)
        stem = Path(location).name
    problem_columns = _columns(options.problem_column, source.problem_columns)
    answer_columns = _columns(options.answer_column, source.answer_columns)
    for number, row in rows:
        where = f"{location}:{number}"
        message = problem_text(row, where, problem_columns)
        text, template = take_off_templates(message)
        if not text:
            raise field_error(where, "/".join(problem_columns), message, "a problem")
        check_encodable(text, where, "/".join(problem_columns))
        yield SourceProblem(
            message=message,
            text=text,
            ground_truth=_ground_truth(row, where, answer_columns, source.answer_form),
            where=where,
            source_id=_source_id(row, where, options.id_column),
            data_source=_data_source(row, source, stem),
            template=template,
        )


def problem_text(row: dict[str, Any], where: str, columns: Sequence[str] = PROBLEM_COLUMNS) -> str:
    """Return the user's text of a row: a string, or the one user message of a list.

    Args:
        row: One row.
        where: The file and row, for messages.
        columns: Where the text may be; the first that the row has.

    Raises:
        ValueError: The row has none of them, or it holds something else.
    """
    name = _first_present(row, where, columns)
    value = get_field(row, name, where)
    if not isinstance(value, list):
        return get_text(row, name, where)
    said = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise field_error(where, name, value, "a string, or a list of {role, content}")
        if message.get("role") == "user":
            said.append(str(message["content"]))
    # A conversation is no problem with one answer.
    if len(said) != 1 or not said[0].strip():
        raise field_error(where, name, value, "exactly one user message, and not an empty one")
    return said[0]


def _columns(chosen: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return (chosen,) if chosen else known


def _first_present(row: dict[str, Any], where: str, columns: Sequence[str]) -> str:
    for name in columns:
        if name in row:
            return name
        outer, dot, inner = name.partition(".")
        if dot and isinstance(row.get(outer), dict) and inner.partition(".")[0] in row[outer]:
            return name
    for name in columns:
        outer = name.partition(".")[0]
        if len(columns) == 1 or (outer in row and not isinstance(row[outer], dict)):
            get_field(row, name, where)  # raises, naming how far it got
    have = ", ".join(map(str, row)) or "none"
    raise ValueError(f"{where}: column {' or '.join(columns)}: missing; the row has: {have}")


def _ground_truth(
    row: dict[str, Any], where: str, columns: Sequence[str], form: Literal["bare", "worked"]
) -> str:
    name = _first_present(row, where, columns)
    if form == "worked":
        return gsm8k_gold(get_text(row, name, where), where, name)
    value = get_field(row, name, where)
    answer = answer_text(value)
    if answer is None:
        raise field_error(where, name, value, ANSWER_VALUES)
    check_encodable(answer, where, name)
    if is_worked_solution(answer):
        raise field_error(
            where, name, value, "the answer alone; --source gsm8k reads solutions that end in it"
        )
    return canonical_gold(answer)


def _source_id(row: dict[str, Any], where: str, column: str) -> str | None:
    if not column:
        return None
    value = get_field(row, column, where)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise field_error(where, column, value, "a non-empty string or an integer")
    check_encodable(value, where, column)
    return value


def _data_source(row: dict[str, Any], source: Source, stem: str) -> str:
    if source.hub_id:
        return source.name
    given = row.get("data_source")
    return given if isinstance(given, str) and given else stem
