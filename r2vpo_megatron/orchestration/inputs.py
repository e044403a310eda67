"""What a run reads, checked before any process starts: every mistake of the user ends here."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.megatron_keys import open_checkpoint
from r2vpo_megatron.checkpoint.run_differences import fingerprint_model, fingerprint_tokenizer
from r2vpo_megatron.checkpoint.run_folder import go_back_to
from r2vpo_megatron.checkpoint.tensor_check import check_tensors, entries_of
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.config.checks import require, require_choice
from r2vpo_megatron.data.chat import CHAT_TEMPLATES, ChatTokenizer, tokenize_prompts
from r2vpo_megatron.data.prompts import fingerprint_prompts, load_prompts
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec, validate_parallel
from r2vpo_megatron.observability import write_run_config
from r2vpo_megatron.orchestration.resume import (
    RunLock,
    choose_checkpoint,
    find_resume_point,
    require_same_run,
)
from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards import FORMAT_CHECKS, RewardFunction, load_reward
from r2vpo_megatron.rewards.preflight import check_answer_form
from r2vpo_megatron.rl.aggregation import AGGREGATIONS
from r2vpo_megatron.rl.objectives import OBJECTIVES
from r2vpo_megatron.testbed.tiny_model import ensure_tiny_model
from r2vpo_megatron.weight_sync import choose_backend


@dataclass(frozen=True)
class RunInputs:
    """What a run reads.

    Attributes:
        config: resolved: concrete device and weight back end, absolute paths.
        model_dir: the checkpoint to start from.
        spec: its architecture.
        tokenizer: its tokenizer and chat template.
        train_prompts, held_out_prompts: tokenised; the latter may be empty.
    """

    config: RunConfig
    model_dir: Path
    spec: ModelSpec
    tokenizer: ChatTokenizer
    train_prompts: list[Prompt]
    held_out_prompts: list[Prompt]


@dataclass(frozen=True)
class PreparedRun(RunInputs):
    """A run that can start.

    Attributes:
        recipe: where the configuration came from, `file.py:function`.
        run_dir: the run's own folder, holding config.json.
        lock: on that folder; whoever trains releases it.
        resume: folder of the checkpoint that it goes on from; None for a run that begins.
        facts: what its checkpoints say of it, in JSON values.
    """

    recipe: str
    run_dir: Path
    lock: RunLock
    resume: Path | None
    facts: dict[str, Any]


def prepare_run(config: RunConfig, recipe: str) -> PreparedRun:
    """Check all that can be known before processes start, then make and lock the run's folder.

    Raises:
        ValueError: naming the field, file or line at fault, and what is valid; or another process
            is at work in the run's folder, where nothing has been touched then.
        ModuleNotFoundError: a package that the run will need is missing.
    """
    inputs = read_inputs(config)
    config, model_dir = inputs.config, inputs.model_dir
    facts = _facts(config, recipe, model_dir, inputs.train_prompts)
    run_dir, resume, lock = enter_run(config, recipe, facts, model_dir)
    return PreparedRun(
        **{field.name: getattr(inputs, field.name) for field in fields(inputs)},
        recipe=recipe,
        run_dir=run_dir,
        lock=lock,
        resume=resume,
        facts=facts,
    )


def read_inputs(config: RunConfig) -> RunInputs:
    """Read model, tokenizer and prompts, and check them and the configuration; nothing is written.

    Raises:
        ValueError: naming the field, file or line at fault, and what is valid.
        ModuleNotFoundError: a package that the run will need is missing.
    """
    config.validate()
    _require_packages(config)
    require_choice("algorithm.objective", config.algorithm.objective, OBJECTIVES)
    require_choice("algorithm.aggregation", config.algorithm.aggregation, AGGREGATIONS)
    require_choice("data.chat_template", config.data.chat_template, CHAT_TEMPLATES)
    for name in config.algorithm.format_check_names:
        require_choice("algorithm.format_checks", name, FORMAT_CHECKS)
    reward = load_reward(config.data.reward)
    # Workers have other working directories, and may see other devices than the driver.
    device = get_platform(config.runtime.device).name
    config = replace(config, runtime=replace(config.runtime, device=device))
    backend = choose_backend(
        config.weight_sync.backend, device, is_one_machine=not config.runtime.ray_address
    )
    config = replace(config, weight_sync=replace(config.weight_sync, backend=backend))
    model_dir, train_path, held_out_path = _find_inputs(config)
    spec = read_model_spec(model_dir)
    config = _check_weights(config, spec)
    _check_fit(config, spec)
    tokenizer = ChatTokenizer(model_dir, config.data.chat_template, config.data.thinking)
    limit = config.rollout.max_prompt_tokens
    train_prompts = _read_prompts(train_path, tokenizer, limit)
    held_out_prompts = _read_prompts(held_out_path, tokenizer, limit) if held_out_path else []
    # The testbed's model learns the form in its warm start; its own prompts do not ask for one.
    if config.data.check_answer_form and config.data.train_prompts:
        _check_answer_form(train_path, train_prompts, reward)
    return RunInputs(
        config=config,
        model_dir=model_dir,
        spec=spec,
        tokenizer=tokenizer,
        train_prompts=train_prompts,
        held_out_prompts=held_out_prompts[: config.evaluation.num_prompts],
    )


def enter_run(
    config: RunConfig, recipe: str, facts: dict[str, Any], model_dir: Path
) -> tuple[Path, Path | None, RunLock]:
    """Make or find the run's folder and lock it, before anything there is read or changed.

    Args:
        config: of the run.
        recipe: where it came from.
        facts: what the run is, to compare with those of its checkpoint.
        model_dir: of the model.

    Returns:
        The folder, the checkpoint to go on from, if any, and the lock.

    Raises:
        ValueError: another process is at work there, or what is there is not such a run.
    """
    point = find_resume_point(config)
    run_dir = point.run_dir if point else _make_run_dir(config, recipe)
    lock = RunLock(run_dir)
    try:
        manifest = choose_checkpoint(point, config, _say) if point else None
        if manifest is not None:
            require_same_run(manifest, facts, config, _say)
            _say(f"goes on from {manifest.folder}")
            for name in go_back_to(manifest.folder.parent, manifest.folder.name):
                _say(f"put aside, as the run goes on from an earlier one: {name}")
        write_run_config(run_dir, config.to_dict(), recipe, model_dir)
    except BaseException:
        lock.release()
        raise
    return run_dir, manifest.folder if manifest else None, lock


def _facts(
    config: RunConfig, recipe: str, model_dir: Path, train_prompts: list[Prompt]
) -> dict[str, Any]:
    """What makes a run the same run."""
    return {
        "recipe": recipe,
        "config": config.to_dict(),
        "fingerprints": {
            "model": fingerprint_model(model_dir, config.model.weights),
            "tokenizer": fingerprint_tokenizer(model_dir),
            "train_prompts": fingerprint_prompts(train_prompts),
        },
    }


def _say(text: str) -> None:
    print(text, flush=True)


def _require_packages(config: RunConfig) -> None:
    """Fail now, and not after hours, where a package that the run will need is missing."""
    packages = ["vllm", "matplotlib", *(["tensorboard"] if config.output.tensorboard else [])]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _find_inputs(config: RunConfig) -> tuple[Path, str, str]:
    """Model folder, training prompts, held-out prompts; the testbed's are made if need be."""
    train_path, held_out_path = config.data.train_prompts, config.data.held_out_prompts
    if not config.model.testbed:
        return Path(config.model.path).resolve(), train_path, held_out_path
    cache = Path(config.output.cache_dir).resolve()
    print(f"tiny {config.model.testbed} model: from {cache}, or made there (about a minute)")
    model_dir = ensure_tiny_model(cache, config.model.testbed, seed=config.train.seed)
    made = json.loads((model_dir / "manifest.json").read_text())["warm_start"]
    print(
        f"{model_dir}: warm-started in {made['seconds']:.0f} s to a held-out accuracy of "
        f"{made['held_out_accuracy_sampled']:.3f} at temperature 1.0"
    )
    return (
        model_dir,
        train_path or str(model_dir / "train.jsonl"),
        held_out_path or str(model_dir / "held_out.jsonl"),
    )


