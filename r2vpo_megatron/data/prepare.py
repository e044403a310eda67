"""From a data set as it is published to prompts to train on, every step counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2vpo_megatron.data.deduplication import (
    Conflict,
    ExactFilter,
    RowStatistics,
    count_keys,
    drop_conflicts,
    drop_repeats,
    prompt_id_of,
)
from r2vpo_megatron.data.language import LANGUAGES, detect_language
from r2vpo_megatron.data.overlap import EvaluationOverlap, find_overlap, read_evaluation_problems
from r2vpo_megatron.data.prepared_file import check_output, file_sha256, write_prepared
from r2vpo_megatron.data.problem_keys import CONFLICT_KEYS
from r2vpo_megatron.data.sources import SOURCES, SourceOptions, SourceProblem, read_problems
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES

if TYPE_CHECKING:
    from r2vpo_megatron.data.chat import ChatTokenizer

_ROWS_PER_REPORT = 1000
OVERLAP_KINDS = ("none", "exact", "prefix")
_PACKAGES = ("r2vpo-megatron", "pyarrow", "datasets", "transformers")


@dataclass(frozen=True)
class PrepareOptions:
    """How to prepare a data set.

    Attributes:
        source: What to read.
        output: The .parquet file to write.
        template: Key of `PROMPT_TEMPLATES`, put around every problem.
        language: "en", "zh" or "all".
        conflict_key: Key of `CONFLICT_KEYS`; "" takes the source's own.
        tokenizer: Model folder to count tokens with; None: they are not counted.
        max_prompt_tokens: Longer prompts are left out; None: any length.
        chat_template, thinking: As `ChatTokenizer` takes them.
        evaluation_files: Name -> file of each set to compare with.
        drop_overlap: Which shared problems to leave out: "none", "exact" or "prefix".
        overwrite: Replace the output where it exists.
    """

    source: SourceOptions
    output: Path
    template: str = "dapo"
    language: str = "all"
    conflict_key: str = ""
    tokenizer: Path | None = None
    max_prompt_tokens: int | None = None
    chat_template: str = "model"
    thinking: str = ""
    evaluation_files: Mapping[str, Path] = field(default_factory=dict)
    drop_overlap: str = "none"
    overwrite: bool = False

    def validate(self) -> None:
        """Check what can be checked before anything is read.

        Raises:
            ValueError: Names the option, its value and what is valid.
        """
        conflict_keys = ("", *CONFLICT_KEYS)
        for name, value, valid in (
            ("template", self.template, tuple(PROMPT_TEMPLATES)),
            ("language", self.language, LANGUAGES),
            ("conflict-key", self.conflict_key, conflict_keys),
            ("drop-overlap", self.drop_overlap, OVERLAP_KINDS),
        ):
            if value not in valid:
                raise ValueError(f"--{name} {value}: valid: {', '.join(filter(None, valid))}")
        for name, is_given in (
            ("max-prompt-tokens", self.max_prompt_tokens is not None),
            ("chat-template", self.chat_template != "model"),
            ("thinking", self.thinking != ""),
        ):
            if is_given and self.tokenizer is None:
                raise ValueError(f"--{name}: needs --tokenizer MODEL_DIR to count with")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise ValueError(f"--max-prompt-tokens {self.max_prompt_tokens}: valid: 1 or more")
        if self.drop_overlap != "none" and not self.evaluation_files:
            raise ValueError("--drop-overlap: needs --evaluation-files to compare with")
        _, path = self.source.resolved()
        inputs = [*([path] if path else []), *self.evaluation_files.values()]
        check_output(self.output, inputs, self.overwrite)


@dataclass(frozen=True)
class Step:
    """One step: its name, and how many problems it took away."""

    name: str
    num_removed: int
    num_left: int


@dataclass
class Prepared:
    """A data set, prepared.

    Attributes:
        rows: What the output file holds.
        statistics: Of the rows as they were read.
        steps: In order.
        conflicts: Groups that were dropped for their labels.
        overlaps: One for each evaluation set; indices into `rows` as they were before any overlap
            was dropped.
        overlap_ids: Prompt id of every such index.
    """

    rows: list[dict[str, Any]]
    statistics: RowStatistics
    steps: list[Step]
    conflicts: list[Conflict]
    overlaps: list[EvaluationOverlap]
    overlap_ids: list[str]


def prepare(options: PrepareOptions, on_rows: Callable[[int], None] = lambda _: None) -> Prepared:
    """Carry out every step but writing.

    Args:
        options: What to do.
        on_rows: Called now and then with the number of rows read so far.

    Raises:
        ValueError: An option, the source, the tokenizer or an evaluation file is at fault, or
            nothing is left.
    """
    options.validate()
    # First what may fail, then the long reading.
    tokenizer = None
    if options.tokenizer is not None:
        # Loads transformers: seconds, and half a gigabyte that counting rows does not need.
        from r2vpo_megatron.data.chat import ChatTokenizer

        tokenizer = ChatTokenizer(options.tokenizer, options.chat_template, options.thinking)
    evaluation = {
        name: read_evaluation_problems(path) for name, path in options.evaluation_files.items()
    }
    counted = _StepCounter()
    exact = ExactFilter()
    problems = []
    for problem in read_problems(options.source):
        if exact.statistics.num_rows % _ROWS_PER_REPORT == 0:
            on_rows(exact.statistics.num_rows)
        if exact.is_new(problem):
            problems.append(problem)
    statistics = exact.statistics
    counted.start(statistics.num_rows)
    counted.add("identical rows", problems)
    count_keys(problems, statistics)
    conflict_key = options.conflict_key or SOURCES[options.source.source].conflict_key
    problems, conflicts = drop_conflicts(problems, conflict_key)
    counted.add(f"conflicting labels ({conflict_key} key)", problems)
    problems = drop_repeats(problems)
    counted.add("same problem in another layout", problems)
    rows = [_make_row(problem, options.template) for problem in problems]
    if options.language != "all":
        rows = [row for row in rows if row["language"] == options.language]
        counted.add(f"language other than {options.language}", rows)
    rows = _count_tokens(rows, tokenizer, options.max_prompt_tokens)
    if options.max_prompt_tokens is not None:
        counted.add(f"longer than {options.max_prompt_tokens:,} tokens", rows)
    ids = [row["prompt_id"] for row in rows]
    texts = [row["problem"] for row in rows]
    overlaps = [find_overlap(name, evaluation[name], texts) for name in evaluation]
    rows = _drop_overlap(rows, overlaps, options.drop_overlap)
    if options.drop_overlap != "none":
        counted.add(f"in an evaluation set ({options.drop_overlap})", rows)
    if not rows:
        steps = "; ".join(f"{step.name}: {step.num_removed:,}" for step in counted.steps)
        raise ValueError(f"no problem is left of {statistics.num_rows:,} rows; removed: {steps}")
    return Prepared(rows, statistics, counted.steps, conflicts, overlaps, ids)


def write(options: PrepareOptions, prepared: Prepared) -> dict[str, Any]:
    """Write what was prepared, and its manifest beside it.

    Returns:
        The manifest.
    """
    return write_prepared(options.output, prepared.rows, _manifest(options, prepared))


class _StepCounter:
    """Steps, each counted against what the one before left."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._num_left = 0

    def start(self, num_rows: int) -> None:
        self._num_left = num_rows

    def add(self, name: str, left: Sequence[object]) -> None:
        self.steps.append(Step(name, self._num_left - len(left), len(left)))
        self._num_left = len(left)


