"""What an evaluation reads, checked before any process starts: every mistake ends here."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.megatron_keys import open_checkpoint
from r2vpo_megatron.checkpoint.tensor_check import check_tensors, entries_of
from r2vpo_megatron.config import ModelConfig, RolloutConfig, RunConfig, RuntimeConfig, TrainConfig
from r2vpo_megatron.conversion.folder_lock import take_lock
from r2vpo_megatron.data.chat import ChatTokenizer
from r2vpo_megatron.data.chat_templates import Message
from r2vpo_megatron.data.templates import PROMPT_TEMPLATES
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.evaluation.benchmarks import (
    BENCHMARKS,
    BenchmarkData,
    local_benchmark,
    read_benchmark,
)
from r2vpo_megatron.evaluation.model_folder import ModelFolder, find_model, fingerprint_model
from r2vpo_megatron.evaluation.options import DEFAULT_MAX_RESPONSE_TOKENS, EvaluationOptions
from r2vpo_megatron.evaluation.problem_rows import Problem
from r2vpo_megatron.evaluation.response_log import LOCK_FILE, ResponseLog, begin, go_on, is_free
from r2vpo_megatron.evaluation.runner import BenchmarkPrompts, Evaluation
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec
from r2vpo_megatron.observability import collect_provenance
from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards import RewardFunction, check_answer_form, load_reward


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that can start.

    Attributes:
        options: what the user asked for.
        model, fingerprint: what is evaluated.
        folder: of the evaluation, absolute, locked.
        data: the benchmarks as they were read.
        benchmarks: the same, tokenised.
        tokenizer: of the model.
        reward: judges the responses.
        config: of the engines; the lengths in it are those of this evaluation.
        evaluation: what is kept and what is to be made.
        log: keeps the responses.
    """

    options: EvaluationOptions
    model: ModelFolder
    fingerprint: str
    folder: Path
    data: tuple[BenchmarkData, ...]
    benchmarks: tuple[BenchmarkPrompts, ...]
    tokenizer: ChatTokenizer
    reward: RewardFunction
    config: RunConfig
    evaluation: Evaluation
    log: ResponseLog


@contextmanager
def prepare_evaluation(
    options: EvaluationOptions, output: Path | None, *, resume: bool
) -> Iterator[PreparedEvaluation]:
    """Check everything that can be known before processes start; hold the folder for the block.

    Args:
        options: of the evaluation.
        output: its folder; None: outputs/evaluation-MODEL-TIME.
        resume: go on with the evaluation in `output`, if one was begun there.

    Raises:
        ValueError: naming the flag, file, row or problem at fault, and what is valid.
        ModuleNotFoundError: vLLM is missing.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    reward = load_reward(options.reward)
    device = get_platform(options.device).name  # workers may see other devices than the driver
    model = find_model(options.model)
    spec = read_model_spec(model.folder)
    _check_model(model, spec, options)
    tokenizer = ChatTokenizer(model.folder, options.chat_template, options.thinking)
    data = tuple(_read_benchmark(name, options) for name in options.benchmarks)
    benchmarks = tuple(
        BenchmarkPrompts(part.name, _make_prompts(part.problems, options, tokenizer))
        for part in data
    )
    config = _engine_config(options, model, device, _fit_lengths(benchmarks, options, spec))
    if options.check_answer_form:
        for part in benchmarks:
            _check_answer_form(part, reward)
    fingerprint = fingerprint_model(model.folder)
    settings = _settings(options, model, fingerprint, data, config)
    default = Path("outputs") / f"evaluation-{model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = (output or default).resolve()
    with _folder_of(folder, settings, resume=resume):
        log = ResponseLog(folder, model.name)
        yield PreparedEvaluation(
            options=options,
            model=model,
            fingerprint=fingerprint,
            folder=folder,
            data=data,
            benchmarks=benchmarks,
            tokenizer=tokenizer,
            reward=reward,
            config=config,
            evaluation=Evaluation(benchmarks, options.num_samples, options.seed, log),
            log=log,
        )


@contextmanager
def _folder_of(folder: Path, settings: dict[str, Any], *, resume: bool) -> Iterator[None]:
    """Begin or go on with the evaluation in a folder that no other process writes meanwhile."""
    if not resume and not is_free(folder):
        begin(folder, settings)  # refuses, before a lock is left in what may not be ours
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder / LOCK_FILE)
    if lock is None:
        raise ValueError(f"--output {folder}: another process is at work there; valid: wait for it")
    try:
        if resume and not is_free(folder):
            go_on(folder, settings)
        else:
            begin(folder, settings)
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(lock)


def _check_model(model: ModelFolder, spec: ModelSpec, options: EvaluationOptions) -> None:
    """The weights are all there, and can be shared as asked."""
    try:
        with open_checkpoint(model.folder, spec) as checkpoint:
            check_tensors(entries_of(checkpoint), spec, model.folder)
    except ValueError as error:
        raise ValueError(f"--model {options.model}: {error}") from error
    if spec.num_heads % options.tensor_parallel:
        raise ValueError(
            f"--tensor-parallel {options.tensor_parallel}: not valid; valid: a divisor of the "
            f"model's {spec.num_heads} attention heads"
        )


def _read_benchmark(name: str, options: EvaluationOptions) -> BenchmarkData:
    limit, path = options.limit or None, options.file_of(name)
    if path is not None and name not in BENCHMARKS:
        return local_benchmark(name, path, limit)
    try:
        return read_benchmark(name, path, limit)
    except ValueError as error:
        if path is not None:
            raise
        hint = f"--benchmark-file {name}=FILE reads a local copy"
        raise ValueError(f"{error} ({hint})") from error


def _make_prompts(
    problems: Sequence[Problem], options: EvaluationOptions, tokenizer: ChatTokenizer
) -> list[Prompt]:
    """The words around each problem, then the chat template; ids are made here, once."""
    template = PROMPT_TEMPLATES[options.template]
    system: list[Message] = (
        [{"role": "system", "content": options.system}] if options.system else []
    )
    prompts = []
    for problem in problems:
        text = template.apply(problem.problem)
        token_ids = tokenizer.encode_prompt([*system, {"role": "user", "content": text}])
        prompts.append(Prompt(problem.problem_id, token_ids, problem.answer, text))
    return prompts


def _fit_lengths(
    benchmarks: Sequence[BenchmarkPrompts], options: EvaluationOptions, spec: ModelSpec
) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest response.

    Raises:
        ValueError: a prompt is too long, or leaves too little room; names the problem.
    """
    longest, where = max(
        (len(prompt.token_ids), f"problem {prompt.prompt_id!r} of {part.name}")
        for part in benchmarks
        for prompt in part.prompts
    )
    if options.max_prompt_tokens and longest > options.max_prompt_tokens:
        raise ValueError(
            f"--max-prompt-tokens {options.max_prompt_tokens}: {where} has {longest} tokens; "
            "valid: at least that many, since prompts are never cut"
        )
    room = spec.max_positions - longest
    if room < 1:
        raise ValueError(
            f"--benchmarks: {where} has {longest} tokens, and the model {spec.max_positions} "
            "positions for prompt and response; valid: problems that leave room for a response"
        )
    if options.max_response_tokens > room:
        raise ValueError(
            f"--max-response-tokens {options.max_response_tokens}: with the {longest} tokens of "
            f"{where} more than the model's {spec.max_positions} positions; valid: at most {room}"
        )
    return longest, options.max_response_tokens or _default_response_tokens(room)


