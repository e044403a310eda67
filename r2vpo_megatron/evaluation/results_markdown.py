"""results.md: what an evaluation found, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from r2vpo_megatron.evaluation.markdown import markdown_table

if TYPE_CHECKING:
    from r2vpo_megatron.evaluation.results import BenchmarkResult, EvaluationResult


def format_markdown(result: EvaluationResult) -> str:
    """The whole page."""
    model, settings = result.model, result.settings
    blocks = [
        f"# {model.name}",
        markdown_table(
            ["What", "Value"],
            [
                ["path", model.path],
                ["checkpoint", model.checkpoint or "-"],
                ["trained from", model.base or "-"],
                ["temperature, top-p", f"{settings.temperature:g}, {settings.top_p:g}"],
                ["samples a problem", str(settings.num_samples)],
                ["longest response", f"{settings.max_response_tokens} tokens"],
                ["prompt template", settings.prompt_template],
                [
                    "chat template, thinking",
                    f"{settings.chat_template}, {settings.thinking or '-'}",
                ],
                ["system message", settings.system or "-"],
                ["grader", settings.grader],
                ["weights in", settings.dtype or "-"],
                ["seed", str(settings.seed)],
                [
                    "problems",
                    "all" if settings.limit is None else f"first {settings.limit} of each",
                ],
                ["wall time", f"{result.wall_time_seconds:.0f} s"],
                ["speed", f"{result.tokens_per_second:.0f} response tokens/s"],
            ],
        ),
        "Percent. SE: standard error, clustered by problem. Interval: 95%.",
        _score_table(result),
        "Pass@k: a right response among k. maj@k: the vote of k responses is right.",
        _k_table(result.benchmarks, "pass@", "pass_at_k"),
        _k_table(result.benchmarks, "maj@", "majority_at_k"),
        "Responses: lengths in tokens; cut off: stopped by the length limit; no answer: none was "
        "found in it; given up: by the grader, with the reason.",
        _response_table(result.benchmarks),
    ]
    notes = [
        f"- {benchmark.title}: {note}"
        for benchmark in result.benchmarks.values()
        for note in benchmark.notes
    ]
    if notes:
        blocks.append("\n".join(notes))
    blocks.append(_format_provenance(result.provenance))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _score_table(result: EvaluationResult) -> str:
    rows = []
    for benchmark in result.benchmarks.values():
        scores = benchmark.scores
        interval = scores.interval
        rows.append(
            [
                benchmark.title,
                str(scores.num_problems),
                f"{100 * scores.pass_at_1:.1f}",
                "-" if scores.standard_error is None else f"{100 * scores.standard_error:.1f}",
                "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
                benchmark.source,
                benchmark.licence,
            ]
        )
    error = result.average_error
    shown_error = "-" if error is None else f"{100 * error:.1f}"
    rows.append(["Average", "", f"{100 * result.average:.1f}", shown_error, "", "", ""])
    header = ["Benchmark", "Problems", "Pass@1", "SE", "Interval", "Source", "Licence"]
    return markdown_table(header, rows)


def _k_table(benchmarks: Mapping[str, BenchmarkResult], label: str, field: str) -> str:
    ks = sorted({k for result in benchmarks.values() for k in getattr(result.scores, field)})
    rows = []
    for result in benchmarks.values():
        values: Mapping[int, float] = getattr(result.scores, field)
        shown = [f"{100 * values[k]:.1f}" if k in values else "-" for k in ks]
        rows.append([result.title, *shown])
    return markdown_table(["Benchmark", *(f"{label}{k}" for k in ks)], rows)


def _response_table(benchmarks: Mapping[str, BenchmarkResult]) -> str:
    rows: list[Sequence[str]] = []
    for result in benchmarks.values():
        scores = result.scores
        tokens = scores.response_tokens
        failures = ", ".join(f"{count} {name}" for name, count in scores.grader_failures.items())
        rows.append(
            [
                result.title,
                str(scores.num_problems * scores.num_samples),
                f"{tokens.mean:.0f}",
                f"{tokens.median:.0f}",
                f"{tokens.p95:.0f}",
                str(tokens.max),
                f"{100 * scores.truncated_fraction:.1f}",
                f"{100 * scores.unparsed_fraction:.1f}",
                failures or "0",
                f"{result.tokens_per_second:.0f}",
            ]
        )
    header = ["Benchmark", "Responses", "Mean", "Median", "p95", "Max", "Cut off %"]
    return markdown_table([*header, "No answer %", "Given up", "Tokens/s"], rows)


def _format_provenance(provenance: Mapping[str, Any]) -> str:
    """The scalar facts and the packages; the rest is in results.json."""
    rows: list[list[str]] = []
    for name, value in provenance.items():
        if isinstance(value, Mapping):
            rows += [[f"{name}: {inner}", str(content)] for inner, content in value.items()]
        elif isinstance(value, (list, tuple)):
            rows.append([name, " ".join(str(item) for item in value)])
        else:
            rows.append([name, str(value)])
    return markdown_table(["Made with", ""], rows) if rows else ""
