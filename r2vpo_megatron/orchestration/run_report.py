"""What a run prints about itself: what it is at its beginning, what came of it at its end."""

from __future__ import annotations

from r2vpo_megatron.orchestration.inputs import PreparedRun
from r2vpo_megatron.orchestration.iteration_metrics import Metrics


def describe_run(run: PreparedRun) -> str:
    """Model, device and layout, in a line."""
    parallel, rollout = run.config.parallel, run.config.rollout
    return (
        f"{run.spec.architecture}, {run.spec.num_parameters:,} parameters; on "
        f"{run.config.runtime.device}: {parallel.num_ranks} learner ranks (TP {parallel.tensor} x "
        f"PP {parallel.pipeline} x CP {parallel.context} x DP {parallel.data}), "
        f"{rollout.num_engines} rollout engines (TP {rollout.tensor_parallel})"
    )


def summarize_run(run: PreparedRun, before: Metrics, after: Metrics, seconds: float) -> str:
    """The closing lines: accuracy before and after, and where everything lies.

    Args:
        run: that is finished.
        before: metrics of the evaluation before the first iteration.
        after: of the last iteration.
        seconds: that this process has worked on it.
    """
    labels = {
        "evaluation/accuracy": "temperature 1.0",
        "evaluation/accuracy_greedy": "greedy",
    }
    lines = [
        f"held-out accuracy, {len(run.held_out_prompts)} unseen problems, {label}: "
        f"{before[name]:.3f} -> {after[name]:.3f} ({after[name] - before[name]:+.3f})"
        for name, label in labels.items()
        if name in before and name in after
    ]
    lines.append(f"finished in {seconds / 60:.1f} min; everything lies in {run.run_dir}:")
    files = {
        "metrics.jsonl": "metrics of each iteration",
        "updates.jsonl": "metrics of each optimizer step",
        "config.json": "resolved configuration, versions, commit",
        "learning_curve.png": "learning curve",
        "checkpoints": "the whole state, for --resume",
        "hf": "final weights in Hugging Face format",
    }
    lines += [f"  {name:<20} {meaning}" for name, meaning in files.items()]
    return "\n".join(lines)
