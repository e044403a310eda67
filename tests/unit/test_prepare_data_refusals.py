"""What tools/prepare_data.py refuses, by file, row and column, with nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.data.prompts import load_prompts
from r2vpo_megatron.data.sources import SourceOptions
from tests.unit.test_prepare_data import GOOD, run, write_jsonl


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"answer": "2"}, [], ":2: column problem or question or prompt or messages: missing; "),
        ({"problem": "q"}, [], ":2: column answer or ground_truth or reward_model.ground_truth: "),
        ({"problem": 7, "answer": "2"}, [], ":2: field problem: got 7 (int); valid: a non-empty"),
        ({"problem": " ", "answer": "2"}, [], ":2: field problem: got ' ' (str); valid: a non-e"),
        ({"problem": "\ud800?", "answer": "2"}, [], "; valid: text that UTF-8 can hold"),
        (
            {"problem": "q", "answer": "\ud800"},
            [],
            ":2: field answer: got '\\ud800' (str); valid: te",
        ),
        ({"problem": "q", "answer": "3+4=7\n#### 7"}, [], "; --source gsm8k reads solutions that"),
        (
            {"problem": "q", "reward_model": None},
            [],
            ":2: field reward_model: got nothing; valid: an object with ground_truth",
        ),
        ({"problem": "q", "answer": None}, [], ":2: field answer: got nothing; valid: a non-em"),
        ({"problem": "q", "answer": 0.5}, [], ":2: field answer: got 0.5 (float); valid: a non"),
        ({"problem": "q", "answer": [1]}, [], ":2: field answer: got [1] (list); valid: a non-"),
        (
            {"prompt": [{"role": "user", "content": "a"}] * 2, "answer": "2"},
            [],
            "valid: exactly one user message",
        ),
        ({"prompt": ["a"], "answer": "2"}, [], "valid: a string, or a list of {role, content}"),
        (GOOD, ["--problem-column", "text"], ":1: field text: missing; the row has: problem, ans"),
        (GOOD, ["--answer-column", "meta.x"], ":1: field meta.x: missing; the row has: problem"),
        (GOOD, ["--id-column", "id"], ":1: field id: missing; the row has: problem, answer"),
    ],
)
def test_a_bad_row_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [GOOD, row])
    output = tmp_path / "out.parquet"
    assert run("--source", "jsonl", source, "--output", output, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}:")
    assert message in error
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "data.parquet"
    options = SourceOptions(source="parquet", location=str(folder))
    with pytest.raises(ValueError, match="data.parquet: no such file"):
        options.resolved()
    folder.mkdir()
    assert options.resolved() == (str(folder), None)


def test_an_id_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{**GOOD, "id": "\ud800"}])
    output = tmp_path / "out.parquet"
    assert run("--source", "jsonl", source, "--output", output, "--id-column", "id") == 2
    assert f"error: {source}:1: field id: got '\\ud800'" in capsys.readouterr().err


def test_an_id_taken_by_another_problem_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**GOOD, "id": 5}, {**GOOD, "id": 5}, {"problem": "What?", "answer": "2", "id": 5}]
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    arguments = ["--source", "jsonl", source, "--output", tmp_path / "out.parquet"]
    assert run(*arguments, "--id-column", "id") == 2
    error = capsys.readouterr().err
    assert f"error: {source}:3: id '5' is taken by another problem, of {source}:1;" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "jsonl", "none.jsonl"], "none.jsonl: no such file"),
        (["--source", "gsm8k", "g.jsonl"], "g.jsonl:1: field answer: got '72' (str); valid: a sol"),
        (["--source", "jsonl"], "source jsonl: no location; valid: a file, or a hub id"),
        (["--source", "parquet", "p.jsonl"], "source parquet reads .parquet; valid: --source json"),
        (["--source", "jsonl", "p.jsonl", "--max-prompt-tokens", "9"], "needs --tokenizer MODEL_"),
        (["--source", "jsonl", "p.jsonl", "--thinking", "fast"], "--thinking: needs --tokenizer M"),
        (["--source", "jsonl", "p.jsonl", "--chat-template", "plain"], "--chat-template: needs --"),
        (["--source", "jsonl", "p.jsonl", "--split", "test"], "--split test: p.jsonl is one file,"),
        (["--source", "jsonl", "p.jsonl", "--revision", "v1"], "--revision v1: p.jsonl is one fi"),
        (["--source", "jsonl", "p.jsonl", "--config", "main"], "--config main: p.jsonl is one fil"),
        (["--source", "jsonl", "p.jsonl", "--drop-overlap", "exact"], "needs --evaluation-files"),
        (["--source", "jsonl", "p.jsonl", "--evaluation-files", "x"], "x: valid: NAME=PATH"),
        (["--source", "jsonl", "p.jsonl", "--evaluation-files", "a=n.jsonl"], "n.jsonl: no such"),
        (
            ["--source", "jsonl", "p.jsonl", "--evaluation-files", "a=x", "a=y"],
            "a=y: the name is taken by x",
        ),
        (["--source", "jsonl", "empty.jsonl"], "empty.jsonl: empty; valid: at least one row"),
        (["--source", "jsonl", "p.jsonl", "--tokenizer", "none"], "model folder none: no such f"),
        (["--source", "jsonl", "p.jsonl", "--language", "zh"], "no problem is left of 1 rows; re"),
    ],
)
def test_bad_options_and_files(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "p.jsonl", [GOOD])
    write_jsonl(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "72"}])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert run(*arguments, "--output", "out.parquet") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()


def test_an_output_is_never_replaced_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [GOOD])
    output = tmp_path / "out.parquet"
    output.write_bytes(b"precious")
    arguments = ["--source", "jsonl", source, "--output"]
    assert run(*arguments, output) == 2
    assert "out.parquet: exists; valid: another --output, or --overwrite" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"
    assert run(*arguments, output, "--overwrite", "--dry-run") == 0
    assert output.read_bytes() == b"precious"
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert run(*arguments, output, "--overwrite") == 0
    assert len(load_prompts(output)) == 1
    for bad in (tmp_path / "out.txt", tmp_path / "p.jsonl", tmp_path / "p.jsonl" / "x.parquet"):
        assert run(*arguments, bad) == 2
    # The input is not even replaced with --overwrite.
    parquet_source = ["--source", "parquet", output, "--output", output, "--overwrite"]
    assert run(*parquet_source) == 2
    assert "is an input; valid: another file" in capsys.readouterr().err
    assert source.read_text() == json.dumps(GOOD) + "\n"
