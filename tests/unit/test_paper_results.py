"""Numbers that others report: how a CSV file of them is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from r2vpo_megatron.evaluation.paper_results import load_reported


def test_reported_file(tmp_path: Path) -> None:
    path = tmp_path / "paper.csv"
    path.write_text("model,method,aime24,average\ntiny,GRPO, 48.2% ,\n", encoding="utf-8")
    (row,) = load_reported(str(path)).rows
    assert (row.model, row.method, row.percents, row.average) == (
        "tiny",
        "GRPO",
        {"aime24": 48.2},
        None,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"column model: missing"),
        ("model,aime24\n", r"column method: missing; there are: model, aime24"),
        ("model,method,aime\n", r"column 'aime': unknown; valid: model, method, average, aime24"),
        ("model,method,aime24\n", "no rows"),
        ("model,method,aime24\na,b,high\n", r"paper\.csv:2: column aime24: 'high'"),
        ("model,method,aime24\na,b,120\n", r"paper\.csv:2: column aime24: '120'; valid: 0 to 100"),
        ("model,method,aime24\na,,1\n", r"paper\.csv:2: column method: empty"),
        ("model,method,aime24\na,b,1,2\n", r"paper\.csv:2: 4 values; valid: .*, 3"),
        ("model,method,aime24\na,b\n", r"paper\.csv:2: 2 values; valid: .*, 3"),
        ("model,method,aime24,aime24\na,b,1,2\n", r"column aime24: there twice"),
        ('model,method\na,"b\n', "not a CSV file"),
    ],
)
def test_a_broken_reported_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "paper.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_reported(str(path))


def test_an_unknown_reference_is_named() -> None:
    with pytest.raises(ValueError, match=r"'papers': no such table; valid: paper, or a \.csv"):
        load_reported("papers")
