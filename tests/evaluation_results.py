"""Results of evaluations that never took place, from verdicts."""

from __future__ import annotations

from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.evaluation.results import (
    BenchmarkResult,
    EvaluatedModel,
    EvaluationResult,
    RecordedSettings,
)
from r2vpo_megatron.evaluation.scores import summarize


def make_result(**accuracies: list[list[bool]]) -> EvaluationResult:
    """A result with these verdicts: benchmark -> problem -> sample."""
    benchmarks = {}
    for name, problems in accuracies.items():
        records = [
            ResponseRecord(f"p{number}", index, 0, 10, "stop", acc, "1", True, "", "text")
            for number, row in enumerate(problems)
            for index, acc in enumerate(row)
        ]
        benchmarks[name] = BenchmarkResult(
            title=name.upper(),
            source=f"{name}.jsonl",
            licence="MIT",
            problems_sha256="ab" * 32,
            notes=(),
            wall_time_seconds=4.0,
            scores=summarize(records, len(problems[0])),
        )
    return EvaluationResult(
        model=EvaluatedModel("tiny", "models/tiny"),
        settings=RecordedSettings(0.6, 0.95, 2, 512, "dapo", "model", "", "math_dapo", 0),
        benchmarks=benchmarks,
        wall_time_seconds=8.0,
        provenance={"python": "3.11", "packages": {"vllm": "0.32"}, "command": ["a", "b|c"]},
    )
