"""results.json and results.md: what is written comes back, and what was tampered with is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.evaluation import results as results_module
from r2vpo_megatron.evaluation.markdown import escape_markdown
from r2vpo_megatron.evaluation.results import read_results, write_results
from tests.evaluation_results import make_result

RESULT = make_result(
    aime24=[[True, True], [False, False], [True, False], [False, True]],
    amc23=[[True, True], [True, False]],
)


def _edit(path: Path, *keys: str, value: Any = None, delete: bool = False) -> None:
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if delete:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = write_results(tmp_path / "new" / "folder", RESULT)
    assert path == tmp_path / "new" / "folder" / "results.json"
    assert read_results(path) == RESULT
    assert read_results(path.parent) == RESULT
    assert sorted(file.name for file in path.parent.iterdir()) == ["results.json", "results.md"]


def test_average_and_speed_by_hand() -> None:
    # aime24: means 1, 0, 1/2, 1/2, so 1/2 with SE sqrt((1/4 + 1/4) / 12); amc23: 3/4 with SE 1/4
    assert RESULT.average == pytest.approx(0.625)
    assert RESULT.average_error == pytest.approx(math.sqrt(0.5 / 12 + 1 / 16) / 2)
    # 12 responses of 10 tokens in 8 s; 8 of them, of aime24, in 4 s
    assert RESULT.tokens_per_second == 15.0
    assert RESULT.benchmarks["aime24"].tokens_per_second == 20.0
    assert replace(RESULT, wall_time_seconds=0.0).tokens_per_second == 0.0


def test_average_of_a_benchmark_without_error_has_none() -> None:
    result = make_result(aime24=[[True], [False]], amc23=[[True]])
    assert result.average_error is None


def test_file_holds_the_derived_numbers(tmp_path: Path) -> None:
    content = json.loads(write_results(tmp_path, RESULT).read_text())
    assert content["schema_version"] == 1
    assert content["average"] == pytest.approx(0.625)
    assert content["tokens_per_second"] == 15.0
    assert content["benchmarks"]["aime24"]["scores"]["problem_means"]["p2"] == 0.5


def test_page_shows_what_was_found(tmp_path: Path) -> None:
    noted = replace(RESULT.benchmarks["amc23"], notes=("3 rows were copies",))
    result = replace(RESULT, benchmarks=RESULT.benchmarks | {"amc23": noted})
    text = write_results(tmp_path, result).with_suffix(".md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# tiny"
    assert any(line.startswith("| AIME24 | 4 | 50.0 | 20.4 | 10.4 to 89.6 |") for line in lines)
    assert any(line.startswith("| Average |  | 62.5 | 16.1 |") for line in lines)
    # pass@2 of aime24: three of four problems have a right one
    assert "| AIME24 | 50.0 | 75.0 |" in lines
    assert "- AMC23: 3 rows were copies" in lines
    assert r"| command | a b\|c |" in lines
    widths = {
        line.replace(r"\|", "").count("|") for line in lines if line.startswith("| AMC23 | 2 | ")
    }
    assert widths == {8}


def test_a_path_that_is_not_unicode_does_not_break_the_end(tmp_path: Path) -> None:
    """As Python has a folder's name in another encoding."""
    result = replace(RESULT, model=replace(RESULT.model, path="models/\udcff"))
    path = write_results(tmp_path, result)
    assert read_results(path) == result
    assert "| path | models/\\udcff |" in (tmp_path / "results.md").read_text()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_results(tmp_path, RESULT)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(results_module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, make_result(aime24=[[True], [True]]))
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_no_benchmarks_or_no_numbers_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no benchmarks"):
        write_results(tmp_path / "a", replace(RESULT, benchmarks={}))
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path / "b", replace(RESULT, wall_time_seconds=math.nan))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


SCORES = ("benchmarks", "aime24", "scores")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema_version",), 2, "field schema_version: 2; valid: 1"),
        (("model", "name"), 7, r"field model\.name: got 7 \(int\); valid: str"),
        (("settings", "temperature"), "0.6", r"field settings\.temperature: got '0\.6' \(str\)"),
        (("settings", "num_samples"), True, r"field settings\.num_samples: got True \(bool\)"),
        (("settings", "num_samples"), 2.5, r"field settings\.num_samples: got 2\.5 \(float\)"),
        (("settings", "colour"), 1, r"field settings\.colour: unknown; valid: temperature, "),
        (("benchmarks",), [], r"field benchmarks: got \[\] \(list\); valid: an object"),
        (("benchmarks",), {}, "field benchmarks: empty"),
        (("benchmarks", "aime24", "notes"), "x", r"field benchmarks\.aime24\.notes: got 'x'"),
        ((*SCORES, "pass_at_1"), 1.5, r"scores\.pass_at_1: 1\.5; valid: 0 to 1"),
        ((*SCORES, "pass_at_1"), 0.6, r"scores\.pass_at_1: 0\.6, but the mean .* is 0\.5"),
        ((*SCORES, "standard_error"), -0.1, r"scores\.standard_error: -0\.1; valid: 0 or more"),
        ((*SCORES, "num_problems"), 3, "num_problems: 3, but problem_means has 4"),
        ((*SCORES, "num_samples"), 0, r"scores\.num_samples: 0; valid: at least 1"),
        ((*SCORES, "pass_at_k"), {"two": 0.5}, "pass_at_k: key 'two'; valid: a whole number"),
        ((*SCORES, "interval"), [0.1], r"scores\.interval: 1 items; valid: 2"),
        ((*SCORES, "problem_means", "p0"), None, r"problem_means\.p0: got None"),
    ],
)
def test_a_wrong_field_is_named(
    tmp_path: Path, keys: tuple[str, ...], value: Any, message: str
) -> None:
    path = write_results(tmp_path, RESULT)
    _edit(path, *keys, value=value)
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "keys", [("model",), ("settings", "grader"), (*SCORES, "response_tokens", "p95")]
)
def test_a_missing_field_is_named(tmp_path: Path, keys: tuple[str, ...]) -> None:
    path = write_results(tmp_path, RESULT)
    _edit(path, *keys, delete=True)
    with pytest.raises(ValueError, match=rf"field {'.'.join(keys)}: missing"):
        read_results(path)


def test_a_later_field_may_be_absent(tmp_path: Path) -> None:
    path = write_results(tmp_path, RESULT)
    _edit(path, "settings", "dtype", delete=True)
    assert read_results(path) == RESULT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "a list; valid: an object"),
        (b'{"schema_version": 1, "wall_time_seconds": NaN}', "not JSON: NaN"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_results(path)


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json: no such file"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("math_dapo", "math_dapo"),
        ("gsm8k_test__openai.jsonl", "gsm8k_test__openai.jsonl"),
        ("a/__init__/_b", r"a/\_\_init\_\_/\_b"),
        ("a|b *c* `d` [e] <f> \\", r"a\|b \*c\* \`d\` \[e\] \<f> \\"),
        ("two\nlines", "two lines"),
    ],
)
def test_only_what_markdown_would_read_is_escaped(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped
