"""One training run from a resolved configuration: set up, loop, report, clean up."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.config.sections import require_choice
from r2vpo_megatron.data.chat import ChatTokenizer, tokenize_prompts
from r2vpo_megatron.data.prompts import PromptStream, load_prompts
from r2vpo_megatron.evaluation.held_out import HeldOutSet
from r2vpo_megatron.models.spec import read_model_spec, validate_layout
from r2vpo_megatron.observability import (
    MetricsWriter,
    ProgressLine,
    StageTimers,
    write_run_config,
)
from r2vpo_megatron.observability.metric_names import RATIO_TARGET
from r2vpo_megatron.orchestration.cluster import ray_session
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.groups import LearnerGroup, RolloutGroup
from r2vpo_megatron.orchestration.iteration_metrics import Metrics
from r2vpo_megatron.orchestration.loop import Ring, train
from r2vpo_megatron.records import Prompt
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.report.learning_curve import plot_learning_curve
from r2vpo_megatron.rewards import load_reward
from r2vpo_megatron.rl.objectives import OBJECTIVES
from r2vpo_megatron.testbed.tiny_model import ensure_tiny_model
from r2vpo_megatron.weight_sync import BACKENDS


@dataclass(frozen=True)
class Inputs:
    """What a run reads: checked before any process starts."""

    model_dir: Path
    tokenizer: ChatTokenizer
    train_prompts: list[Prompt]
    held_out_prompts: list[Prompt]


def run_training(config: RunConfig, recipe: str) -> int:
    """Train as `config` says and write everything to a folder of its own.

    Args:
        config: resolved configuration.
        recipe: what it came from, `file.py:function`, for the records.

    Returns:
        0, the exit code of a finished run.

    Raises:
        ValueError: for bad input, before anything starts or is written.
        RuntimeError: if a stage fails; what was written before stays.
    """
    inputs = read_inputs(config)
    run_dir = _new_run_dir(config, recipe)
    write_run_config(run_dir, config.to_dict(), recipe)
    started = time.monotonic()
    print(
        f"{recipe} -> {run_dir}\nmodel {inputs.model_dir}; starting {config.parallel.num_ranks} "
        f"learner ranks (TP {config.parallel.tensor} x PP {config.parallel.pipeline} x "
        f"DP {config.parallel.data}) and {config.rollout.num_engines} rollout engines"
    )
    with _workers(config, inputs.model_dir) as (learner, rollout):
        ring = _make_ring(config, inputs, learner, rollout)
        before = ring.held_out.evaluate_both(rollout) if ring.held_out else {}
        print("before:", ", ".join(f"{name} {value:.3f}" for name, value in before.items()))
        _run_loop(config, ring, run_dir, before)
        after = ring.held_out.evaluate_both(rollout) if ring.held_out else {}
        learner.save_hf(run_dir / "hf")
    plot_learning_curve(run_dir / "metrics.jsonl", run_dir / "learning_curve.png")
    print(_summary(run_dir, before, after, time.monotonic() - started))
    return 0


def read_inputs(config: RunConfig) -> Inputs:
    """Check the configuration and read model description, tokenizer and prompts.

    Raises:
        ValueError: naming the field, file or line at fault, and what is valid.
    """
    config.validate()
    _require_packages(config)
    require_choice("algorithm.objective", config.algorithm.objective, OBJECTIVES)
    require_choice("weight_sync.backend", config.weight_sync.backend, BACKENDS)
    load_reward(config.data.reward)
    train_path, held_out_path = config.data.train_prompts, config.data.held_out_prompts
    model_dir = Path(config.model.path)
    if config.model.testbed:
        model_dir = ensure_tiny_model(
            Path(config.output.cache_dir), config.model.testbed, seed=config.train.seed
        )
        train_path = train_path or str(model_dir / "train.jsonl")
        held_out_path = held_out_path or str(model_dir / "held_out.jsonl")
    validate_layout(read_model_spec(model_dir), config.parallel.tensor, config.parallel.pipeline)
    tokenizer = ChatTokenizer(model_dir)

    def read_prompts(path: str) -> list[Prompt]:
        limit = config.rollout.max_prompt_tokens
        prompts, too_long = tokenize_prompts(load_prompts(path), tokenizer, limit)
        if too_long:
            print(f"{path}: left out {len(too_long)} prompts of over {limit} tokens")
        return prompts

    held_out = read_prompts(held_out_path)[: config.evaluation.num_prompts] if held_out_path else []
    return Inputs(model_dir, tokenizer, read_prompts(train_path), held_out)


def _require_packages(config: RunConfig) -> None:
    """Fail now, and not after hours, where a package that the run will need is missing."""
    packages = ["vllm", "matplotlib", *(["tensorboard"] if config.output.tensorboard else [])]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@contextmanager
def _workers(config: RunConfig, model_dir: Path) -> Iterator[tuple[LearnerGroup, RolloutGroup]]:
    """Both groups, started side by side; gone, with their Ray, when the block ends."""
    num_actors = config.parallel.num_ranks + config.rollout.num_engines
    with ray_session(config.runtime.ray_address, num_actors):
        learner, rollout = LearnerGroup(config, model_dir), RolloutGroup(config, model_dir)
        pending = (learner.start(), rollout.start())
        learner.wait_started(pending[0])
        rollout.wait_started(pending[1])
        yield learner, rollout
        rollout.stop()


def _make_ring(
    config: RunConfig, inputs: Inputs, learner: LearnerGroup, rollout: RolloutGroup
) -> Ring:
    reward, seed = load_reward(config.data.reward), config.train.seed
    held_out = HeldOutSet(
        prompts=inputs.held_out_prompts,
        tokenizer=inputs.tokenizer,
        reward=reward,
        max_response_tokens=config.rollout.max_response_tokens,
        seed=seed,
    )
    return Ring(
        prompts=PromptStream(inputs.train_prompts, seed, config.train.prompts_per_iteration),
        rollout=rollout,
        collector=Collector(config, inputs.tokenizer, reward, rollout, learner),
        replay=ReplayBuffer(config.replay.capacity_iterations, seed),
        learner=learner,
        held_out=held_out if inputs.held_out_prompts else None,
    )


def _run_loop(config: RunConfig, ring: Ring, run_dir: Path, before: Metrics) -> None:
    """Turn the ring, writing and showing each iteration's metrics."""
    with (
        MetricsWriter(run_dir, tensorboard=config.output.tensorboard) as writer,
        ProgressLine(config.train.num_iterations) as progress,
    ):
        writer.write(0, before)
        timers = StageTimers(on_enter=progress.stage)
        for metrics in train(config, ring, timers):
            iteration = int(metrics.pop("iteration"))
            if config.algorithm.dual_controller != "fixed":
                metrics[RATIO_TARGET] = config.algorithm.dual_target
            writer.write(iteration, metrics)
            progress.update(iteration, metrics)
            if metrics["logprob_gap/mean"] > config.runtime.logprob_gap_alarm:
                progress.message(
                    f"iteration {iteration}: engine and learner log-probs differ by "
                    f"{metrics['logprob_gap/mean']:.3f} on average (alarm at "
                    f"{config.runtime.logprob_gap_alarm:g}; runtime.logprob_gap_alarm)"
                )


