"""The paper's Table 1 from results files: methods by model, benchmarks, average, improvement.

results.json ... -> ResultTable -> Markdown, CSV or LaTeX (table_formats)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r2vpo_megatron.evaluation.comparison import (
    Estimate,
    average,
    difference,
    relative_improvement,
    score_estimate,
)
from r2vpo_megatron.evaluation.paper_results import ReportedTable
from r2vpo_megatron.evaluation.results import RESULTS_FILE, EvaluationResult, read_results

# Settings that must agree among all rows, and those that a model's family decides.
COMMON_SETTINGS = (
    "temperature",
    "top_p",
    "num_samples",
    "max_response_tokens",
    "limit",
    "prompt_template",
    "grader",
)
MODEL_SETTINGS = ("chat_template", "thinking", "system", "dtype")


@dataclass(frozen=True)
class TableEntry:
    """A results file and the name of its row."""

    label: str
    path: Path
    result: EvaluationResult


@dataclass(frozen=True)
class TableRow:
    """One method. Fractions, not percent.

    Attributes:
        label: name of the method.
        is_base: what the others of the model are compared with.
        is_reported: taken from a reference table, not measured here.
        scores: benchmark -> Pass@1; a benchmark that was not evaluated is absent.
        average: over all benchmarks of the table; None where one is absent.
        differences: benchmark -> Pass@1 minus the base's.
        average_difference: of the averages.
        relative: average over the base's, minus 1.
    """

    label: str
    is_base: bool
    is_reported: bool
    scores: Mapping[str, Estimate]
    average: Estimate | None
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    average_difference: Estimate | None = None
    relative: Estimate | None = None


@dataclass(frozen=True)
class ResultTable:
    """What is printed.

    Attributes:
        titles: benchmark -> column title, in order.
        groups: model -> its rows, the base first.
        settings: how all of it was sampled, in words.
        notes: what a reader must know: differing settings, unpaired comparisons, sources.
    """

    titles: Mapping[str, str]
    groups: Mapping[str, Sequence[TableRow]]
    settings: str
    notes: tuple[str, ...]


def load_entries(paths: Sequence[Path], labels: Mapping[Path, str]) -> list[TableEntry]:
    """Read results files, and all of those in and below folders.

    Args:
        paths: Files or folders.
        labels: Row names by path, as `paths` or a found file has it; by default the
            model's, with its checkpoint where several have the same.

    Raises:
        ValueError: nothing found, a broken file, a label for a path that is not read, or two
            rows of one name.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            direct = path / RESULTS_FILE
            found = [direct] if direct.is_file() else sorted(path.rglob(RESULTS_FILE))
        if not found:
            raise ValueError(
                f"{path}: no {RESULTS_FILE} in it; valid: a file, or a folder with one"
            )
        known = {file.resolve() for file in files}
        files += [file for file in found if file.resolve() not in known]
    if not files:
        raise ValueError(f"no results given; valid: a {RESULTS_FILE} or a folder with one")
    results = {file: read_results(file) for file in files}
    names = Counter(result.model.name for result in results.values())
    by_file = {path.resolve(): label for path, label in labels.items()}
    used: set[Path] = set()
    entries = []
    for file, result in results.items():
        keys = [key for key in (file.resolve(), file.resolve().parent) if key in by_file]
        used.update(keys)
        label, checkpoint = result.model.name, result.model.checkpoint
        if names[label] > 1 and checkpoint:
            label = f"{label} ({checkpoint})"
        entries.append(TableEntry(by_file[keys[0]] if keys else label, file, result))
    unused = [str(path) for path in labels if path.resolve() not in used]
    if unused:
        raise ValueError(f"label for {unused[0]}: not among the results; valid: a path given there")
    _check_labels(entries)
    return entries


def build_table(
    entries: Sequence[TableEntry],
    *,
    bases: Sequence[str] = (),
    reference: ReportedTable | None = None,
    allow_mismatch: bool = False,
) -> ResultTable:
    """Compare results.

    Rows belong to the model that training started from. Its base row is the one named in
    `bases`, or else the only one that was not trained.

    Args:
        entries: At least one.
        bases: Labels of base rows. With one name, results that do not tell what they were trained
            from are compared with it, too.
        reference: Rows to append.
        allow_mismatch: Print a note instead of refusing results that do not compare.

    Raises:
        ValueError: results with different settings, problems or benchmarks; a base that is no
            row.
    """
    unknown = [name for name in bases if name not in {entry.label for entry in entries}]
    if unknown:
        rows = ", ".join(entry.label for entry in entries)
        raise ValueError(f"base {unknown[0]!r}: no such row; valid: {rows}")
    titles = {
        name: result.title for entry in entries for name, result in entry.result.benchmarks.items()
    }
    groups = _group(entries, bases)
    mismatches = _find_mismatches(entries, groups, list(titles))
    if mismatches and not allow_mismatch:
        raise ValueError(
            "the results do not compare: "
            + "; ".join(mismatches)
            + "; valid: results of the same settings, or --allow-mismatch for a table that says so"
        )
    notes = [f"Not comparable: {mismatch}." for mismatch in mismatches]
    rows_of: dict[str, list[TableRow]] = {}
    for model, members in groups.items():
        base = _find_base(members, bases)
        if base is None and len(members) > 1:
            notes.append(f"{model}: no base row among its results, so no improvement is given.")
        ordered = sorted(members, key=lambda entry: entry is not base)
        rows_of[model] = [_make_row(entry, base, list(titles)) for entry in ordered]
        notes += _unpaired_notes(model, rows_of[model], titles)
    if reference is not None:
        notes += _append_reported(rows_of, reference, titles)
    return ResultTable(titles, rows_of, describe_settings(entries), tuple(notes))


