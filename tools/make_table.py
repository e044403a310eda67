"""Write the paper's Table 1 from the results of evaluations.

python tools/make_table.py outputs/evaluation                 # every results.json below it
python tools/make_table.py base/ grpo/ r2vpo/ --label GRPO=grpo/ --label R2VPO=r2vpo/
python tools/make_table.py RESULTS... --format all --output table1    # table1.md, .csv, .tex

Rows are grouped by the model that training started from; its own results are the base.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.cli.errors import run_command
from r2vpo_megatron.evaluation.markdown import printable
from r2vpo_megatron.evaluation.paper_results import REPORTED, load_reported
from r2vpo_megatron.evaluation.results import write_whole
from r2vpo_megatron.evaluation.table import ResultTable, build_table, load_entries
from r2vpo_megatron.evaluation.table_formats import FORMAT_SUFFIXES, TABLE_FORMATS


def main(arguments: list[str]) -> int:
    """Parse the command line, build the table and write it."""
    options = _parse(arguments)
    entries = load_entries(options.results, _parse_labels(options.label))
    table = build_table(
        entries,
        bases=options.base,
        reference=None if options.reference is None else load_reported(options.reference),
        allow_mismatch=options.allow_mismatch,
    )
    _write(table, options.format, options.output)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="results.json files or folders"
    )
    parser.add_argument(
        "--label", action="append", default=[], metavar="NAME=PATH", help="name of a row"
    )
    parser.add_argument(
        "--base", action="append", default=[], metavar="NAME", help="row that others improve on"
    )
    parser.add_argument("--format", choices=[*TABLE_FORMATS, "all"], default="markdown")
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write, printed if not given; with --format all without its suffix",
    )
    parser.add_argument(
        "--reference", help=f"append reported numbers: {', '.join(REPORTED)} or a .csv file"
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="also compare results of different settings, with a note that says so",
    )
    return parser.parse_args(arguments)


def _parse_labels(texts: Sequence[str]) -> dict[Path, str]:
    labels = {}
    for text in texts:
        # A name may hold "=", a path hardly does.
        name, separator, path = (part.strip() for part in text.rpartition("="))
        if not (separator and name and path):
            raise ValueError(f"--label {text!r}: valid: NAME=PATH")
        labels[Path(path)] = name
    return labels


def _write(table: ResultTable, name: str, output: Path | None) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    if name == "all":
        if output is None:
            raise ValueError("--format all: needs --output; valid: a path without suffix")
        for each, make in TABLE_FORMATS.items():
            write_whole(output.with_name(output.name + FORMAT_SUFFIXES[each]), make(table))
    elif output is None:
        sys.stdout.write(printable(TABLE_FORMATS[name](table), sys.stdout.encoding))
    else:
        write_whole(output, TABLE_FORMATS[name](table))


if __name__ == "__main__":
    sys.exit(run_command(main))