def _new_run_dir(config: RunConfig, recipe: str) -> Path:
    """Make the run's folder; a name that is taken is refused, nothing is overwritten."""
    name = config.output.run_name
    if not name:
        name = f"{recipe.rpartition(':')[2] or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = Path(config.output.dir) / name
    try:
        run_dir.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"output.run_name = {name!r}: {run_dir} exists; choose another") from None
    return run_dir


def _summary(run_dir: Path, before: Metrics, after: Metrics, seconds: float) -> str:
    """The closing lines: accuracy before and after, and where everything lies."""
    labels = {
        "evaluation/accuracy": "held-out accuracy, temperature 1.0",
        "evaluation/accuracy_greedy": "held-out accuracy, greedy",
    }
    lines = [
        f"{label}: {before[name]:.3f} -> {after[name]:.3f} ({after[name] - before[name]:+.3f})"
        for name, label in labels.items()
        if name in before
    ]
    lines.append(f"finished in {seconds / 60:.1f} min; everything lies in {run_dir}:")
    files = {
        "metrics.jsonl": "metrics of each iteration",
        "config.json": "resolved configuration, versions, commit",
        "learning_curve.png": "learning curve",
        "hf": "final weights in Hugging Face format",
    }
    lines += [f"  {name:<20} {meaning}" for name, meaning in files.items()]
    return "\n".join(lines)
