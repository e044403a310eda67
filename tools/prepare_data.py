"""Prepare a data set for training: one .parquet file of prompts, and a manifest beside it.

python tools/prepare_data.py --source dapo-math-17k --output dapo.parquet
python tools/prepare_data.py --source jsonl problems.jsonl --answer-column gold --output p.parquet
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from r2vpo_megatron.data.chat_templates import CHAT_TEMPLATES, THINKING_SUFFIXES
from r2vpo_megatron.data.language import LANGUAGES
from r2vpo_megatron.data.prepare import OVERLAP_KINDS, Prepared, PrepareOptions, prepare, write
from r2vpo_megatron.data.prepared_file import manifest_path
from r2vpo_megatron.data.problem_keys import CONFLICT_KEYS
from r2vpo_megatron.data.sources import SOURCES, SourceOptions
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, prepare, write, and print what every step did."""
    given = _parser().parse_args(arguments)
    try:
        options = _options(given)
        prepared = _prepare(options)
        _print_report(prepared)
        if given.dry_run:
            print("dry run: nothing was written")
            return 0
        manifest = write(options, prepared)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {manifest['output']['num_rows']:,} prompts")
    print(f"{manifest_path(options.output)}: counts, hashes, conflicts and overlap")
    return 0


def _prepare(options: PrepareOptions) -> Prepared:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with progress:
        task = progress.add_task("rows", total=None)
        return prepare(options, on_rows=lambda count: progress.update(task, completed=count))


def _print_report(prepared: Prepared) -> None:
    seen = prepared.statistics
    print(
        f"{seen.num_rows:>11,}  rows read, {seen.num_with_template:,} with a prompt template, "
        f"{seen.num_with_chinese:,} with Chinese characters"
    )
    print(
        f"{'':>11}  of these unique: {seen.num_unique_messages:,} texts, "
        f"{seen.num_unique_texts:,} problems, {seen.num_layout_keys:,} in more than layout, "
        f"{seen.num_ascii_keys:,} in a-z and 0-9"
    )
    for step in prepared.steps:
        print(f"{-step.num_removed:>11,}  {step.name}: {step.num_left:,} left")
    if prepared.conflicts:
        print(f"{'':>11}  ({len(prepared.conflicts)} groups had conflicting labels)")
    for found in prepared.overlaps:
        print(
            f"overlap with {found.name}: {found.num_exact} of {found.num_problems} problems "
            f"exactly, {found.num_prefix} by their beginning"
        )


def _options(given: argparse.Namespace) -> PrepareOptions:
    return PrepareOptions(
        source=SourceOptions(
            source=given.source,
            location=given.location or "",
            split=given.split,
            config_name=given.config,
            revision=given.revision,
            problem_column=given.problem_column,
            answer_column=given.answer_column,
            id_column=given.id_column,
        ),
        output=given.output,
        template=given.template,
        language=given.language,
        conflict_key=given.conflict_key,
        tokenizer=given.tokenizer,
        max_prompt_tokens=given.max_prompt_tokens,
        chat_template=given.chat_template,
        thinking=given.thinking,
        evaluation_files=_named_files(given.evaluation_files),
        drop_overlap=given.drop_overlap,
        overwrite=given.overwrite or given.dry_run,  # a dry run replaces nothing
    )


def _named_files(given: list[str]) -> dict[str, Path]:
    """NAME=PATH, each name once."""
    files: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--evaluation-files {text}: valid: NAME=PATH")
        if name in files:
            raise ValueError(f"--evaluation-files {text}: the name is taken by {files[name]}")
        files[name] = Path(path)
    return files


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", choices=list(SOURCES), required=True, help="how to read it")
    parser.add_argument(
        "location",
        nargs="?",
        metavar="PATH_OR_HUB_ID",
        help="file, folder laid out as a hub data set, or owner/name; default: the source's own",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.parquet")
    parser.add_argument("--split", default="train", help="of a data set on the hub")
    parser.add_argument("--config", default="", metavar="NAME", help="of one with several")
    parser.add_argument("--revision", default=None, help="of it: branch, tag or commit")
    parser.add_argument("--problem-column", default="", metavar="NAME", help="dots reach inside")
    parser.add_argument("--answer-column", default="", metavar="NAME", help="dots reach inside")
    parser.add_argument(
        "--id-column", default="", metavar="NAME", help="default: ids made from the problems"
    )
    parser.add_argument(
        "--template", choices=list(PROMPT_TEMPLATES), default="dapo", help="words around a problem"
    )
    parser.add_argument("--language", choices=LANGUAGES, default="all")
    parser.add_argument(
        "--conflict-key",
        choices=list(CONFLICT_KEYS),
        default="",
        help="what problems have in common whose labels must agree; default: the source's",
    )
    _add_token_options(parser)
    parser.add_argument(
        "--evaluation-files",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="report which of their problems are in the data",
    )
    parser.add_argument(
        "--drop-overlap", choices=OVERLAP_KINDS, default="none", help="and leave those out"
    )
    parser.add_argument("--dry-run", action="store_true", help="count, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    return parser


def _add_token_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", type=Path, metavar="MODEL_DIR", help="count tokens with this model's"
    )
    parser.add_argument("--max-prompt-tokens", type=int, help="leave longer prompts out")
    parser.add_argument("--chat-template", choices=list(CHAT_TEMPLATES), default="model")
    parser.add_argument(
        "--thinking",
        choices=[name for name in THINKING_SUFFIXES if name],
        default="",
        help="openPangu's ways to think",
    )


if __name__ == "__main__":
    sys.exit(main())
