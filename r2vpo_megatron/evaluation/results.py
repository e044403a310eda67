"""The outcome of an evaluation as results.json and results.md, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r2vpo_megatron.evaluation.json_fields import decode, refuse_constant
from r2vpo_megatron.evaluation.results_markdown import format_markdown
from r2vpo_megatron.evaluation.scores import BenchmarkScores

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
MARKDOWN_FILE = "results.md"


@dataclass(frozen=True)
class EvaluatedModel:
    """What was evaluated.

    Attributes:
        name: as tables print it, by default.
        path: as the user named it: folder, hub id or run.
        checkpoint: which weights of it: "hf", "iteration 200", a revision; "" without a choice.
        base: name of the model that training started from; "" where the model is one itself.
        fingerprint: hash of the weights or of what identifies them; "" if not taken.
    """

    name: str
    path: str
    checkpoint: str = ""
    base: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class RecordedSettings:
    """How responses were sampled and judged. Two results compare where all but `seed` are equal.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus of the sampling distribution.
        num_samples: responses to a problem.
        max_response_tokens: length limit of a response.
        prompt_template: words around the problem, a key of `data.templates.PROMPT_TEMPLATES`.
        chat_template: turn markers around the message, a key of `data.chat.CHAT_TEMPLATES`.
        thinking: mode asked of the model; "" for its default.
        grader: reward that judged.
        seed: of the first response; the others follow from it.
        limit: problems of each benchmark that were used; None for all.
        system: system message; "" for none.
        dtype: of the weights that sampled; "" if not recorded.
    """

    temperature: float
    top_p: float
    num_samples: int
    max_response_tokens: int
    prompt_template: str
    chat_template: str
    thinking: str
    grader: str
    seed: int
    limit: int | None = None
    system: str = ""
    dtype: str = ""


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's part.

    Attributes:
        title: as tables print it.
        source: file or data set that the problems came from.
        licence: of the data set.
        problems_sha256: `BenchmarkData.sha256`; "" if not taken.
        notes: what reading the benchmark changed.
        wall_time_seconds: sampling and judging; what an earlier, interrupted attempt took counts.
        scores: what came out.
    """

    title: str
    source: str
    licence: str
    problems_sha256: str
    notes: tuple[str, ...]
    wall_time_seconds: float
    scores: BenchmarkScores

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second of wall time; 0 where no time was taken."""
        return _ratio(self.scores.num_response_tokens, self.wall_time_seconds)


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation of one model.

    Attributes:
        model: what was evaluated.
        settings: how.
        benchmarks: name -> result, in the order they were asked for.
        wall_time_seconds: of it all, start-up of the engines included.
        provenance: `observability.collect_provenance()` and what else tells where it came from.
    """

    model: EvaluatedModel
    settings: RecordedSettings
    benchmarks: dict[str, BenchmarkResult]
    wall_time_seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """Mean Pass@1 over the benchmarks, each of the same weight."""
        return mean_of([result.scores.pass_at_1 for result in self.benchmarks.values()])

    @property
    def average_error(self) -> float | None:
        """Standard error of `average`; None where a benchmark has none."""
        return error_of_mean([result.scores.standard_error for result in self.benchmarks.values()])

    @property
    def num_response_tokens(self) -> int:
        """Tokens of all responses."""
        return sum(result.scores.num_response_tokens for result in self.benchmarks.values())

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second of wall time; 0 where no time was taken."""
        return _ratio(self.num_response_tokens, self.wall_time_seconds)


def mean_of(values: list[float]) -> float:
    """Mean of at least one value."""
    return math.fsum(values) / len(values)


def error_of_mean(errors: list[float | None]) -> float | None:
    """Standard error of the mean of independent estimates: sqrt(sum e^2) / their number."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(math.fsum(error**2 for error in known)) / len(known)


def write_results(folder: Path, result: EvaluationResult) -> Path:
    """Write `folder/results.md` and, last, `folder/results.json`; old ones are replaced whole.

    Args:
        folder: Made if missing.

    Returns:
        Path of results.json.

    Raises:
        ValueError: the result has no benchmarks or holds a number that is not finite.
    """
    if not result.benchmarks:
        raise ValueError(f"{folder}: the result has no benchmarks; valid: at least one")
    content = {
        "schema_version": SCHEMA_VERSION,
        "average": result.average,
        "average_error": result.average_error,
        "tokens_per_second": result.tokens_per_second,
        **dataclasses.asdict(result),
    }
    # ASCII: a path that is not UTF-8 must not break the file at the end of a long evaluation.
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MARKDOWN_FILE, format_markdown(result))
    path = folder / RESULTS_FILE
    write_whole(path, text)
    return path


def read_results(path: Path) -> EvaluationResult:
    """Read a results.json, or the one in a folder.

    Raises:
        ValueError: no such file, no JSON, another schema version, a field that is missing,
            unknown, of another type or out of range, or numbers that contradict each other. The
            message names file and field.
    """
    if path.is_dir():
        path = path / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"{path}: no such file; valid: a {RESULTS_FILE} or a folder with one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}; valid: an object")
    version = content.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: field schema_version: {version!r}; valid: {SCHEMA_VERSION}")
    for derived in ("average", "average_error", "tokens_per_second"):
        content.pop(derived, None)
    result = decode(EvaluationResult, content, str(path), "")
    assert isinstance(result, EvaluationResult)
    if not result.benchmarks:
        raise ValueError(f"{path}: field benchmarks: empty; valid: at least one benchmark")
    for name, benchmark in result.benchmarks.items():
        _check_scores(benchmark.scores, f"{path}: field benchmarks.{name}.scores")
    return result


def _check_scores(scores: BenchmarkScores, where: str) -> None:
    """Refuse what was edited by hand or cut: fractions outside 0..1, means that do not fit."""
    fractions: Mapping[str, float] = {
        "pass_at_1": scores.pass_at_1,
        "truncated_fraction": scores.truncated_fraction,
        "unparsed_fraction": scores.unparsed_fraction,
        **{f"pass_at_k.{k}": value for k, value in scores.pass_at_k.items()},
        **{f"majority_at_k.{k}": value for k, value in scores.majority_at_k.items()},
        **{f"problem_means.{name}": value for name, value in scores.problem_means.items()},
    }
    for name, value in fractions.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{where}.{name}: {value}; valid: 0 to 1")
    if scores.standard_error is not None and scores.standard_error < 0:
        raise ValueError(f"{where}.standard_error: {scores.standard_error}; valid: 0 or more")
    if scores.num_samples < 1:
        raise ValueError(f"{where}.num_samples: {scores.num_samples}; valid: at least 1")
    if len(scores.problem_means) != scores.num_problems or scores.num_problems < 1:
        raise ValueError(
            f"{where}.num_problems: {scores.num_problems}, but problem_means has "
            f"{len(scores.problem_means)} problems; valid: the same number, at least 1"
        )
    mean = mean_of(list(scores.problem_means.values()))
    if abs(mean - scores.pass_at_1) > 1e-9:
        raise ValueError(
            f"{where}.pass_at_1: {scores.pass_at_1}, but the mean of problem_means is {mean}"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and give it its own at the end.

    Raises:
        OSError: the disk is full or failed; an old file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _ratio(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
