"""Evaluate: `python -m r2vpo_megatron.cli.evaluate --model FOLDER --benchmarks aime24,amc23`."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from r2vpo_megatron.cli.errors import EXIT_INTERRUPTED, TRACEBACK_FLAG, RunFailed, run_command
from r2vpo_megatron.data.chat_templates import CHAT_TEMPLATES
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES
from r2vpo_megatron.evaluation.options import (
    DEFAULT_MAX_RESPONSE_TOKENS,
    DEFAULT_SAMPLES,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
    EvaluationOptions,
)

PROGRAM = "python -m r2vpo_megatron.cli.evaluate"
ERROR_FILE = "error.txt"
DEFAULT_BENCHMARKS = "aime24,aime25,amc23,hmmt_feb25,olymmath"  # of the paper's Table 1

_DESCRIPTION = (
    "Sample responses to benchmarks with vLLM, judge them, and write Pass@1 with its standard "
    "error, pass@k, maj@k, lengths and every response to a folder."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(_evaluate, arguments)


def _evaluate(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    options = _options(given)
    if given.resume and given.output is None:
        raise ValueError("--resume: needs the --output folder of the evaluation to go on with")
    # Torch and Ray come with these: seconds that a wrong flag should not have to wait for.
    from r2vpo_megatron.evaluation.markdown import printable
    from r2vpo_megatron.evaluation.results import MARKDOWN_FILE
    from r2vpo_megatron.orchestration.evaluate import run_evaluation
    from r2vpo_megatron.orchestration.evaluation_inputs import prepare_evaluation

    with prepare_evaluation(options, given.output, resume=given.resume) as prepared:
        folder = prepared.folder
        hint = f"what was judged is kept in {folder}; the same command with "
        hint += f"--resume --output {folder} goes on"
        try:
            run_evaluation(prepared)
        except KeyboardInterrupt:
            print(f"interrupted; {hint}", file=sys.stderr)
            return EXIT_INTERRUPTED
        except Exception as error:
            print(hint, file=sys.stderr)
            raise RunFailed(error, folder / ERROR_FILE) from error
    (folder / ERROR_FILE).unlink(missing_ok=True)  # of an earlier attempt
    page = (folder / MARKDOWN_FILE).read_text(encoding="utf-8")
    print(printable(page, sys.stdout.encoding))
    print(_where(folder))
    return 0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to tell and the text does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", False, []) or "(default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as `run_command` does: one line, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        flag = next((word for word in message.split() if word.startswith("--")), "")
        known = [option for action in self._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(flag.partition("=")[0], known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest and nearest[0] not in message else ""
        raise ValueError(f"{message}{hint} (--help lists all)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=_DESCRIPTION,
        epilog=f"{TRACEBACK_FLAG} shows where an error was raised.",
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    _add_what(parser)
    _add_sampling(parser)
    _add_prompt(parser)
    _add_machines(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model",
        required=True,
        metavar="FOLDER",
        help="Hugging Face checkpoint, or a training run: its final weights",
    )
    group.add_argument(
        "--benchmarks",
        metavar="NAMES",
        default=argparse.SUPPRESS,
        help="names with commas between; NAME=PATH reads a local .jsonl or .parquet file (default: "
        f"{DEFAULT_BENCHMARKS}, or only what --benchmark-file gives)",
    )
    group.add_argument(
        "--benchmark-file",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=PATH",
        help="read a benchmark from a local file: a known name, or one of your own; repeatable",
    )
    group.add_argument(
        "--limit", type=int, default=0, help="first so many problems of each benchmark; 0: all"
    )
    group.add_argument(
        "--output",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="FOLDER",
        help="folder to make (default: outputs/evaluation-MODEL-TIME)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the evaluation in --output, if one was begun there",
    )
    parser.set_defaults(output=None, benchmarks="", benchmark_file=[])


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    options = EvaluationOptions
    group.add_argument(
        "--samples",
        type=int,
        metavar="K",
        help=f"responses to each problem (default: {DEFAULT_SAMPLES}, 1 with --greedy)",
        default=argparse.SUPPRESS,
    )
    for flag, default in (("--temperature", DEFAULT_TEMPERATURE), ("--top-p", DEFAULT_TOP_P)):
        group.add_argument(
            flag,
            type=float,
            default=argparse.SUPPRESS,
            help=f"(default: {default:g}; not with --greedy)",
        )
    group.add_argument("--greedy", action="store_true", help="take the most probable tokens")
    group.add_argument("--seed", type=int, default=options.seed, help="of all responses")
    group.add_argument(
        "--max-response-tokens",
        type=int,
        default=options.max_response_tokens,
        help="longer responses are cut off; 0: what the model's positions leave, at most "
        f"{DEFAULT_MAX_RESPONSE_TOKENS}",
    )
    group.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=options.max_prompt_tokens,
        help="longer prompts are refused; 0: the model's positions decide",
    )
    parser.set_defaults(samples=None, temperature=None, top_p=None)


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and judging")
    options = EvaluationOptions
    group.add_argument(
        "--template",
        default=options.template,
        help=f"words around a problem: {', '.join(PROMPT_TEMPLATES)}",
    )
    group.add_argument("--system", default=options.system, metavar="TEXT", help="system message")
    group.add_argument(
        "--chat-template",
        default=options.chat_template,
        help=f"model: the tokenizer's own; plain: no markers; all: {', '.join(CHAT_TEMPLATES)}",
    )
    group.add_argument(
        "--thinking",
        default=options.thinking,
        help="of an openPangu model: slow, fast or auto; empty: its own way",
    )
    group.add_argument(
        "--reward",
        default=options.reward,
        help="judges responses: a name, package.module:function or path/to/file.py:function",
    )
    group.add_argument(
        "--check-answer-form",
        action=argparse.BooleanOptionalAction,
        default=options.check_answer_form,
        help="refuse a template whose form of answer the reward does not read",
    )


def _add_machines(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines")
    options = EvaluationOptions
    for flag, kind, default, text in (
        ("--engines", int, options.num_engines, "vLLM engines, data parallel"),
        ("--tensor-parallel", int, options.tensor_parallel, "devices of each engine"),
        ("--max-num-seqs", int, options.max_num_seqs, "responses decoded at a time, per engine"),
        (
            "--chunk-responses",
            int,
            options.chunk_responses,
            "responses that are judged and kept at a time; 0: about twice --max-num-seqs",
        ),
        ("--kv-cache-bytes", int, options.kv_cache_bytes, "of each engine (cpu)"),
        (
            "--memory-fraction",
            float,
            options.memory_fraction,
            "of a device's memory, for each engine (cuda, npu)",
        ),
        ("--threads-per-engine", int, options.threads_per_engine, "CPU threads (cpu)"),
        ("--dtype", str, options.dtype, "of weights: float32 or bfloat16"),
        ("--device", str, options.device, "auto, cpu, cuda or npu"),
        ("--ray-address", str, options.ray_address, "running Ray cluster; empty: start one"),
        (
            "--object-store-bytes",
            int,
            options.object_store_bytes,
            "shared memory of a Ray that is started",
        ),
        (
            "--timeout-seconds",
            float,
            options.timeout_seconds,
            "longest for engines to start, and without any progress",
        ),
    ):
        group.add_argument(flag, type=kind, default=default, help=text)


def _options(given: argparse.Namespace) -> EvaluationOptions:
    """Fill in what depends on other flags, and check all."""
    listed = [item.strip() for item in given.benchmarks.split(",") if item.strip()]
    named = [item for item in listed if "=" in item]
    files = [_split_file(item) for item in [*named, *given.benchmark_file]]
    names = [item.partition("=")[0].strip() for item in listed]
    names += [name for name, _ in files if name not in names]
    if not names and not given.benchmarks:
        names = DEFAULT_BENCHMARKS.split(",")
    greedy = given.greedy
    values = {
        name: getattr(given, name)
        for name in (field.name for field in fields(EvaluationOptions))
        if hasattr(given, name)
    }
    values |= {
        "benchmarks": tuple(names),
        "benchmark_files": tuple(files),
        "num_engines": given.engines,
        "num_samples": _default(given.samples, 1 if greedy else DEFAULT_SAMPLES),
        "temperature": _default(given.temperature, 1.0 if greedy else DEFAULT_TEMPERATURE),
        "top_p": _default(given.top_p, 1.0 if greedy else DEFAULT_TOP_P),
    }
    return EvaluationOptions(**values)


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _split_file(item: str) -> tuple[str, str]:
    name, separator, path = (part.strip() for part in item.partition("="))
    if not (name and separator and path):
        raise ValueError(f"--benchmark-file {item}: not valid; valid: NAME=PATH")
    return name, path


def _where(folder: Path) -> str:
    """The closing lines."""
    files = {
        "results.json": "all figures",
        "results.md": "the same, as above",
        "responses/": "every response, one .jsonl file a benchmark",
        "settings.json": "options, versions, commit",
    }
    lines = [f"  {name:<15} {meaning}" for name, meaning in files.items()]
    return "\n".join([f"everything lies in {folder}:", *lines])


if __name__ == "__main__":
    sys.exit(main())
