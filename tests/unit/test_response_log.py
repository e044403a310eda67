from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.evaluation.response_log import ResponseLog, begin, go_on

RECORD = ResponseRecord(
    problem_id="I-1",
    sample_index=0,
    seed=7,
    num_tokens=12,
    finish_reason="stop",
    acc=True,
    pred="204",
    parsed=True,
    failure="",
    text="Answer: 204",
)
SETTINGS: dict[str, Any] = {"deciding": {"--samples": 4, "model (sha256)": "aa"}, "options": {}}


@pytest.fixture
def log(tmp_path: Path) -> ResponseLog:
    begin(tmp_path / "evaluation", SETTINGS)
    return ResponseLog(tmp_path / "evaluation", "tiny")


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        replace(RECORD, pred=None, parsed=False, acc=False, finish_reason="length", text=""),
        replace(RECORD, text='解：设\n"x"\\boxed{1}\u2028\x00\x85', pred="１"),
        replace(RECORD, text="cut inside a character \ud83d", failure="timeout"),
    ],
)
def test_a_record_comes_back_as_it_was(log: ResponseLog, record: ResponseRecord) -> None:
    log.append("aime24", [record])
    assert list(log.read("aime24")) == [record]


def test_a_line_names_benchmark_and_model(log: ResponseLog) -> None:
    log.append("aime24", [RECORD])
    (line,) = log.path("aime24").read_text().splitlines()
    row = json.loads(line)
    assert (row["benchmark"], row["model"], row["problem_id"]) == ("aime24", "tiny", "I-1")
    assert log.path("aime24").name == "aime24.jsonl"


def test_benchmarks_are_kept_apart(log: ResponseLog) -> None:
    log.append("aime24", [RECORD])
    log.append("aime25", [replace(RECORD, seed=8)])
    assert [record.seed for record in log.read("aime24")] == [7]
    assert [record.seed for record in log.read("aime25")] == [8]
    assert list(log.read("amc23")) == []


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(log: ResponseLog) -> None:
    records = [replace(RECORD, sample_index=index, text="é" * 50) for index in range(3)]
    log.append("aime24", records)
    path = log.path("aime24")
    whole = path.read_bytes()
    last_start = whole[:-1].rindex(b"\n") + 1
    for end in range(last_start, len(whole)):
        path.write_bytes(whole[:end])
        assert list(log.read("aime24")) == records[:2]
        assert path.read_bytes() == whole[:last_start]
    log.append("aime24", records[2:])
    assert path.read_bytes() == whole


def test_a_first_line_that_is_torn_leaves_nothing(log: ResponseLog) -> None:
    log.append("aime24", [replace(RECORD, text="x" * 200_000)])  # longer than a block of the search
    path = log.path("aime24")
    path.write_bytes(path.read_bytes()[:-1])
    assert list(log.read("aime24")) == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"acc": 1}, "field acc: 1; valid: bool"),
        ({"num_tokens": True}, "field num_tokens: True; valid: int"),
        ({"num_tokens": 1.0}, "field num_tokens: 1.0; valid: int"),
        ({"pred": 5}, "field pred: 5; valid: str or NoneType"),
        ({"benchmark": "aime25"}, "field benchmark: 'aime25'; valid: aime24"),
        ({"text": None}, "field text: None; valid: str"),
    ],
)
def test_a_wrong_field_is_named_with_its_line(
    log: ResponseLog, change: dict[str, Any], expected: str
) -> None:
    log.append("aime24", [RECORD])
    path = log.path("aime24")
    row = json.loads(path.read_text())
    path.write_text(path.read_text() + json.dumps({**row, "sample_index": 1, **change}) + "\n")
    with pytest.raises(ValueError) as error:
        list(log.read("aime24"))
    assert str(error.value) == f"{path}:2: {expected}"


def test_a_missing_field_is_named(log: ResponseLog) -> None:
    log.append("aime24", [RECORD])
    path = log.path("aime24")
    row = json.loads(path.read_text())
    del row["seed"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="aime24.jsonl:1: field seed: missing; valid: int"):
        list(log.read("aime24"))


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"[1]", b"\x00\x00", b""])
def test_a_damaged_line_in_the_middle_is_not_passed_over(log: ResponseLog, line: bytes) -> None:
    log.append("aime24", [RECORD])
    path = log.path("aime24")
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match="aime24.jsonl:1: "):
        list(log.read("aime24"))


def test_the_same_sample_twice_is_refused(log: ResponseLog) -> None:
    log.append("aime24", [RECORD, replace(RECORD, sample_index=1)])
    log.append("aime24", [replace(RECORD, text="other")])
    with pytest.raises(ValueError, match="jsonl:3: sample 0 of problem 'I-1' is also in line 1"):
        list(log.read("aime24"))


def test_seconds_add_up_over_attempts(log: ResponseLog) -> None:
    assert log.load_seconds() == {}
    log.append_seconds({"(start-up)": 10.0})
    log.append_seconds({"aime24": 1.5, "amc23": 0.5})
    log.append_seconds({"aime24": 2.0})
    path = log.path("aime24").parents[1] / "seconds.jsonl"
    with path.open("a") as file:
        file.write('{"aime24": 3')
    assert log.load_seconds() == {"(start-up)": 10.0, "aime24": 3.5, "amc23": 0.5}
    for line in ("[]", '{"aime24": "3"}', '{"aime24": -1}', '{"aime24": NaN}', '{"aime24": 1e999}'):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="seconds.jsonl:1: "):
            log.load_seconds()


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    begin(folder, SETTINGS)
    with pytest.raises(ValueError, match="exists and is not empty.*--resume goes on"):
        begin(folder, {"deciding": {}})
    assert json.loads((folder / "settings.json").read_text()) == SETTINGS
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError) as error:
        begin(other, SETTINGS)
    assert "--resume" not in str(error.value)
    with pytest.raises(ValueError, match="exists and is not empty"):
        begin(other / "thesis.tex", SETTINGS)


def test_what_a_kill_left_before_the_settings_is_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / ".settings.json.tmp").write_text('{"deci')
    begin(folder, SETTINGS)
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_going_on_with_other_settings_lists_all_differences(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    before = {"--seed": 1, "--top-p": 0.95, "files": {"a": "00"}, "--old": 1, "pair": (1, 2)}
    begin(folder, {"deciding": before, "options": {"num_engines": 1}})
    go_on(folder, {"deciding": before, "options": {"num_engines": 8}})
    now = {"--seed": 1, "--top-p": 1.0, "files": {"a": "01"}, "pair": (1, 2), "--new": None}
    with pytest.raises(ValueError) as error:
        go_on(folder, {"deciding": now})
    message = str(error.value)
    assert (
        "other settings: --top-p: 0.95 there, 1.0 here; files: {'a': '00'} there, {'a': '01'} "
        "here; --old: 1 there, nothing here; --new: nothing there, None here. Valid" in message
    )
    assert "--seed" not in message


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"deciding": 3}', "null"])
def test_settings_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="settings.json: not the settings of an evaluation"):
        go_on(tmp_path, SETTINGS)


def test_going_on_without_an_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no evaluation in"):
        go_on(tmp_path, SETTINGS)
