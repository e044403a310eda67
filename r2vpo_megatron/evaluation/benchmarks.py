"""The benchmarks of the paper's Table 1 and their kin, as a table, and how their files are read.

A new benchmark is one entry of `BENCHMARKS`. A user's own file needs none: `local_benchmark`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from r2vpo_megatron.data.hub import read_hub_rows
from r2vpo_megatron.data.row_files import read_rows
from r2vpo_megatron.evaluation.answers import AnswerChecker, gold_answers_agree
from r2vpo_megatron.evaluation.problem_rows import Problem, ProblemReader

# Where the copies of these benchmarks keep the problem, its answer and its id: dotted paths, tried
# in this order on the first row. A column that may hold a worked solution stands behind the
# columns that hold the bare answer.
PROBLEM_COLUMNS = (
    "problem",
    "Problem",
    "question",
    "meta.problem",
    "extra_info.raw_problem",
    "messages[-1].content",
    "prompt[-1].content",
    "prompt",
)
ANSWER_COLUMNS = (
    "answer",
    "Answer",
    "meta.answer",
    "reward_model.ground_truth",
    "ground_truth",
    "ref_answer",
    "meta.solution",
)
ID_COLUMNS = (
    "unique_id",
    "meta.unique_id",
    "problem_id",
    "prompt_id",
    "problem_idx",
    "id",
    "ID",
    "idx",
    "extra_info.index",
)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark comes from and what it must look like.

    Attributes:
        title: as tables print it.
        hub_id: data set on the Hugging Face hub; "" where there is none.
        config_name: configuration of the data set; None where it has one only.
        split: of the data set.
        answer_form: key of `answers.ANSWER_FORMS`.
        num_problems: what the benchmark has; None where any number will do.
        licence: as the hub's data set states it, or "not stated".
        problem_columns: dotted paths of the problem text, the first one present counts.
        answer_columns: likewise, of the answer.
        id_columns: likewise, of the problem's id; without any, the row number is the id.
        foreign_ids: pattern of ids that only a sister of the benchmark has: as many problems, in
            the same columns; "" where ids do not tell.
    """

    title: str
    hub_id: str
    config_name: str | None
    split: str
    answer_form: str
    num_problems: int | None
    licence: str
    problem_columns: tuple[str, ...] = PROBLEM_COLUMNS
    answer_columns: tuple[str, ...] = ANSWER_COLUMNS
    id_columns: tuple[str, ...] = ID_COLUMNS
    foreign_ids: str = ""


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        title="AIME24",
        hub_id="HuggingFaceH4/aime_2024",
        config_name=None,
        split="train",
        answer_form="integer",
        num_problems=30,
        licence="not stated",
        foreign_ids="2025-",
    ),
    "aime25": Benchmark(
        title="AIME25",
        hub_id="math-ai/aime25",
        config_name=None,
        split="test",
        answer_form="integer",
        num_problems=30,
        licence="not stated",
        foreign_ids="2024-",
    ),
    "amc23": Benchmark(
        title="AMC23",
        hub_id="math-ai/amc23",
        config_name=None,
        split="test",
        answer_form="integer",
        num_problems=40,
        licence="not stated",
    ),
    "hmmt_feb25": Benchmark(
        title="HMMT Feb25",
        hub_id="MathArena/hmmt_feb_2025",
        config_name=None,
        split="train",
        answer_form="expression",
        num_problems=30,
        licence="CC BY-NC-SA 4.0",
    ),
    "olymmath": Benchmark(
        title="OlymMATH",
        hub_id="RUC-AIBOX/OlymMATH",
        config_name="en-hard",
        split="test",
        answer_form="expression",
        num_problems=100,
        licence="MIT",
        foreign_ids="OlymMATH-(EASY-|.*-ZH$)",
    ),
    "olymmath_en_easy": Benchmark(
        title="OlymMATH EN-EASY",
        hub_id="RUC-AIBOX/OlymMATH",
        config_name="en-easy",
        split="test",
        answer_form="expression",
        num_problems=100,
        licence="MIT",
        foreign_ids="OlymMATH-(HARD-|.*-ZH$)",
    ),
    "olymmath_zh_easy": Benchmark(
        title="OlymMATH ZH-EASY",
        hub_id="RUC-AIBOX/OlymMATH",
        config_name="zh-easy",
        split="test",
        answer_form="expression",
        num_problems=100,
        licence="MIT",
        foreign_ids="OlymMATH-(HARD-|.*-EN$)",
    ),
    "olymmath_zh_hard": Benchmark(
        title="OlymMATH ZH-HARD",
        hub_id="RUC-AIBOX/OlymMATH",
        config_name="zh-hard",
        split="test",
        answer_form="expression",
        num_problems=100,
        licence="MIT",
        foreign_ids="OlymMATH-(EASY-|.*-EN$)",
    ),
    "gsm8k": Benchmark(
        title="GSM8K",
        hub_id="openai/gsm8k",
        config_name="main",
        split="test",
        answer_form="gsm8k",
        num_problems=1319,
        licence="MIT",
    ),
    "math500": Benchmark(
        title="MATH-500",
        hub_id="HuggingFaceH4/MATH-500",
        config_name=None,
        split="test",
        answer_form="expression",
        num_problems=500,
        licence="not stated",
    ),
}


