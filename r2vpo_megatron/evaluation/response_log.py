"""Every response of an evaluation on disk, from the moment it is judged.

    FOLDER/settings.json             what the evaluation is, written before the first response
    FOLDER/responses/BENCHMARK.jsonl one line a response, in the order of completion
    FOLDER/seconds.jsonl             wall time of each chunk of work, by benchmark

A killed evaluation leaves at most one torn line, at the end of a file; it is cut off when the
evaluation is gone on with.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.durable import synchronize_one
from r2vpo_megatron.evaluation.response import ResponseRecord

SETTINGS_FILE = "settings.json"
RESPONSES_FOLDER = "responses"
SECONDS_FILE = "seconds.jsonl"
LOCK_FILE = ".evaluation.lock"
_TEMPORARY = f".{SETTINGS_FILE}.tmp"

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "problem_id": (str,),
    "sample_index": (int,),
    "seed": (int,),
    "num_tokens": (int,),
    "finish_reason": (str,),
    "acc": (bool,),
    "pred": (str, type(None)),
    "parsed": (bool,),
    "failure": (str,),
    "text": (str,),
}


class ResponseLog:
    """The responses of one evaluation.

    Args:
        folder: of the evaluation; `begin` or `go_on` must have prepared it.
        model: what each line says of the model, its name or id.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder / RESPONSES_FOLDER
        self._seconds_path = folder / SECONDS_FILE
        self._model = model

    def path(self, benchmark: str) -> Path:
        """The file of a benchmark's responses."""
        return self._folder / f"{benchmark}.jsonl"

    def append(self, benchmark: str, records: Sequence[ResponseRecord]) -> None:
        """Write responses; on return they outlast a kill and a loss of power.

        Raises:
            OSError: the disk is full or failed.
        """
        if not records:
            return
        lines = [
            # ASCII: text that a tokenizer cut inside a character must not break the file.
            json.dumps({"benchmark": benchmark, "model": self._model, **asdict(record)})
            for record in records
        ]
        self._folder.mkdir(exist_ok=True)
        _append_lines(self.path(benchmark), lines)

    def append_seconds(self, seconds: Mapping[str, float]) -> None:
        """Write the wall time that went into responses just appended, by benchmark.

        Raises:
            OSError: the disk is full or failed.
        """
        _append_lines(self._seconds_path, [json.dumps(dict(seconds))])

    def load_seconds(self) -> dict[str, float]:
        """Wall time of each benchmark so far, in seconds.

        Raises:
            ValueError: a line is no such record; names file and line.
        """
        totals: dict[str, float] = {}
        if not self._seconds_path.exists():
            return totals
        _cut_torn_line(self._seconds_path)
        with self._seconds_path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    for name, seconds in json.loads(line).items():
                        if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
                            raise ValueError(f"{name}: {seconds!r}")
                        totals[name] = totals.get(name, 0.0) + seconds
                except (ValueError, AttributeError) as error:
                    raise ValueError(
                        f"{self._seconds_path}:{number}: {error}; valid: seconds by benchmark"
                    ) from None
        return totals

    def read(self, benchmark: str) -> Iterator[ResponseRecord]:
        """Read what there is of a benchmark, without a torn last line, which is cut off the file.

        Raises:
            ValueError: a line is no response, or a sample is there twice; names file and line.
        """
        path = self.path(benchmark)
        if not path.exists():
            return
        _cut_torn_line(path)
        line_of: dict[tuple[str, int], int] = {}
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parse_line(line, f"{path}:{number}", benchmark)
                key = (record.problem_id, record.sample_index)
                if key in line_of:
                    raise ValueError(
                        f"{path}:{number}: sample {record.sample_index} of problem "
                        f"{record.problem_id!r} is also in line {line_of[key]}; valid: once"
                    )
                line_of[key] = number
                yield record


def is_free(folder: Path) -> bool:
    """Whether a folder is missing or empty; what a kill left before settings.json is nothing."""
    if not folder.exists():
        return True
    leftovers = (LOCK_FILE, _TEMPORARY)
    return folder.is_dir() and all(path.name in leftovers for path in folder.iterdir())


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a new evaluation and write its settings.json, before any response.

    Args:
        folder: must not exist, or be empty.
        settings: JSON types; `deciding` within it is what `go_on` compares.

    Raises:
        ValueError: there is something in it.
    """
    if not is_free(folder):
        hint = (
            "; --resume goes on with the evaluation in it"
            if (folder / SETTINGS_FILE).is_file()
            else ""
        )
        raise ValueError(f"--output {folder}: exists and is not empty; name a new one{hint}")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / _TEMPORARY
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(dict(settings), file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SETTINGS_FILE)
    synchronize_one(folder)


def go_on(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the evaluation in a folder is the one that is asked for.

    Args:
        folder: of an evaluation that `begin` has begun.
        settings: as `begin` would take them.

    Raises:
        ValueError: there is none, or what decides its responses differs; lists every difference.
    """
    path = folder / SETTINGS_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        decided = before["deciding"]
        items = dict(decided)
    except FileNotFoundError:
        raise ValueError(
            f"--resume: there is no evaluation in {folder} ({SETTINGS_FILE} is missing); valid: "
            "the --output of one that was begun"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of an evaluation: {error}") from error
    now = json.loads(json.dumps(settings["deciding"]))  # tuples become lists, as in the file
    differences = [
        f"{name}: {_show(items, name)} there, {_show(now, name)} here"
        for name in [*items, *(name for name in now if name not in items)]
        if items.get(name) != now.get(name) or (name in items) != (name in now)
    ]
    if differences:
        raise ValueError(
            f"--resume: {folder} holds an evaluation with other settings: "
            f"{'; '.join(differences)}. Valid: the same, or a new --output"
        )


def _append_lines(path: Path, lines: Sequence[str]) -> None:
    is_new = not path.exists()
    with path.open("ab") as file:
        file.write(("\n".join(lines) + "\n").encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        synchronize_one(path.parent)


def _show(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"


def _cut_torn_line(path: Path) -> None:
    """Only whole lines end with a newline."""
    content_end = path.stat().st_size
    with path.open("rb+") as file:
        position, end = content_end, 0
        while position > 0:  # from the back: a file may be larger than memory
            start = max(0, position - (1 << 16))
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            position = start
        if end < content_end:
            file.truncate(end)
            os.fsync(file.fileno())


def _parse_line(line: bytes, where: str, benchmark: str) -> ResponseRecord:
    try:
        row = json.loads(line)
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{where}: not JSON: {error}; valid: a response as written here") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}; valid: an object")
    if row.get("benchmark") != benchmark:
        raise ValueError(f"{where}: field benchmark: {row.get('benchmark')!r}; valid: {benchmark}")
    for name, types in _FIELD_TYPES.items():
        value = row.get(name, ...)
        # bool is an int to isinstance.
        if type(value) not in types:
            given = "missing" if value is ... else repr(value)[:60]
            names = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{where}: field {name}: {given}; valid: {names}")
    return ResponseRecord(**{field.name: row[field.name] for field in fields(ResponseRecord)})