def describe_settings(entries: Sequence[TableEntry]) -> str:
    """The settings that all entries share, in one line."""
    shared = []
    for name in COMMON_SETTINGS:
        values = {getattr(entry.result.settings, name) for entry in entries}
        if len(values) == 1 and (value := values.pop()) is not None:
            shared.append(f"{name} {value}")
    return ", ".join(shared)


def _check_labels(entries: Sequence[TableEntry]) -> None:
    first: dict[str, Path] = {}
    for entry in entries:
        if entry.label in first:
            raise ValueError(
                f"{entry.path} and {first[entry.label]}: both rows are named {entry.label!r}; "
                "valid: --label NAME=PATH for one of them"
            )
        first[entry.label] = entry.path


def _group(entries: Sequence[TableEntry], bases: Sequence[str]) -> dict[str, list[TableEntry]]:
    groups: dict[str, list[TableEntry]] = {}
    adopted = next((_family(entry) for entry in entries if [entry.label] == list(bases)), None)
    for entry in entries:
        orphan = adopted is not None and not entry.result.model.base
        groups.setdefault(adopted if orphan and adopted else _family(entry), []).append(entry)
    return groups


def _family(entry: TableEntry) -> str:
    """The model's own name without the folder or organisation before it."""
    model = entry.result.model
    return Path(model.base or model.name).name or model.name


def _find_base(members: Sequence[TableEntry], bases: Sequence[str]) -> TableEntry | None:
    named = [entry for entry in members if entry.label in bases]
    if len(named) > 1:
        raise ValueError(
            f"bases {named[0].label!r} and {named[1].label!r} are of the same model; valid: one"
        )
    untrained = named or [entry for entry in members if not entry.result.model.base]
    return untrained[0] if len(untrained) == 1 else None


def _find_mismatches(
    entries: Sequence[TableEntry], groups: Mapping[str, Sequence[TableEntry]], names: Sequence[str]
) -> list[str]:
    found: list[str] = []
    for name in COMMON_SETTINGS:
        found += _differing(name, _read_setting(entries, name))
    for members in groups.values():
        for name in MODEL_SETTINGS:
            found += _differing(name, _read_setting(members, name))
    for name in names:
        lacking = [entry.label for entry in entries if name not in entry.result.benchmarks]
        if lacking:
            found.append(f"{name} was not evaluated for {', '.join(lacking)}")
        hashes = [
            (entry.label, entry.result.benchmarks[name].problems_sha256[:12])
            for entry in entries
            if name in entry.result.benchmarks and entry.result.benchmarks[name].problems_sha256
        ]
        found += _differing(f"problems of {name} (sha256)", hashes)
    return found


def _read_setting(entries: Sequence[TableEntry], name: str) -> list[tuple[str, object]]:
    return [(entry.label, getattr(entry.result.settings, name)) for entry in entries]


def _differing(name: str, values: Sequence[tuple[str, object]]) -> list[str]:
    """A line about the first two labels whose values differ, or nothing."""
    for label, value in values[1:]:
        if value != values[0][1]:
            return [f"{name} is {values[0][1]!r} for {values[0][0]} and {value!r} for {label}"]
    return []


def _make_row(entry: TableEntry, base: TableEntry | None, names: Sequence[str]) -> TableRow:
    results = entry.result.benchmarks
    scores = {name: score_estimate(results[name]) for name in names if name in results}
    whole = len(scores) == len(names)
    mean = average([scores[name] for name in names]) if whole else None
    if base is None or base is entry:
        return TableRow(entry.label, base is entry, False, scores, mean)
    theirs = base.result.benchmarks
    differences = {
        name: difference(results[name], theirs[name]) for name in scores if name in theirs
    }
    if not whole or len(differences) < len(names):
        return TableRow(entry.label, False, False, scores, mean, differences)
    return TableRow(
        label=entry.label,
        is_base=False,
        is_reported=False,
        scores=scores,
        average=mean,
        differences=differences,
        average_difference=average([differences[name] for name in names]),
        relative=relative_improvement(
            [results[name] for name in names], [theirs[name] for name in names]
        ),
    )


def _unpaired_notes(model: str, rows: Sequence[TableRow], titles: Mapping[str, str]) -> list[str]:
    notes = []
    for row in rows:
        unpaired = [titles[name] for name, value in row.differences.items() if not value.paired]
        if unpaired:
            notes.append(
                f"{model}, {row.label}: not the base's problems on {', '.join(unpaired)}, so the "
                "difference is not paired by problem and its interval is wider."
            )
    return notes


def _append_reported(
    rows_of: dict[str, list[TableRow]], reference: ReportedTable, titles: Mapping[str, str]
) -> list[str]:
    for reported in reference.rows:
        scores = {
            name: Estimate(percent / 100, None, 0.0)
            for name, percent in reported.percents.items()
            if name in titles
        }
        mean = None if reported.average is None else Estimate(reported.average / 100, None, 0.0)
        row = TableRow(f"{reported.method} (reported)", False, True, scores, mean)
        rows_of.setdefault(Path(reported.model).name, []).append(row)
    notes = list(reference.remarks)
    if reference.rows:
        notes.append(f"(reported): from {reference.source}; settings and grader may differ.")
    return notes