def _default_response_tokens(room: int) -> int:
    """Round, so that a few tokens in the longest prompt do not make results incomparable."""
    rounded = room - room % 1024 if room >= 1024 else room
    return min(DEFAULT_MAX_RESPONSE_TOKENS, rounded)


def _engine_config(
    options: EvaluationOptions, model: ModelFolder, device: str, lengths: tuple[int, int]
) -> RunConfig:
    """What `RolloutPool` reads of a run's configuration; the rest stays as it is."""
    max_prompt_tokens, max_response_tokens = lengths
    return RunConfig(
        model=ModelConfig(path=str(model.folder), dtype=options.dtype),
        rollout=RolloutConfig(
            num_engines=options.num_engines,
            tensor_parallel=options.tensor_parallel,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
            max_num_seqs=options.max_num_seqs,
            kv_cache_bytes=options.kv_cache_bytes,
            memory_fraction=options.memory_fraction,
            threads_per_engine=options.threads_per_engine,
        ),
        train=TrainConfig(seed=options.seed),
        runtime=RuntimeConfig(
            device=device,
            ray_address=options.ray_address,
            object_store_bytes=options.object_store_bytes,
            timeout_seconds=options.timeout_seconds,
        ),
    )


def _check_answer_form(part: BenchmarkPrompts, reward: RewardFunction) -> None:
    try:
        note = check_answer_form(part.prompts, reward)
    except ValueError as error:
        raise ValueError(
            f"benchmark {part.name}: {error} (--template, --reward; --no-check-answer-form skips "
            "this check)"
        ) from error
    if note:
        print(f"{part.name}: {note}")


def _reward_file(reward: str) -> dict[str, str]:
    """What is in the file of a user's reward; nothing for one that has a name."""
    path = Path(reward.rpartition(":")[0])
    if path.suffix != ".py" or not path.is_file():
        return {}
    return {"--reward (sha256)": hashlib.sha256(path.read_bytes()).hexdigest()}


def _settings(
    options: EvaluationOptions,
    model: ModelFolder,
    fingerprint: str,
    data: Sequence[BenchmarkData],
    config: RunConfig,
) -> dict[str, Any]:
    """What settings.json says. `deciding`: the same when the evaluation is gone on with."""
    return {
        "deciding": {
            "model (sha256)": fingerprint,
            "benchmarks (sha256)": {part.name: part.sha256 for part in data},
            **options.deciding(),
            **_reward_file(options.reward),
            "--max-response-tokens": config.rollout.max_response_tokens,
        },
        "model": {"path": options.model, "folder": str(model.folder)},
        "options": asdict(options),
        "provenance": collect_provenance(),
    }