def _make_row(problem: SourceProblem, template: str) -> dict[str, Any]:
    message = PROMPT_TEMPLATES[template].apply(problem.text)
    return {
        "prompt_id": prompt_id_of(problem),
        "prompt": [{"role": "user", "content": message}],
        "ground_truth": problem.ground_truth,
        "problem": problem.text,
        "data_source": problem.data_source,
        "language": detect_language(problem.text),
    }


def _count_tokens(
    rows: list[dict[str, Any]], tokenizer: ChatTokenizer | None, max_tokens: int | None
) -> list[dict[str, Any]]:
    if tokenizer is None:
        return rows
    counted = [{**row, "num_tokens": len(tokenizer.encode_prompt(row["prompt"]))} for row in rows]
    return [row for row in counted if max_tokens is None or row["num_tokens"] <= max_tokens]


def _drop_overlap(
    rows: list[dict[str, Any]], overlaps: Sequence[EvaluationOverlap], kind: str
) -> list[dict[str, Any]]:
    if kind == "none":
        return rows
    pairs = [
        pair for found in overlaps for pair in (found.exact if kind == "exact" else found.prefix)
    ]
    shared = {index for _, index in pairs}
    return [row for index, row in enumerate(rows) if index not in shared]


def _manifest(options: PrepareOptions, prepared: Prepared) -> dict[str, Any]:
    """No time and no machine: the same input gives the same manifest."""
    location, path = options.source.resolved()
    read = {"source": options.source.source, "location": location}
    if path is not None:
        read["sha256"] = file_sha256(path)
    else:
        read |= {
            "split": options.source.split,
            "config": options.source.config_name,
            "revision": options.source.revision or "main",
        }
    ids = prepared.overlap_ids
    return {
        "format_version": 1,
        "packages": _package_versions(),
        "input": read,
        "options": {
            "problem_column": options.source.problem_column,
            "answer_column": options.source.answer_column,
            "id_column": options.source.id_column,
            "language": options.language,
            "max_prompt_tokens": options.max_prompt_tokens,
            "tokenizer": str(options.tokenizer) if options.tokenizer else None,
            "chat_template": options.chat_template,
            "thinking": options.thinking,
            "drop_overlap": options.drop_overlap,
        },
        "template": asdict(PROMPT_TEMPLATES[options.template]),
        "counts": asdict(prepared.statistics),
        "steps": [asdict(step) for step in prepared.steps],
        "conflicts": [asdict(conflict) for conflict in prepared.conflicts],
        "evaluation": {
            found.name: {
                "file": str(options.evaluation_files[found.name]),
                "sha256": file_sha256(options.evaluation_files[found.name]),
                "num_problems": found.num_problems,
                "num_exact": found.num_exact,
                "num_prefix": found.num_prefix,
                "exact": [{"row": row, "prompt_id": ids[index]} for row, index in found.exact],
                "prefix": [{"row": row, "prompt_id": ids[index]} for row, index in found.prefix],
            }
            for found in prepared.overlaps
        },
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
