from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.cli.evaluate import main
from r2vpo_megatron.evaluation.options import EvaluationOptions

Outcome = tuple[int, str, str]


class Evaluations:
    """Stands in for preparation and run, which import torch and start processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[EvaluationOptions, Path | None, bool]] = []
        self.error: BaseException | None = None

    @contextmanager
    def prepare(self, options: Any, output: Any, *, resume: bool) -> Iterator[Any]:
        self.asked.append((options, output, resume))
        yield types.SimpleNamespace(folder=self.folder)

    def run(self, prepared: Any) -> None:
        if self.error is not None:
            raise self.error
        (prepared.folder / "results.md").write_text("| Benchmark | Pass@1 |\n")


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Evaluations:
    stand_in = Evaluations(tmp_path)
    inputs = types.ModuleType("r2vpo_megatron.orchestration.evaluation_inputs")
    inputs.prepare_evaluation = stand_in.prepare  # type: ignore[attr-defined]
    running = types.ModuleType("r2vpo_megatron.orchestration.evaluate")
    running.run_evaluation = stand_in.run  # type: ignore[attr-defined]
    for module in (inputs, running):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str) -> Outcome:
        code = main(list(arguments))
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def test_the_command_of_the_paper(evaluations: Evaluations, run: Callable[..., Outcome]) -> None:
    names = "aime24,aime25,amc23,hmmt_feb25,olymmath"
    code, out, error = run(
        *("--model", "m", "--benchmarks", names, "--samples", "32"),
        *("--temperature", "0.6", "--top-p", "0.95"),
    )
    assert (code, error) == (0, "")
    assert "| Benchmark | Pass@1 |" in out
    assert f"everything lies in {evaluations.folder}" in out
    ((options, output, resume),) = evaluations.asked
    assert options == EvaluationOptions(model="m", benchmarks=tuple(names.split(",")))
    assert (options.num_samples, options.temperature, options.top_p) == (32, 0.6, 0.95)
    assert (output, resume) == (None, False)


def test_without_benchmarks_it_is_the_paper_s_five(
    evaluations: Evaluations, run: Callable[..., Outcome]
) -> None:
    assert run("--model", "m")[0] == 0
    (options, *_), *_ = evaluations.asked
    assert options.benchmarks == ("aime24", "aime25", "amc23", "hmmt_feb25", "olymmath")


def test_every_flag_arrives(
    evaluations: Evaluations, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("{}\n")
    code, _, error = run(
        *("--model", "m", "--benchmarks", f"amc23, other={file}", "--benchmark-file"),
        *(f"mine={file}", "--benchmark-file", f"amc23={file}", "--samples=3", "--temperature", "1"),
        *("--top-p", "0.5", "--seed", "5", "--limit", "7", "--template", "boxed", "--system", "S"),
        *("--chat-template", "plain", "--reward", "math_dapo_minerva", "--no-check-answer-form"),
        *("--max-response-tokens", "11", "--max-prompt-tokens", "12", "--dtype", "float32"),
        *("--engines", "2", "--tensor-parallel", "4", "--max-num-seqs", "13"),
        *("--chunk-responses", "14", "--kv-cache-bytes", "15", "--memory-fraction", "0.5"),
        *("--threads-per-engine", "16", "--device", "cpu", "--ray-address", "auto"),
        *("--object-store-bytes", "100000000", "--timeout-seconds", "17", "--thinking", "fast"),
        *("--output", "out", "--resume"),
    )
    assert (code, error) == (0, "")
    ((options, output, resume),) = evaluations.asked
    assert (output, resume) == (Path("out"), True)
    assert options == EvaluationOptions(
        model="m",
        benchmarks=("amc23", "other", "mine"),
        benchmark_files=(("other", str(file)), ("mine", str(file)), ("amc23", str(file))),
        num_samples=3,
        temperature=1.0,
        top_p=0.5,
        seed=5,
        limit=7,
        template="boxed",
        system="S",
        chat_template="plain",
        thinking="fast",
        reward="math_dapo_minerva",
        check_answer_form=False,
        max_response_tokens=11,
        max_prompt_tokens=12,
        dtype="float32",
        num_engines=2,
        tensor_parallel=4,
        max_num_seqs=13,
        chunk_responses=14,
        kv_cache_bytes=15,
        memory_fraction=0.5,
        threads_per_engine=16,
        device="cpu",
        ray_address="auto",
        object_store_bytes=100000000,
        timeout_seconds=17.0,
    )


def test_a_file_alone_is_what_is_evaluated(
    evaluations: Evaluations, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "a=b.jsonl"
    file.write_text("{}\n")
    assert run("--model", "m", "--benchmark-file", f"mine={file}")[0] == 0
    (options, *_), *_ = evaluations.asked
    assert options.benchmarks == ("mine",)
    assert options.file_of("mine") == file
    assert options.file_of("aime24") is None


def test_greedy_is_one_sample_without_temperature(
    evaluations: Evaluations, run: Callable[..., Outcome]
) -> None:
    assert run("--model", "m", "--greedy")[0] == 0
    (options, *_), *_ = evaluations.asked
    assert options.num_samples == 1
    sampling = options.sampling(100, (2,))
    assert sampling.greedy
    assert (sampling.max_response_tokens, sampling.stop_token_ids) == (100, (2,))
    drawn = EvaluationOptions(model="m", benchmarks=("amc23",)).sampling(100, (2,))
    assert (drawn.greedy, drawn.temperature, drawn.top_p) == (False, 0.6, 0.95)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--samples", "0"], "--samples 0: not valid; valid: at least 1"),
        (["--samples", "-1"], "--samples -1: not valid; valid: at least 1"),
        (["--samples", "many"], "argument --samples: invalid int value: 'many'"),
        (["--samples"], "argument --samples: expected one argument"),
        (["--temperature", "0"], "--temperature 0.0: not valid; valid: 0.01 to 2; --greedy"),
        (["--temperature", "2.1"], "--temperature 2.1: not valid; valid: 0.01 to 2"),
        (["--temperature", "nan"], "--temperature nan: not valid; valid: 0.01 to 2"),
        (["--top-p", "0"], "--top-p 0.0: not valid; valid: above 0, at most 1"),
        (["--top-p", "1.5"], "--top-p 1.5: not valid"),
        (["--limit", "-1"], "--limit -1: not valid; valid: at least 0"),
        (["--seed", "-1"], "--seed -1: not valid"),
        (["--engines", "0"], "--engines 0: not valid; valid: at least 1"),
        (["--memory-fraction", "1"], "--memory-fraction 1.0: not valid; valid: between 0 and 1"),
        (["--timeout-seconds", "inf"], "--timeout-seconds inf: not valid"),
        (["--dtype", "fp16"], "--dtype fp16: not valid; valid: one of float32, bfloat16"),
        (["--device", "gpu"], "--device gpu: not valid"),
        (["--template", "box"], "--template box: not valid; did you mean boxed?; valid: one of "),
        (["--chat-template", "chatml"], "--chat-template chatml: not valid"),
        (["--thinking", "hard"], "--thinking hard: not valid; valid: one of slow, fast, auto"),
        (["--benchmarks", "aime"], "--benchmarks aime: not valid; did you mean aime2"),
        (["--benchmarks", "aime24,AMC"], "--benchmarks AMC: not valid"),
        (
            ["--benchmarks", "aime24,aime24"],
            "--benchmarks aime24: not valid; valid: each name once",
        ),
        (["--benchmarks", ","], "--benchmarks : not valid; valid: any of aime24, "),
        (["--benchmarks", "x=/no/file"], "--benchmark-file x=/no/file: not valid; valid: /no/file"),
        (["--benchmark-file", "mine"], "--benchmark-file mine: not valid; valid: NAME=PATH"),
        (["--benchmark-file", "=a"], "--benchmark-file =a: not valid; valid: NAME=PATH"),
        (["--benchmark-file", "../x=/"], "--benchmark-file ../x=/: not valid; valid: NAME=PATH, "),
        (
            ["--benchmark-file", "average=/"],
            "--benchmark-file average=/: not valid; valid: another",
        ),
        (["--greedy", "--samples", "2"], "--samples 2: not valid; valid: 1 with --greedy"),
        (["--greedy", "--top-p", "0.9"], "--top-p 0.9: not valid; valid: left out with --greedy"),
        (["--greedy", "--temperature", "0"], "--temperature 0.0: not valid; valid: left out"),
        (["--resume"], "--resume: needs the --output folder"),
        (["--sample", "3"], "unrecognized arguments: --sample 3; did you mean --samples?"),
        (["aime24"], "unrecognized arguments: aime24"),
    ],
)
def test_a_mistake_is_one_line_and_starts_nothing(
    evaluations: Evaluations, run: Callable[..., Outcome], arguments: list[str], expected: str
) -> None:
    code, out, error = run("--model", "m", *arguments)
    assert (code, out, evaluations.asked) == (2, "", [])
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1


def test_a_name_given_to_two_files_is_refused(
    evaluations: Evaluations, run: Callable[..., Outcome], tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")
    twice = ["--benchmark-file", f"mine={file}"] * 2
    code, _, error = run("--model", "m", *twice)
    assert code == 2
    assert "--benchmark-file mine: not valid; valid: each name once, not 2 times" in error


def test_a_model_is_needed(evaluations: Evaluations, run: Callable[..., Outcome]) -> None:
    code, _, error = run("--benchmarks", "aime24")
    assert code == 2
    assert "the following arguments are required: --model" in error


def test_ctrl_c_says_how_to_go_on(evaluations: Evaluations, run: Callable[..., Outcome]) -> None:
    evaluations.error = KeyboardInterrupt()
    code, _, error = run("--model", "m")
    assert code == 130
    assert f"interrupted; what was judged is kept in {evaluations.folder}" in error
    assert f"--resume --output {evaluations.folder} goes on" in error


def test_a_failure_says_how_to_go_on(evaluations: Evaluations, run: Callable[..., Outcome]) -> None:
    evaluations.error = ValueError("the engine died\nsomewhere")
    code, _, error = run("--model", "m")
    assert code == 1
    assert f"--resume --output {evaluations.folder} goes on" in error
    assert "error: the run failed: ValueError: the engine died\n" in error
    assert "the engine died" in (evaluations.folder / "error.txt").read_text()
    evaluations.error = None
    assert run("--model", "m", "--resume", "--output", "x")[0] == 0
    assert not (evaluations.folder / "error.txt").exists()


def test_help_needs_no_framework() -> None:
    program = (
        "import sys\nfrom r2vpo_megatron.cli.evaluate import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "found = {'torch', 'ray', 'vllm', 'transformers', 'sympy'} & set(sys.modules)\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--benchmark-file NAME=PATH" in done.stdout
    assert "(default: None)" not in done.stdout
