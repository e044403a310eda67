"""A result table as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from r2vpo_megatron.evaluation.comparison import Estimate
from r2vpo_megatron.evaluation.markdown import escape_markdown, markdown_table
from r2vpo_megatron.evaluation.table import ResultTable, TableRow

AVERAGE = "average"
_ABSENT = "-"
_LEGEND = (
    "Pass@1 in percent, ± one standard error clustered by problem. Relative: average over the "
    "base's, with its 95% interval. Bold: the best of a model."
)
_DIFFERENCE_LEGEND = (
    "Difference from the base in percentage points, with its 95% interval, paired by problem."
)
_LATEX_SIGNS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def format_markdown(table: ResultTable) -> str:
    """Scores, then differences from the base, then notes."""
    header = ["Model", "Method", *table.titles.values(), "Average", "Relative"]
    rows: list[list[str]] = []
    differences: list[list[str]] = []
    bold: set[tuple[int, int]] = set()
    for model, members in table.groups.items():
        best = best_rows(members, list(table.titles))
        for row in members:
            bold |= {
                (len(rows), 2 + column)
                for column, name in enumerate([*table.titles, AVERAGE])
                if (row.label, name) in best
            }
            rows.append([model, row.label, *_score_cells(row, table), _relative(row.relative)])
            if row.differences:
                differences.append([model, row.label, *_difference_cells(row, table)])
    blocks = [markdown_table(header, rows, frozenset(bold)), _LEGEND]
    if table.settings:
        blocks.append(f"Settings: {escape_markdown(table.settings)}.")
    if differences:
        blocks += [markdown_table(header[:-1], differences), _DIFFERENCE_LEGEND]
    if table.notes:
        blocks.append("\n".join(f"- {escape_markdown(note)}" for note in table.notes))
    return "\n\n".join(blocks) + "\n"


def format_csv(table: ResultTable) -> str:
    """One line a method, all numbers in percent with their errors and intervals.

    Notes stand in the last column, on the first line.
    """
    header = ["model", "method", "is_base", "is_reported"]
    for name in [*table.titles, AVERAGE]:
        header += [name, f"{name}_standard_error", f"{name}_low", f"{name}_high"]
        header += [f"{name}_difference", f"{name}_difference_standard_error"]
        header += [f"{name}_difference_low", f"{name}_difference_high", f"{name}_paired"]
    header += ["relative_improvement", "relative_improvement_standard_error"]
    header += ["relative_improvement_low", "relative_improvement_high", "notes"]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    notes = " ".join(table.notes)
    for model, members in table.groups.items():
        for row in members:
            line = [model, row.label, str(row.is_base).lower(), str(row.is_reported).lower()]
            for name in table.titles:
                line += _csv_cells(row.scores.get(name))
                line += _csv_contrast(row.differences.get(name))
            line += [*_csv_cells(row.average), *_csv_contrast(row.average_difference)]
            writer.writerow([*line, *_csv_cells(row.relative), notes])
            notes = ""
    return text.getvalue()


def format_latex(table: ResultTable) -> str:
    """A tabular for the booktabs package; notes and settings as comments before it."""
    titles = [*table.titles.values(), "Average", "Relative"]
    num_columns = 1 + len(titles)
    remarks = (_LEGEND, f"Settings: {table.settings}", *table.notes)
    lines = [f"% {' '.join(remark.split())}" for remark in remarks]
    lines += [
        "% Needs \\usepackage{booktabs}.",
        f"\\begin{{tabular}}{{l{'r' * len(titles)}}}",
        "\\toprule",
        " & ".join(["Method", *(escape_latex(title) for title in titles)]) + " \\\\",
    ]
    for model, members in table.groups.items():
        best = best_rows(members, list(table.titles))
        lines.append("\\midrule")
        lines.append(
            f"\\multicolumn{{{num_columns}}}{{l}}{{\\textit{{{escape_latex(model)}}}}} \\\\"
        )
        for row in members:
            cells = [escape_latex(cell) for cell in _score_cells(row, table)]
            names = [*table.titles, AVERAGE]
            cells = [
                f"\\textbf{{{cell}}}" if (row.label, name) in best else cell
                for name, cell in zip(names, cells, strict=True)
            ]
            cells.append(escape_latex(_relative(row.relative)))
            lines.append(" & ".join([escape_latex(row.label), *cells]) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join(lines) + "\n"


TABLE_FORMATS: dict[str, Callable[[ResultTable], str]] = {
    "markdown": format_markdown,
    "csv": format_csv,
    "latex": format_latex,
}
FORMAT_SUFFIXES = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is; control characters and line breaks become spaces."""
    text = "".join(sign if sign.isprintable() else " " for sign in text)
    return "".join(_LATEX_SIGNS.get(sign, sign) for sign in text)


def best_rows(rows: Sequence[TableRow], names: Sequence[str]) -> set[tuple[str, str]]:
    """(label, benchmark or "average") of the best measured values of one model.

    Values that print alike are equally good. With a single row there is nothing to mark.
    """
    measured = [row for row in rows if not row.is_reported]
    if len(measured) < 2:
        return set()
    best = set()
    for name in [*names, AVERAGE]:
        values = {
            row.label: f"{100 * estimate.value:.1f}"
            for row in measured
            if (estimate := row.average if name == AVERAGE else row.scores.get(name)) is not None
        }
        if len(values) > 1:
            top = max(values.values(), key=float)
            best |= {(label, name) for label, value in values.items() if value == top}
    return best


def _score_cells(row: TableRow, table: ResultTable) -> list[str]:
    estimates = [*(row.scores.get(name) for name in table.titles), row.average]
    return [_score(estimate) for estimate in estimates]


def _difference_cells(row: TableRow, table: ResultTable) -> list[str]:
    estimates = [*(row.differences.get(name) for name in table.titles), row.average_difference]
    return [_signed(estimate, "") for estimate in estimates]


def _score(estimate: Estimate | None) -> str:
    if estimate is None:
        return _ABSENT
    error = "" if estimate.error is None else f" ± {100 * estimate.error:.1f}"
    return f"{100 * estimate.value:.1f}{error}"


def _relative(estimate: Estimate | None) -> str:
    return _signed(estimate, "%")


def _signed(estimate: Estimate | None, unit: str) -> str:
    if estimate is None:
        return _ABSENT
    interval = estimate.interval
    shown = f"{100 * estimate.value:+.1f}{unit}"
    if interval is None or estimate.error == 0.0:  # no spread says nothing, not certainty
        return shown
    return f"{shown} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"


def _csv_cells(estimate: Estimate | None) -> list[str]:
    """Value, standard error and interval in percent; empty where unknown."""
    if estimate is None:
        return [""] * 4
    interval = estimate.interval or (None, None)
    numbers = [estimate.value, estimate.error, *interval]
    return ["" if number is None else f"{100 * number:.4f}" for number in numbers]


def _csv_contrast(estimate: Estimate | None) -> list[str]:
    paired = "" if estimate is None else str(estimate.paired).lower()
    return [*_csv_cells(estimate), paired]
