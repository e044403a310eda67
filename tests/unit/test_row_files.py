"""Rows of .jsonl and .parquet files and of hub data sets, and what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from r2vpo_megatron.data.hub import read_hub_rows
from r2vpo_megatron.data.row_fields import answer_text, get_field
from r2vpo_megatron.data.row_files import read_rows


def test_rows_carry_their_line_numbers_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \r\n{"a": "\xe4\xb8\xad"}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": "中"})]


def test_parquet_rows_cross_batches_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"n": list(range(9001))})
    parquet.write_table(table, path, row_group_size=5000)
    assert list(read_rows(path)) == [(n + 1, {"n": n}) for n in range(9001)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", ": empty; valid: at least one row"),
        ("a.jsonl", b"\n \n", ": empty; valid: at least one row"),
        ("a.parquet", b"", ": empty; valid: at least one row"),
        ("a.parquet", b'{"a": 1}\n', ": not a readable parquet file"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", ": not a readable parquet file"),
        ("a.csv", b"a\n1\n", ": file type '.csv'; valid: .jsonl, .parquet"),
        ("a.jsonl", b'{"a": 1}\n"text"\n', r":2: got 'text' \(str\); valid: a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a" 2}\n', ":2: not a JSON object: .* at column 6"),
        ("a.jsonl", b"\xff\n", r":1: not UTF-8 \(byte 0\)"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, ":1: not a JSON object that can be read"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ":1: not a JSON object that can be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}{message}"):
        list(read_rows(path))


def test_missing_files_and_folders_are_named_before_any_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(ValueError, match="d.parquet: is a folder; valid: a file"):
        read_rows(tmp_path / "d.parquet")


def test_a_parquet_file_without_rows_and_one_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "none.parquet"
    parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), path)
    with pytest.raises(ValueError, match=f"^{path}: empty"):
        list(read_rows(path))
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.table({"a": [str(n) * 9 for n in range(20_000)]}), whole)
    # The footer is whole, the pages are not.
    content = bytearray(whole.read_bytes())
    content[100:4000] = b"\xff" * 3900
    whole.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{whole}:1: not readable, nor what follows \("):
        list(read_rows(whole))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (27.0, "27"),
        (-3.0, "-3"),
        (12, "12"),
        (" 7 ", "7"),
        (2.0**53, "9007199254740992"),
        (2.0**53 + 2, None),  # 2**53 + 1 and + 3 as floats may be this one
        (2**63 - 1, "9223372036854775807"),
        (0.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (True, None),
        (None, None),
        ("  ", None),
        ([1], None),
    ],
)
def test_what_counts_as_an_answer(value: object, text: str | None) -> None:
    assert answer_text(value) == text


def test_dots_reach_inside_and_a_missing_column_names_what_is_there() -> None:
    row = {"meta": {"a": {"b": 5}}, "x.y": 6}
    assert get_field(row, "meta.a.b", "f:1") == 5
    assert get_field(row, "x.y", "f:1") == 6
    with pytest.raises(ValueError, match="^f:1: field meta.c: missing; the row has: meta.a$"):
        get_field(row, "meta.c", "f:1")
    with pytest.raises(ValueError, match="^f:1: field z: missing; the row has: meta, x.y$"):
        get_field(row, "z", "f:1")
    with pytest.raises(ValueError, match="^f:1: field m: got nothing; valid: an object with a$"):
        get_field({"m": None}, "m.a", "f:1")


_READ_HUB = """
import json, sys
from r2vpo_megatron.data.hub import read_hub_rows
for arguments in json.loads(sys.argv[1]):
    try:
        print(json.dumps(list(read_hub_rows(*arguments))))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def test_a_hub_repository_is_read_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    data = tmp_path / "repository" / "data"
    data.mkdir(parents=True)
    parquet.write_table(
        pyarrow.table({"q": ["a", "b"], "n": [1, 2]}), data / "train-00000-of-00001.parquet"
    )
    (tmp_path / "bare").mkdir()
    folder = str(data.parent)
    calls = [
        [folder, "train"],
        [folder, "test"],
        [folder, "train", "socratic"],
        [str(tmp_path / "bare"), "train"],
        ["owner/name", "train"],
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", _READ_HUB, json.dumps(calls)],
        env=environment,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, split, config, bare, offline = map(json.loads, done.stdout.splitlines())
    assert rows == [[1, {"q": "a", "n": 1}], [2, {"q": "b", "n": 2}]]
    assert "split 'test'" in split
    assert "['train']" in split
    assert "'socratic' not found" in config
    assert "doesn't contain any data files" in bare
    assert "owner/name: the hub cannot be reached" in offline
    assert "HF_HUB_OFFLINE" in offline
    assert "give a local .parquet or .jsonl file" in offline


def test_what_cannot_be_a_data_set_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'a b/c': neither a folder nor a hub id; valid: owner"):
        read_hub_rows("a b/c", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"package datasets.*r2vpo-megatron\[data\].*local .parq"):
        read_hub_rows("owner/name", "train")