@dataclass(frozen=True)
class BenchmarkData:
    """A benchmark as it was read.

    Attributes:
        name: key of `BENCHMARKS`, or the user's own name.
        benchmark: its entry.
        source: the file, or the hub id with configuration and split.
        problems: in the order of the source, `limit` applied.
        notes: what was changed on the way, for the user to read: copies, templates.
        sha256: of ids, problems and answers: two results can be compared where it is equal.
    """

    name: str
    benchmark: Benchmark
    source: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    sha256: str


def local_benchmark(name: str, path: Path, limit: int | None = None) -> BenchmarkData:
    """Read a user's own benchmark: any number of problems, integers or LaTeX as answers.

    The problem is in a column problem, question or prompt, or the last of `messages`; the answer
    in answer, ground_truth or reward_model.ground_truth. GSM8K's "#### 18" is understood.

    Raises:
        ValueError: as `read_benchmark`; `name` is taken by an entry of `BENCHMARKS`.
    """
    if name in BENCHMARKS:
        raise ValueError(
            f"benchmark {name!r} is one of the known ones; valid for a file of your own: "
            f"a name other than {', '.join(BENCHMARKS)}"
        )
    if not name.strip():
        raise ValueError(f"benchmark file {path}: empty name; valid: NAME=PATH")
    benchmark = Benchmark(
        title=name,
        hub_id="",
        config_name=None,
        split="",
        answer_form="expression",
        num_problems=None,
        licence="not stated",
    )
    return _read(name, benchmark, path, limit, gold_answers_agree)


def read_benchmark(
    name: str,
    path: Path | None = None,
    limit: int | None = None,
    *,
    check_answers: AnswerChecker = gold_answers_agree,
) -> BenchmarkData:
    """Read a known benchmark from a local file, or from the hub where no file is given.

    Copies of a problem count once. A prompt template around the problem is taken off.

    Args:
        name: key of `BENCHMARKS`.
        path: .jsonl or .parquet file.
        limit: keep the first so many problems, after all checks; None keeps all.
        check_answers: Says for each answer whether the grader finds it equal to itself.

    Raises:
        ValueError: unknown name; limit below 1; a missing column, wrong type, empty file, an id
            that two problems share, two answers to one problem, an answer that does not parse;
            another number of problems than the benchmark has. The message names file, row and
            column.
    """
    if name not in BENCHMARKS:
        raise ValueError(
            f"benchmark {name!r} is unknown; valid: {', '.join(BENCHMARKS)}, "
            "or NAME=PATH for a file of your own"
        )
    return _read(name, BENCHMARKS[name], path, limit, check_answers)


def _read(
    name: str,
    benchmark: Benchmark,
    path: Path | None,
    limit: int | None,
    check_answers: AnswerChecker,
) -> BenchmarkData:
    if limit is not None and limit < 1:
        raise ValueError(f"benchmark {name}: limit = {limit}; valid: at least 1, or none")
    if path is None:
        parts = (benchmark.hub_id, benchmark.config_name, benchmark.split)
        source = ":".join(part for part in parts if part)
        rows = read_hub_rows(benchmark.hub_id, benchmark.split, benchmark.config_name)
    else:
        source = str(path)
        rows = read_rows(path)
    reader = ProblemReader(
        name=name,
        source=source,
        answer_form=benchmark.answer_form,
        problem_columns=benchmark.problem_columns,
        answer_columns=benchmark.answer_columns,
        id_columns=benchmark.id_columns,
    )
    problems = reader.read(rows, check_answers)
    notes = reader.notes()
    expected = benchmark.num_problems
    if expected is not None and len(problems) != expected:
        remark = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(
            f"benchmark {name}: {source}: expected {expected} problems, found {len(problems)}"
            f"{remark}; valid: the whole benchmark (--limit takes a part of it), or your own "
            "selection under another name, NAME=PATH"
        )
    _check_ids(name, benchmark, source, problems)
    kept = tuple(problems[:limit])
    return BenchmarkData(name, benchmark, source, kept, tuple(notes), _fingerprint(kept))


def _check_ids(name: str, benchmark: Benchmark, source: str, problems: Iterable[Problem]) -> None:
    if not benchmark.foreign_ids:
        return
    for problem in problems:
        if re.match(benchmark.foreign_ids, problem.problem_id):
            raise ValueError(
                f"benchmark {name}: {source}: problem {problem.problem_id!r} is of another "
                f"benchmark; valid: those of {benchmark.title}"
            )


def _fingerprint(problems: Iterable[Problem]) -> str:
    rows = [[problem.problem_id, problem.problem, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode("ascii")).hexdigest()
