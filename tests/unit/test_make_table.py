"""Table 1: improvements by hand, what must not be compared, and the three formats."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from r2vpo_megatron.evaluation.comparison import (
    Estimate,
    average,
    difference,
    relative_improvement,
)
from r2vpo_megatron.evaluation.paper_results import (
    REPORTED,
    ReportedRow,
    ReportedTable,
    load_reported,
)
from r2vpo_megatron.evaluation.results import EvaluationResult, write_results
from r2vpo_megatron.evaluation.table import TableEntry, build_table, load_entries
from r2vpo_megatron.evaluation.table_formats import (
    FORMAT_SUFFIXES,
    TABLE_FORMATS,
    escape_latex,
    format_csv,
    format_latex,
    format_markdown,
)
from tests.evaluation_results import make_result
from tools.make_table import main

BASE_ROWS = [[True, False], [False, False], [True, True], [False, False]]  # 1/2 0 1 0
BETTER_ROWS = [[True, True], [True, False], [True, True], [False, False]]  # 1 1/2 1 0


def _result(name: str, base: str = "", **rows: list[list[bool]]) -> EvaluationResult:
    result = make_result(**(rows or {"aime24": BASE_ROWS, "amc23": BASE_ROWS}))
    return replace(result, model=replace(result.model, name=name, base=base))


def _entry(label: str, result: EvaluationResult) -> TableEntry:
    return TableEntry(label, Path(f"{label}/results.json"), result)


BASE = _result("org/tiny")
BETTER = _result("run", base="models/tiny", aime24=BETTER_ROWS, amc23=BASE_ROWS)


def test_difference_is_paired_by_problem() -> None:
    found = difference(BETTER.benchmarks["aime24"], BASE.benchmarks["aime24"])
    # 1/2, 1/2, 0, 0: mean 1/4, SE sqrt(4 * 1/16 / (4 * 3))
    assert found.value == 0.25
    assert found.error == pytest.approx(math.sqrt(1 / 48))
    assert found.paired
    low, high = found.interval or (0, 0)
    assert (low, high) == pytest.approx(
        (0.25 - 3.1824 * math.sqrt(1 / 48), 0.25 + 3.1824 * math.sqrt(1 / 48)), rel=1e-2
    )


def test_difference_of_other_problems_is_not_paired() -> None:
    other = replace(BETTER.benchmarks["aime24"], problems_sha256="cd" * 32)
    found = difference(other, BASE.benchmarks["aime24"])
    assert not found.paired
    # 1, 1/2, 1, 0: SE sqrt((9 + 1 + 9 + 25) / 64 / 12); 1/2, 0, 1, 0: the same
    assert found.error == pytest.approx(math.sqrt(2 * 44 / 64 / 12))


def test_a_model_against_itself_differs_by_nothing() -> None:
    found = difference(BASE.benchmarks["aime24"], BASE.benchmarks["aime24"])
    assert (found.value, found.error) == (0.0, 0.0)
    relative = relative_improvement(list(BASE.benchmarks.values()), list(BASE.benchmarks.values()))
    assert relative is not None
    assert (relative.value, relative.error) == (0.0, 0.0)


def test_relative_improvement_by_hand() -> None:
    relative = relative_improvement(
        list(BETTER.benchmarks.values()), list(BASE.benchmarks.values())
    )
    # averages (5/8 + 3/8) / 2 = 1/2 and 3/8: a third more. m - 4/3 m(base), by problem:
    # aime24 1/3, 1/2, -1/3, 0 and amc23 -1/6, 0, -1/3, 0
    first = np.array([1 / 3, 1 / 2, -1 / 3, 0]).std(ddof=1) / 2
    second = np.array([-1 / 6, 0, -1 / 3, 0]).std(ddof=1) / 2
    assert relative is not None
    assert relative.value == pytest.approx(1 / 3)
    assert relative.error == pytest.approx(math.hypot(first, second) / 2 / (3 / 8))
    assert relative.paired


def test_error_of_the_relative_improvement_is_its_spread() -> None:
    generator = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(300):
        difficulty = generator.uniform(0.2, 0.8, size=60)
        base_rows = (generator.uniform(size=(60, 4)) < difficulty[:, None]).tolist()
        rows = (generator.uniform(size=(60, 4)) < difficulty[:, None] + 0.1).tolist()
        found = relative_improvement(
            list(_result("a", aime24=rows).benchmarks.values()),
            list(_result("b", aime24=base_rows).benchmarks.values()),
        )
        assert found is not None
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_nothing_improves_on_zero() -> None:
    zero = _result("b", aime24=[[False], [False]])
    better = _result("a", aime24=[[True], [False]])
    assert (
        relative_improvement(list(better.benchmarks.values()), list(zero.benchmarks.values()))
        is None
    )


def test_average_has_the_freedom_of_its_widest_part() -> None:
    mean = average([Estimate(0.5, 0.3, 4), Estimate(0.1, 0.0, 400)])
    assert mean.value == pytest.approx(0.3)
    assert mean.error == pytest.approx(0.15)
    assert mean.degrees_of_freedom == pytest.approx(4)
    even = average([Estimate(0.5, 0.1, 10), Estimate(0.5, 0.1, 10)])
    assert even.degrees_of_freedom == pytest.approx(20)


def test_rows_stand_under_the_model_they_were_trained_from() -> None:
    table = build_table([_entry("R2VPO", BETTER), _entry("Base", BASE)])
    assert list(table.groups) == ["tiny"]
    base, better = table.groups["tiny"]
    assert (base.label, base.is_base, base.differences) == ("Base", True, {})
    assert better.differences["amc23"].value == 0.0
    assert better.average is not None
    assert better.average.value == pytest.approx(0.5)
    assert better.relative is not None
    assert better.relative.value == pytest.approx(1 / 3)
    assert table.notes == ()


def test_named_base_takes_results_that_do_not_tell_theirs() -> None:
    orphan = replace(BETTER, model=replace(BETTER.model, base=""))
    entries = [_entry("A", BASE), _entry("B", orphan)]
    assert list(build_table(entries).groups) == ["tiny", "run"]
    named = build_table(entries, bases=["A"])
    assert list(named.groups) == ["tiny"]
    assert named.groups["tiny"][1].relative is not None
    with pytest.raises(ValueError, match="base 'C': no such row; valid: A, B"):
        build_table(entries, bases=["C"])


def test_group_without_a_base_says_so() -> None:
    entries = [_entry("A", BETTER), _entry("B", BETTER)]
    assert build_table(entries).notes == (
        "tiny: no base row among its results, so no improvement is given.",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1.0),
        ("top_p", 1.0),
        ("num_samples", 8),
        ("max_response_tokens", 64),
        ("limit", 5),
        ("prompt_template", "boxed"),
        ("grader", "math_dapo_minerva"),
        ("chat_template", "plain"),
        ("system", "Be brief."),
        ("dtype", "float32"),
    ],
)
def test_different_settings_are_refused(name: str, value: object) -> None:
    other = replace(BETTER, settings=replace(BETTER.settings, **{name: value}))
    entries = [_entry("Base", BASE), _entry("R2VPO", other)]
    with pytest.raises(ValueError, match=f"do not compare: {name} is .* for Base and .* for R2VPO"):
        build_table(entries)
    notes = build_table(entries, allow_mismatch=True).notes
    assert any(note.startswith(f"Not comparable: {name} is ") for note in notes)


def test_seed_may_differ_and_so_may_the_chat_template_of_another_model() -> None:
    reseeded = replace(BETTER, settings=replace(BETTER.settings, seed=7))
    other = _result("org/other")
    other = replace(other, settings=replace(other.settings, chat_template="openpangu"))
    table = build_table([_entry("A", BASE), _entry("B", reseeded), _entry("C", other)])
    assert table.notes == ()
    assert list(table.groups) == ["tiny", "other"]


def test_absent_benchmark_is_refused_or_left_out() -> None:
    part = _result("run", base="tiny", aime24=BETTER_ROWS)
    entries = [_entry("Base", BASE), _entry("R2VPO", part)]
    with pytest.raises(ValueError, match="amc23 was not evaluated for R2VPO"):
        build_table(entries)
    row = build_table(entries, allow_mismatch=True).groups["tiny"][1]
    assert row.average is None
    assert row.relative is None
    assert row.differences["aime24"].value == 0.25
    text = format_markdown(build_table(entries, allow_mismatch=True))
    assert "| tiny | R2VPO | **62.5 ± 23.9** | - | - | - |" in text


def test_other_problems_are_refused_or_not_paired() -> None:
    changed = {
        name: replace(result, problems_sha256="cd" * 32)
        for name, result in BETTER.benchmarks.items()
    }
    entries = [_entry("Base", BASE), _entry("R2VPO", replace(BETTER, benchmarks=changed))]
    with pytest.raises(ValueError, match=r"problems of aime24 \(sha256\) is 'abab"):
        build_table(entries)
    notes = build_table(entries, allow_mismatch=True).notes
    assert any("R2VPO: not the base's problems on AIME24, AMC23" in note for note in notes)


def test_markdown() -> None:
    lines = format_markdown(build_table([_entry("Base", BASE), _entry("R2|VPO", BETTER)]))
    table = lines.splitlines()
    assert table[0] == "| Model | Method | AIME24 | AMC23 | Average | Relative |"
    # SE sqrt(44/64/12) = 23.9 of both; the average's is that over sqrt(2)
    assert table[2] == "| tiny | Base | 37.5 ± 23.9 | **37.5 ± 23.9** | 37.5 ± 16.9 | - |"
    better = table[3].split(" | ")
    assert better[1] == r"R2\|VPO"
    assert better[2:5] == ["**62.5 ± 23.9**", "**37.5 ± 23.9**", "**50.0 ± 16.9**"]
    assert better[5].startswith("+33.3% (")
    assert any(
        line.startswith(r"| tiny | R2\|VPO | +25.0 (-20.9 to +70.9) | +0.0 |") for line in table
    )
    assert "Settings: temperature 0.6, top_p 0.95, num_samples 2," in lines


def test_csv_has_the_interval_of_the_results() -> None:
    """None right: not the 0 to 0 that a spread of 0 would give."""
    nothing = _result("tiny", aime24=[[False, False]] * 4, amc23=[[True, False]] * 2)
    row = next(csv.DictReader(io.StringIO(format_csv(build_table([_entry("Base", nothing)])))))
    assert row["aime24_low"] == "0.0000"
    assert float(row["aime24_high"]) == pytest.approx(100 * 3.8415 / 7.8415, abs=1e-2)


def test_csv_can_be_read_back() -> None:
    text = format_csv(build_table([_entry('Base, "old"', BASE), _entry("R2VPO\nnew", BETTER)]))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["method"] for row in rows] == ['Base, "old"', "R2VPO\nnew"]
    assert rows[0]["is_base"] == "true"
    assert rows[0]["aime24_difference"] == ""
    better = rows[1]
    assert better["aime24"] == "62.5000"
    assert better["aime24_difference"] == "25.0000"
    assert better["aime24_difference_standard_error"] == f"{100 * math.sqrt(1 / 48):.4f}"
    assert better["aime24_paired"] == "true"
    assert better["average_difference"] == "12.5000"
    assert better["relative_improvement"] == "33.3333"
    assert None not in better


def test_latex_escapes_and_aligns() -> None:
    text = format_latex(build_table([_entry("a_b & 50%", BASE), _entry("R$^2$VPO\\#", BETTER)]))
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert rows[2].startswith(r"a\_b \& 50\% & 37.5 $\pm$ 23.9 & ")
    assert rows[3].startswith(
        r"R\$\textasciicircum{}2\$VPO\textbackslash{}\# & \textbf{62.5 $\pm$ 23.9} & "
    )
    for row in (rows[0], rows[2], rows[3]):
        assert row.replace("\\&", "").count("&") == 4
    assert text.count("\\begin{tabular}{lrrrr}") == 1
    body = [line for line in text.splitlines() if not line.startswith("%")]
    unescaped = "\n".join(body).replace("\\%", "").replace("\\#", "").replace("\\_", "")
    assert not set("%#_") & set(unescaped)


def test_a_note_stays_inside_its_latex_comment() -> None:
    changed = replace(BETTER, settings=replace(BETTER.settings, top_p=1.0))
    entries = [_entry("Base", BASE), _entry("a\n\\input{x}", changed)]
    text = format_latex(build_table(entries, allow_mismatch=True))
    assert "% Not comparable: top_p is 0.95 for Base and 1.0 for a \\input{x}." in text
    assert not any(line.startswith("\\input") for line in text.splitlines())


def test_latex_of_every_sign() -> None:
    assert escape_latex("~^\\{}<>|") == (
        r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}"
        r"\textless{}\textgreater{}\textbar{}"
    )
    assert escape_latex("a\nb\x00c") == "a b c"


def test_ties_are_all_bold_and_reported_rows_never() -> None:
    row = ReportedRow("org/tiny", "GRPO", {"aime24": 99.0, "gsm8k": 10.0}, 88.5)
    reference = ReportedTable("somewhere", (row,), ())
    table = build_table([_entry("A", BASE), _entry("B", BETTER)], reference=reference)
    assert [row.label for row in table.groups["tiny"]] == ["A", "B", "GRPO (reported)"]
    text = format_markdown(table)
    assert "| tiny | GRPO (reported) | 99.0 | - | 88.5 | - |" in text
    assert text.count("**37.5 ± 23.9**") == 2
    assert "- (reported): from somewhere; settings and grader may differ." in text


def test_the_papers_words_are_appended() -> None:
    table = build_table([_entry("Base", BASE)], reference=load_reported("paper"))
    assert table.notes == REPORTED["paper"].remarks
    assert "up to 17%" in " ".join(table.notes)


def test_files_folders_and_labels(tmp_path: Path) -> None:
    write_results(tmp_path / "runs" / "base", BASE)
    write_results(tmp_path / "runs" / "deep" / "better", BETTER)
    entries = load_entries([tmp_path / "runs"], {tmp_path / "runs" / "base": "Base"})
    assert [entry.label for entry in entries] == ["Base", "run"]
    direct = tmp_path / "runs" / "base" / "results.json"
    assert len(load_entries([direct, tmp_path / "runs"], {})) == 2
    with pytest.raises(ValueError, match=r"no results\.json in it"):
        load_entries([tmp_path / "runs" / "deep" / "better", _empty(tmp_path)], {})
    with pytest.raises(ValueError, match="not among the results"):
        load_entries([direct], {tmp_path / "other": "X"})
    with pytest.raises(ValueError, match=r"both rows are named 'run'; valid: --label NAME=PATH"):
        load_entries([tmp_path / "runs"], {direct: "run"})


def test_checkpoints_of_one_run_are_told_apart(tmp_path: Path) -> None:
    for checkpoint in ("iteration 100", "iteration 200"):
        model = replace(BETTER.model, checkpoint=checkpoint)
        write_results(tmp_path / checkpoint, replace(BETTER, model=model))
    labels = [entry.label for entry in load_entries([tmp_path], {})]
    assert labels == ["run (iteration 100)", "run (iteration 200)"]


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_command_writes_all_formats(tmp_path: Path) -> None:
    for name, result in (("base", BASE), ("better", BETTER)):
        write_results(tmp_path / name, result)
    output = tmp_path / "out" / "table1.v2"
    arguments = [str(tmp_path), "--label", f"R2VPO={tmp_path / 'better'}", "--format", "all"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert sorted(file.name for file in output.parent.iterdir()) == [
        "table1.v2.csv",
        "table1.v2.md",
        "table1.v2.tex",
    ]
    assert "| tiny | R2VPO |" in (output.parent / "table1.v2.md").read_text()
    with pytest.raises(ValueError, match="needs --output"):
        main(arguments)
    with pytest.raises(ValueError, match=r"--label 'x': valid: NAME=PATH"):
        main([str(tmp_path), "--label", "x"])


def test_a_file_given_twice_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_results(tmp_path / "base", BASE)
    monkeypatch.chdir(tmp_path)
    assert len(load_entries([Path("base"), path, Path("base/results.json")], {})) == 1


def test_a_terminal_without_the_signs_still_gets_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, BASE)
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    assert main([str(tmp_path)]) == 0
    sys.stdout.flush()
    assert rb"37.5 \xb1 23.9" in content.getvalue()


def test_command_ends_with_2_on_bad_input(tmp_path: Path) -> None:
    write_results(tmp_path / "base", BASE)
    changed = replace(BETTER, settings=replace(BETTER.settings, temperature=1.0))
    write_results(tmp_path / "better", changed)
    script = Path(__file__).resolve().parents[2] / "tools" / "make_table.py"
    command = [sys.executable, str(script), str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the results do not compare: temperature is 0.6")
    assert refused.stdout == ""
    allowed = subprocess.run(
        [*command, "--allow-mismatch"], capture_output=True, text=True, check=False
    )
    assert allowed.returncode == 0
    assert "- Not comparable: temperature is 0.6" in allowed.stdout


def test_every_format_has_a_suffix() -> None:
    assert FORMAT_SUFFIXES.keys() == TABLE_FORMATS.keys()
