"""What the user asks of an evaluation, checked in one place: every error names the flag."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.config.sections import DEVICES, DTYPES
from r2vpo_megatron.data.chat_templates import CHAT_TEMPLATES, THINKING_SUFFIXES
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES
from r2vpo_megatron.evaluation.benchmarks import BENCHMARKS
from r2vpo_megatron.rollout.sampling import SamplingSettings

DEFAULT_SAMPLES = 32
DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.95
DEFAULT_MAX_RESPONSE_TOKENS = 32768  # where the model has as many positions

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # becomes the name of a file


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of one evaluation.

    The first group decides what the responses are; the second says where and how they are made
    and may differ when an evaluation is gone on with.

    Attributes:
        model: folder of a Hugging Face checkpoint, or of a training run that has ended.
        benchmarks: names, each once: of `BENCHMARKS` or of `benchmark_files`.
        benchmark_files: (name, path) of local files, in place of a benchmark's own source or for a
            benchmark of the user's.
        num_samples: k, responses to each problem.
        temperature, top_p: of the sampling; 1 and 1 where `greedy`.
        greedy: one response, of the most probable tokens.
        seed: with benchmark, problem and sample it decides the seed of each response.
        limit: the first so many problems of each benchmark; 0: all.
        template: the words around a problem, a key of `PROMPT_TEMPLATES`.
        system: system message; empty: none.
        chat_template: a key of `CHAT_TEMPLATES`; "model": the tokenizer's own.
        thinking: as `ChatTokenizer` takes it.
        reward: judges the responses; see `load_reward`.
        check_answer_form: refuse a template that asks for answers which the reward does not read.
        max_response_tokens: 0: what the model's positions leave, rounded down to a multiple of
            1024, at most 32768.
        max_prompt_tokens: longer prompts are refused, never cut; 0: the model's positions decide.
        dtype: of weights and KV cache.

        num_engines, tensor_parallel: vLLM engines, and devices of each.
        max_num_seqs: responses that an engine decodes at a time.
        chunk_responses: responses that are judged and kept at a time; 0: see `runner.chunk_size`.
        kv_cache_bytes: of one engine (cpu).
        memory_fraction: of a device's memory, for one engine (cuda, npu).
        threads_per_engine: CPU threads (cpu).
        device: "auto", "cpu", "cuda" or "npu".
        ray_address: of a running cluster; empty: one is started for the evaluation.
        object_store_bytes: shared memory of a Ray that is started here.
        timeout_seconds: longest that engines may take to start, or make no progress.

    Raises:
        ValueError: naming the flag, its value and what is valid.
    """

    model: str
    benchmarks: tuple[str, ...]
    benchmark_files: tuple[tuple[str, str], ...] = ()
    num_samples: int = DEFAULT_SAMPLES
    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = DEFAULT_TOP_P
    greedy: bool = False
    seed: int = 0
    limit: int = 0
    template: str = "dapo"
    system: str = ""
    chat_template: str = "model"
    thinking: str = ""
    reward: str = "math_dapo"
    check_answer_form: bool = True
    max_response_tokens: int = 0
    max_prompt_tokens: int = 0
    dtype: str = "bfloat16"

    num_engines: int = 1
    tensor_parallel: int = 1
    max_num_seqs: int = 256
    chunk_responses: int = 0
    kv_cache_bytes: int = 4 << 30
    memory_fraction: float = 0.85
    threads_per_engine: int = 1
    device: str = "auto"
    ray_address: str = ""
    object_store_bytes: int = 512 << 20
    timeout_seconds: float = 6 * 3600.0

    def __post_init__(self) -> None:
        self._check_benchmarks()
        self._check_sampling()
        _require_choice("--template", self.template, PROMPT_TEMPLATES)
        _require_choice("--chat-template", self.chat_template, CHAT_TEMPLATES)
        thinking_valid = f"one of {', '.join(name for name in THINKING_SUFFIXES if name)}, or empty"
        _require(self.thinking in THINKING_SUFFIXES, "--thinking", self.thinking, thinking_valid)
        _require_choice("--dtype", self.dtype, DTYPES)
        _require_choice("--device", self.device, DEVICES)
        for flag, value, minimum in (
            ("--samples", self.num_samples, 1),
            ("--seed", self.seed, 0),
            ("--limit", self.limit, 0),
            ("--max-response-tokens", self.max_response_tokens, 0),
            ("--max-prompt-tokens", self.max_prompt_tokens, 0),
            ("--engines", self.num_engines, 1),
            ("--tensor-parallel", self.tensor_parallel, 1),
            ("--max-num-seqs", self.max_num_seqs, 1),
            ("--chunk-responses", self.chunk_responses, 0),
            ("--kv-cache-bytes", self.kv_cache_bytes, 1),
            ("--threads-per-engine", self.threads_per_engine, 1),
            ("--object-store-bytes", self.object_store_bytes, 80 << 20),  # Ray's minimum
        ):
            _require(value >= minimum, flag, value, f"at least {minimum}")
        in_range = 0 < self.memory_fraction < 1
        _require(in_range, "--memory-fraction", self.memory_fraction, "between 0 and 1")
        in_range = 0 < self.timeout_seconds < math.inf
        _require(in_range, "--timeout-seconds", self.timeout_seconds, "above 0, in seconds")

    def sampling(
        self, max_response_tokens: int, stop_token_ids: tuple[int, ...]
    ) -> SamplingSettings:
        """The distribution that responses are drawn from."""
        if self.greedy:
            return SamplingSettings(max_response_tokens, stop_token_ids=stop_token_ids, greedy=True)
        return SamplingSettings(
            max_response_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop_token_ids=stop_token_ids,
        )

    def deciding(self) -> dict[str, Any]:
        """What decides the responses and verdicts, by flag; the same when gone on with.

        The model and the benchmarks are not in it: their contents count, not their names.
        """
        return {
            "--samples": self.num_samples,
            "--temperature": self.temperature,
            "--top-p": self.top_p,
            "--greedy": self.greedy,
            "--seed": self.seed,
            "--limit": self.limit,
            "--template": self.template,
            "--system": self.system,
            "--chat-template": self.chat_template,
            "--thinking": self.thinking,
            "--reward": self.reward,
            "--dtype": self.dtype,
        }

    def file_of(self, benchmark: str) -> Path | None:
        """The local file that was given for a benchmark, if any."""
        path = dict(self.benchmark_files).get(benchmark)
        return None if path is None else Path(path)

    def _check_benchmarks(self) -> None:
        file_names = [name for name, _ in self.benchmark_files]
        for name, path in self.benchmark_files:
            given = f"{name}={path}"
            _require(
                _NAME.fullmatch(name) is not None,
                "--benchmark-file",
                given,
                "NAME=PATH, with a name of letters, digits and . _ -",
            )
            _require(
                name != "average",
                "--benchmark-file",
                given,
                "another name; average is a column of tables",
            )
            _require(Path(path).is_file(), "--benchmark-file", given, f"{path} must be a file")
        _require_unique("--benchmark-file", file_names)
        _require(bool(self.benchmarks), "--benchmarks", "", _list_benchmarks(file_names))
        for name in self.benchmarks:
            if name not in BENCHMARKS and name not in file_names:
                nearest = difflib.get_close_matches(name, [*BENCHMARKS, *file_names], n=1)
                valid = _list_benchmarks(file_names)
                _require(False, "--benchmarks", name, valid, nearest)
        _require_unique("--benchmarks", self.benchmarks)

    def _check_sampling(self) -> None:
        if self.greedy:
            _require(
                self.num_samples == 1,
                "--samples",
                self.num_samples,
                "1 with --greedy, which would give the same response each time",
            )
            for flag, value in (("--temperature", self.temperature), ("--top-p", self.top_p)):
                _require(value == 1.0, flag, value, "left out with --greedy")
        # The range in which vLLM samples at exactly the temperature that it was given.
        in_range = 0.01 <= self.temperature <= 2
        valid = "0.01 to 2; --greedy takes the most probable tokens"
        _require(in_range, "--temperature", self.temperature, valid)
        _require(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0, at most 1 (off)")


def _require(
    condition: bool, flag: str, value: Any, valid: str, nearest: Collection[str] = ()
) -> None:
    if not condition:
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise ValueError(f"{flag} {value}: not valid{hint}; valid: {valid}")


def _require_choice(flag: str, value: str, choices: Collection[str]) -> None:
    nearest = difflib.get_close_matches(value, choices, n=1)
    _require(value in choices, flag, value, f"one of {', '.join(choices)}", nearest)


def _require_unique(flag: str, names: Collection[str]) -> None:
    for name, count in Counter(names).items():
        _require(count == 1, flag, name, f"each name once, not {count} times")


def _list_benchmarks(file_names: Collection[str]) -> str:
    known = ", ".join([*BENCHMARKS, *(name for name in file_names if name not in BENCHMARKS)])
    return f"any of {known}, with commas between; yours: --benchmark-file NAME=PATH"