def _check_weights(config: RunConfig, spec: ModelSpec) -> RunConfig:
    """The configuration with `model.weights`, if any, as an absolute path of what fits."""
    if not config.model.weights:
        return config
    folder = Path(config.model.weights).resolve()
    try:
        with open_checkpoint(folder, spec) as checkpoint:
            check_tensors(entries_of(checkpoint), spec, folder)
    except ValueError as error:
        raise ValueError(f"model.weights = {config.model.weights!r}: {error}") from error
    return replace(config, model=replace(config.model, weights=str(folder)))


def _check_fit(config: RunConfig, spec: ModelSpec) -> None:
    """Check the layout and the lengths against the model."""
    validate_parallel(spec, config.parallel)
    rollout_tensor = config.rollout.tensor_parallel
    require(
        spec.num_heads % rollout_tensor == 0,
        "rollout.tensor_parallel",
        rollout_tensor,
        f"a divisor of the model's {spec.num_heads} attention heads",
    )
    require(
        config.max_sequence_tokens <= spec.max_positions,
        "rollout.max_response_tokens",
        config.rollout.max_response_tokens,
        f"with rollout.max_prompt_tokens {config.rollout.max_prompt_tokens} at most the model's "
        f"{spec.max_positions} positions",
    )


def _read_prompts(path: str, tokenizer: ChatTokenizer, max_tokens: int) -> list[Prompt]:
    prompts, too_long = tokenize_prompts(load_prompts(path), tokenizer, max_tokens)
    if too_long:
        print(f"{path}: left out {len(too_long)} prompts of over {max_tokens} tokens")
    return prompts


def _check_answer_form(path: str, prompts: list[Prompt], reward: RewardFunction) -> None:
    """Compare what the prompts ask for with what the reward reads."""
    try:
        note = check_answer_form(prompts, reward)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error} (data.check_answer_form = False skips this check)"
        ) from error
    if note:
        print(f"{path}: {note}")


def _make_run_dir(config: RunConfig, recipe: str) -> Path:
    """Make the run's folder; a name that is taken is refused, nothing is overwritten."""
    name = config.output.run_name
    if not name:
        function = recipe.rpartition(":")[2] or "run"
        name = f"{function}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = (Path(config.output.dir) / name).resolve()
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"output.run_name = {name!r}: {run_dir} exists; choose another") from None
    return run_dir
