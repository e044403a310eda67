"""Benchmark files: the copies that are in use load, and what is wrong with a file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from r2vpo_megatron.data.templates import PROMPT_TEMPLATES
from r2vpo_megatron.evaluation import benchmarks
from r2vpo_megatron.evaluation.answers import (
    gold_answers_agree,
    read_expression,
    read_gsm8k,
    read_integer,
)
from r2vpo_megatron.evaluation.benchmarks import (
    BENCHMARKS,
    local_benchmark,
    read_benchmark,
)
from r2vpo_megatron.evaluation.columns import column_names, find_value

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# name, file, number of problems, answers of the first three rows as a person reads them
COPIES = [
    ("aime24", "aime24__Klear.jsonl", 30, None),
    ("aime24", "aime24__Qwen.jsonl", 30, ["204", "113", "371"]),
    ("aime24", "aime-2024__DAPO.parquet", 30, ["540"]),
    ("aime25", "aime25__Klear.jsonl", 30, ["70"]),
    ("amc23", "amc23__Qwen.jsonl", 40, ["27", "36", "45"]),
    ("hmmt_feb25", "hmmt_feb_2025__Klear.jsonl", 30, ["103", "3375", r"\frac{1}{576}"]),
    ("olymmath", "OlymMATH-EN-HARD.jsonl", 100, ["2625", "210", "11"]),
    ("olymmath_en_easy", "OlymMATH-EN-EASY.jsonl", 100, ["948", r"4\sqrt{15}-14", "3"]),
    ("olymmath_zh_hard", "OlymMATH-ZH-HARD.jsonl", 100, ["2625"]),
    ("olymmath_zh_easy", "OlymMATH-ZH-EASY.jsonl", 100, ["948"]),
    ("gsm8k", "gsm8k_test__openai.jsonl", 1319, ["18", "3", "70000"]),
    ("gsm8k", "gsm8k_test__Qwen.jsonl", 1319, ["18", "3", "70000"]),
    ("math500", "math500__simpleRL.jsonl", 500, [r"\left( 3, \frac{\pi}{2} \right)", "p - q"]),
]


def _accept(answers: Any) -> list[bool]:
    return [True] * len(answers)


def _write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _aime(num_rows: int = 30, **changes: Any) -> list[dict[str, Any]]:
    rows = [{"id": index, "problem": f"Problem {index}?", "answer": index} for index in range(30)]
    for row, fields in changes.items():
        rows[int(row[1:]) - 1].update(fields)  # r3 is row 3
    return rows[:num_rows]


@pytest.mark.parametrize(("name", "file", "num_problems", "answers"), COPIES)
def test_every_copy_loads(
    name: str, file: str, num_problems: int, answers: list[str] | None
) -> None:
    if not (DATA / file).is_file():
        pytest.skip(f"no {DATA / file}")
    data = read_benchmark(name, DATA / file, check_answers=_accept)
    assert len(data.problems) == num_problems
    assert len({problem.problem_id for problem in data.problems}) == num_problems
    assert all("Remember to put your answer" not in problem.problem for problem in data.problems)
    if answers is not None:
        assert [problem.answer for problem in data.problems[: len(answers)]] == answers


def test_three_copies_of_aime24_have_the_same_answers() -> None:
    files = ("aime24__Klear.jsonl", "aime24__Qwen.jsonl", "aime-2024__DAPO.parquet")
    if not all((DATA / file).is_file() for file in files):
        pytest.skip(f"not all of {files} in {DATA}")
    answers = [
        sorted(problem.answer for problem in read_benchmark("aime24", DATA / file).problems)
        for file in files
    ]
    assert answers[0] == answers[1] == answers[2]
    assert "25" in answers[0]
    assert "025" not in answers[0]


def test_thirty_two_copies_collapse_and_are_reported() -> None:
    path = DATA / "aime-2024__DAPO.parquet"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert any("930 rows were copies" in note for note in read_benchmark("aime24", path).notes)


@pytest.mark.parametrize("file", ["hmmt_feb_2025__Klear.jsonl", "OlymMATH-EN-HARD.jsonl"])
def test_the_grader_reads_every_gold_answer(file: str) -> None:
    if not (DATA / file).is_file():
        pytest.skip(f"no {DATA / file}")
    name = "olymmath" if "Olym" in file else "hmmt_feb25"
    assert read_benchmark(name, DATA / file).problems


def test_the_papers_five_have_the_papers_sizes() -> None:
    names = ("aime24", "aime25", "amc23", "hmmt_feb25", "olymmath")
    assert [BENCHMARKS[name].num_problems for name in names] == [30, 30, 40, 30, 100]
    assert BENCHMARKS["hmmt_feb25"].licence == "CC BY-NC-SA 4.0"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("025", "25"),
        ("000", "0"),
        (27.0, "27"),
        ("27.0", "27"),
        ("27.", "27"),
        (r"\boxed{27}", "27"),
        (r"$\boxed{027}$", "27"),
        (r"\(27\)", "27"),
        (r"\[ 27 \]", "27"),
        ("$$27$$", "27"),
        ("1,080", "1080"),
        ("1{,}080", "1080"),
        (-1.0, "-1"),
        ("-01", "-1"),
        ("\N{MINUS SIGN}984", "-984"),
        ("-0", "0"),
        ("+7", "7"),
        (2**70, str(2**70)),
        (1e15, "1000000000000000"),
    ],
)
def test_integers_in_every_spelling(value: Any, expected: str) -> None:
    assert read_integer(value, "f:1", "answer") == expected


@pytest.mark.parametrize(
    "value",
    [27.5, "27.5", "1/2", r"\frac{1}{2}", True, ["27"], {"a": 1}, float("nan"), float("inf"), "",
     "1,08", "twenty", "2 3", "27\0", "$1$ $2$", "\uff12\uff17", "x"],
)  # fmt: skip
def test_what_is_no_integer_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^f\.jsonl:7: column answer: "):
        read_integer(value, "f.jsonl:7", "answer")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"$\boxed{\frac{9 \sqrt{23}}{23}}$", r"\frac{9 \sqrt{23}}{23}"),
        (r"\boxed{1}, \boxed{2}", r"\boxed{1}, \boxed{2}"),
        ("$1$ and $2$", "$1$ and $2$"),
        (0.84, "0.84"),
        (27.0, "27"),
        ("0.50", "0.50"),
        (r"90^\circ", r"90^\circ"),
        (r"\{1, 2\}", r"\{1, 2\}"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
        ("#### 1,080", "1080"),
        ("007", "7"),
    ],
)
def test_expressions_keep_their_latex(value: Any, expected: str) -> None:
    assert read_expression(value, "f:1", "answer") == expected


@pytest.mark.parametrize("value", ["", "N/A", "None", r"\frac{1}{", "}1{", "1" * 501, None, "$$"])
def test_what_is_no_expression_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^f\.jsonl:7: column answer: "):
        read_expression(value, "f.jsonl:7", "answer")


def test_gsm8k_answer_stands_behind_the_mark() -> None:
    worked = "She has 16 - 3 = <<16-3=13>>13 eggs.\nOr #### 5?\n#### 2,125"
    assert read_gsm8k(worked, "f:1", "answer") == "2125"
    assert read_gsm8k("#### $18", "f:1", "answer") == "18"
    assert read_gsm8k("18", "f:1", "answer") == "18"
    assert read_gsm8k(18, "f:1", "answer") == "18"
    with pytest.raises(ValueError, match=r"f:1: column answer: no '#### ANSWER'"):
        read_gsm8k("She has 13 eggs.", "f:1", "answer")


def test_the_grader_tells_what_it_cannot_read() -> None:
    answers = [r"\frac{1}{2}", r"\text{Evelyn}", "52_8", r"\left(", r"\frac{1}{0}", "3 +", "p - q"]
    assert gold_answers_agree(answers) == [True, True, True, False, False, False, True]


def test_an_answer_that_does_not_parse_is_named_with_its_row(tmp_path: Path) -> None:
    rows = [{"problem": f"p{index}", "answer": "1"} for index in range(30)]
    rows[4]["answer"] = r"\frac{1}{0}"
    path = _write(tmp_path / "h.jsonl", rows)
    with pytest.raises(ValueError, match=r"h\.jsonl:5: column answer: answer .* does not parse"):
        read_benchmark("hmmt_feb25", path)


def test_the_checker_sees_the_answers_and_its_verdict_counts(tmp_path: Path) -> None:
    rows = [{"problem": f"p{index}", "answer": str(index)} for index in range(30)]
    path = _write(tmp_path / "h.jsonl", rows)
    seen: list[str] = []

    def refuse_two(answers: Any) -> list[bool]:
        seen.extend(answers)
        return [answer not in ("7", "9") for answer in answers]

    with pytest.raises(ValueError, match=r"h\.jsonl:8: .*'7'.*and 1 more rows"):
        read_benchmark("hmmt_feb25", path, check_answers=refuse_two)
    assert seen == [str(index) for index in range(30)]


def test_wrong_number_of_problems(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _aime(29))
    with pytest.raises(ValueError, match=r"a\.jsonl: expected 30 problems, found 29"):
        read_benchmark("aime24", path)
    doubled = _write(tmp_path / "b.jsonl", [*_aime(29), _aime()[3]])
    with pytest.raises(ValueError, match=r"expected 30 problems, found 29 \(1 rows were copies"):
        read_benchmark("aime24", doubled)


def test_limit_comes_after_the_checks(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _aime())
    limited = read_benchmark("aime24", path, limit=2)
    assert [problem.answer for problem in limited.problems] == ["0", "1"]
    assert limited.sha256 != read_benchmark("aime24", path).sha256
    with pytest.raises(ValueError, match="found 29"):
        read_benchmark("aime24", _write(tmp_path / "b.jsonl", _aime(29)), limit=2)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: column answer"):
        read_benchmark("aime24", _write(path, _aime(r3={"answer": 27.5})), limit=2)
    with pytest.raises(ValueError, match="limit = 0"):
        read_benchmark("aime24", path, limit=0)


def test_missing_column_lists_those_that_are_there(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "p", "meta": {"gold": 3}}]
    path = _write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no column for the problem; there are: id, "):
        read_benchmark("aime24", path)
    rows[0]["problem"] = "p"
    with pytest.raises(
        ValueError, match=r"for the answer; there are: id, text, meta\.gold, problem; valid: one of"
    ):
        read_benchmark("aime24", _write(path, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, r"a\.jsonl:3: column answer: missing or null; there are: id, "),
        ({"answer": 27.5}, r"a\.jsonl:3: column answer: 27\.5 is not a whole number"),
        ({"answer": [1]}, r"a\.jsonl:3: column answer: a list"),
        ({"problem": 7}, r"a\.jsonl:3: column problem: a int"),
        ({"problem": "  "}, r"a\.jsonl:3: column problem: empty"),
        ({"id": 0}, r"a\.jsonl:3: column id: '0' is taken by row 1 with another problem"),
        ({"id": ""}, r"a\.jsonl:3: column id: ''"),
        ({"id": [1]}, r"a\.jsonl:3: column id: \[1\]"),
        (
            {"problem": "Problem  0? "},
            r"a\.jsonl:3: column answer: '2', but row 1 answers the same problem with '0'",
        ),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_benchmark("aime24", _write(tmp_path / "a.jsonl", _aime(r3=change)))


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "empty"), ("\n\n", "empty"), ("[1, 2]\n", r"a\.jsonl:1"), ("{\n", r"a\.jsonl:1")],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_benchmark("aime24", path)


def test_template_in_the_text_is_taken_off(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": PROMPT_TEMPLATES["dapo"].apply(row["problem"])}],
         "reward_model": {"ground_truth": str(row["answer"])}}
        for row in _aime()
    ]  # fmt: skip
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = read_benchmark("aime24", path)
    assert data.problems[5].problem == "Problem 5?"
    assert data.problems[5].problem_id == "aime24-0006"
    assert data.notes == ("prompt template 'dapo' was taken off 30 rows",)


def test_templates_within_each_other_are_both_taken_off(tmp_path: Path) -> None:
    inner = PROMPT_TEMPLATES["boxed"].apply("What is 1+1?")
    row = {"problem": f" \n{PROMPT_TEMPLATES['dapo'].apply(inner)} ", "answer": "2"}
    data = local_benchmark("mine", _write(tmp_path / "mine.jsonl", [row]))
    assert data.problems[0].problem == "What is 1+1?"
    assert data.notes == ("prompt template 'dapo' was taken off 1 rows",)


def test_own_benchmark_of_any_size(tmp_path: Path) -> None:
    rows = [
        {"question": "1+1?", "ground_truth": 2},
        {"question": "Half?", "ground_truth": r"$\frac12$"},
    ]
    path = _write(tmp_path / "mine.jsonl", rows)
    data = local_benchmark("mine", path)
    assert [problem.answer for problem in data.problems] == ["2", r"\frac12"]
    assert [problem.problem_id for problem in data.problems] == ["mine-0001", "mine-0002"]
    assert local_benchmark("mine", path, limit=1).problems == data.problems[:1]
    with pytest.raises(ValueError, match="empty name"):
        local_benchmark(" ", path)
    with pytest.raises(ValueError, match="known ones"):
        local_benchmark("aime24", path)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'aime' is unknown; valid: aime24, .*NAME=PATH"):
        read_benchmark("aime")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("olymmath", "OlymMATH-EN-EASY.jsonl"),
        ("olymmath", "OlymMATH-ZH-HARD.jsonl"),
        ("olymmath_en_easy", "OlymMATH-EN-HARD.jsonl"),
        ("olymmath_zh_easy", "OlymMATH-EN-EASY.jsonl"),
        ("olymmath_zh_hard", "OlymMATH-ZH-EASY.jsonl"),
        ("aime25", "aime24__Klear.jsonl"),
    ],
)
def test_a_sister_of_the_benchmark_is_refused(name: str, file: str) -> None:
    """As many problems in the same columns; the ids tell."""
    if not (DATA / file).exists():
        pytest.skip(f"{file} is not there")
    with pytest.raises(ValueError, match=f"{file}: problem '.*' is of another benchmark"):
        read_benchmark(name, DATA / file, check_answers=lambda answers: [True] * len(answers))


@pytest.mark.parametrize("column", ["problem", "id"])
def test_half_a_surrogate_pair_is_named(tmp_path: Path, column: str) -> None:
    rows = _aime(r3={column: "a\ud800"})
    path = _write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: column {column}: '\\ud800' at character 2"):
        read_benchmark("aime24", path)


def test_a_null_in_the_first_row_is_no_missing_column(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", _aime(r1={"answer": None}))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: column answer: null"):
        read_benchmark("aime24", path)


def test_the_hub_is_asked_by_the_tables_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_hub_rows(hub_id: str, split: str, config_name: str | None) -> Any:
        asked.append((hub_id, split, config_name))
        rows = [{"question": f"q{index}", "answer": f"#### {index}"} for index in range(1319)]
        return iter(enumerate(rows, start=1))

    monkeypatch.setattr(benchmarks, "read_hub_rows", read_hub_rows)
    data = read_benchmark("gsm8k", limit=3)
    assert asked == [("openai/gsm8k", "test", "main")]
    assert data.source == "openai/gsm8k:main:test"
    assert [problem.answer for problem in data.problems] == ["0", "1", "2"]


def test_paths_into_rows() -> None:
    row = {"a": {"b": [{"c": 1}, {"c": 2}]}, "text": "xyz", "none": None}
    assert find_value(row, "a.b[-1].c") == 2
    assert find_value(row, "a.b[0].c") == 1
    assert find_value(row, "a.b[2].c") is None
    assert find_value(row, "text[0]") is None
    assert find_value(row, "text.length") is None
    assert find_value(row, "none.b") is None
    assert column_names(row) == ["a.b[-1].c", "text", "none"]
