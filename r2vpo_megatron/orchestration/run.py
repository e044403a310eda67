"""One prepared training run: start the processes, turn the ring, report, clean up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from r2vpo_megatron.data.prompts import PromptStream
from r2vpo_megatron.evaluation.held_out import HeldOutSet
from r2vpo_megatron.observability import MetricsWriter, ProgressLine, StageTimers
from r2vpo_megatron.observability.memory import resident_bytes
from r2vpo_megatron.observability.metric_names import RATIO_TARGET
from r2vpo_megatron.orchestration.cluster import ray_session
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.inputs import PreparedRun
from r2vpo_megatron.orchestration.iteration_metrics import Metrics
from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.loop import Ring, train
from r2vpo_megatron.orchestration.parity import require_parity
from r2vpo_megatron.orchestration.placement import needed_resources
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.orchestration.weight_push import push_weights
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.report.learning_curve import plot_learning_curve
from r2vpo_megatron.rewards import load_reward
from r2vpo_megatron.weight_sync import requires_one_node


def run_training(run: PreparedRun) -> None:
    """Train, and write metrics, learning curve and final weights to the run's folder.

    Raises:
        RuntimeError: a stage failed; what was written before stays. Errors of workers keep their
            type.
    """
    started = time.monotonic()
    print(f"{run.recipe} -> {run.run_dir}", _describe(run), sep="\n", flush=True)
    with _workers(run) as (learner, rollout):
        _first_push(run, learner, rollout)
        ring = _make_ring(run, learner, rollout)
        before = ring.held_out.evaluate_both(rollout) if ring.held_out else {}
        after = _turn(run, ring, before)
        learner.save_hf(run.run_dir / "hf")
    plot_learning_curve(run.run_dir / "metrics.jsonl", run.run_dir / "learning_curve.png")
    print(_summary(run, before, after, time.monotonic() - started))


@contextmanager
def _workers(run: PreparedRun) -> Iterator[tuple[LearnerGroup, RolloutPool]]:
    """Both groups, started side by side; gone, with their Ray, however the block ends."""
    config = run.config
    with ray_session(config, needed_resources(config)):
        learner, rollout = LearnerGroup(config, run.model_dir), RolloutPool(config, run.model_dir)
        try:
            _require_reach(run, learner, rollout)
            # Side by side, and the first error of either ends the wait.
            starts = learner.begin_start() + rollout.begin_start()
            ray.get(starts, timeout=config.runtime.timeout_seconds)
            learner.finish_start()
            rollout.finish_start()
            yield learner, rollout
        finally:
            rollout.stop()


def _require_reach(run: PreparedRun, learner: LearnerGroup, rollout: RolloutPool) -> None:
    """Refuse now what the first push would refuse after all processes have started."""
    backend = run.config.weight_sync.backend
    if requires_one_node(backend) and rollout.node_ids() != {learner.node_id()}:
        raise RuntimeError(
            f"weight_sync.backend = {backend!r} needs learner rank 0 and all engines on one node, "
            "and Ray has placed them on several"
        )


def _first_push(run: PreparedRun, learner: LearnerGroup, rollout: RolloutPool) -> None:
    """Give the engines the learner's weights before anything is sampled, and see that they fit.

    The engines have loaded the model folder themselves; only weights that came by the way that all
    later ones will take show that this way is sound.
    """

    def refresh() -> None:  # of an engine that had to be restarted
        push_weights(learner, rollout, rollout.policy_version, only_waiting=True)

    rollout.refresh = refresh
    rollout.on_event = lambda event: print(event, flush=True)  # until there is a progress line
    push_weights(learner, rollout, version=0)
    prompts = run.train_prompts[: run.config.runtime.parity_samples]
    require_parity(learner, rollout, prompts, run.config.model.dtype)


def _make_ring(run: PreparedRun, learner: LearnerGroup, rollout: RolloutPool) -> Ring:
    config, seed = run.config, run.config.train.seed
    reward = load_reward(config.data.reward)
    held_out = HeldOutSet(
        prompts=run.held_out_prompts,
        tokenizer=run.tokenizer,
        reward=reward,
        max_response_tokens=config.rollout.max_response_tokens,
        seed=seed,
    )
    prompts = PromptStream(run.train_prompts, seed, config.train.prompts_per_iteration)
    return Ring(
        rollout=rollout,
        collector=Collector(config, run.tokenizer, reward, prompts, rollout, learner),
        replay=ReplayBuffer(
            config.replay.capacity_iterations, seed, config.replay.max_memory_bytes
        ),
        learner=learner,
        held_out=held_out if run.held_out_prompts else None,
    )


def _turn(run: PreparedRun, ring: Ring, before: Metrics) -> Metrics:
    """Run all iterations, writing and showing each one's metrics; the closing evaluation."""
    config, after = run.config, before
    with (
        MetricsWriter(run.run_dir, tensorboard=config.output.tensorboard) as writer,
        MetricsWriter(run.run_dir, tensorboard=False, key="update") as update_writer,
        ProgressLine(config.train.num_iterations) as progress,
    ):
        # What the engines did until now, in the first evaluation, is none of iteration 1.
        writer.write(0, before | ring.rollout.metrics())
        progress.update(0, before)
        timers = StageTimers(on_enter=progress.stage)
        ring.rollout.on_event = progress.message
        for metrics, gap in train(config, ring, timers, on_update=update_writer.write):
            iteration = int(metrics.pop("iteration"))
            metrics |= ring.learner.memory_metrics() | {
                "memory/driver_bytes": float(resident_bytes())
            }
            if config.algorithm.dual_controller != "fixed":
                metrics[RATIO_TARGET] = config.algorithm.dual_target
            if ring.held_out is not None and iteration == config.train.num_iterations:
                after = ring.held_out.evaluate_both(ring.rollout)
                metrics |= after
            writer.write(iteration, {**metrics, "logprob_gap/worst": gap.summary()})
            progress.update(iteration, metrics)
            if not gap.mean <= config.runtime.logprob_gap_alarm:  # not a number is an alarm too
                progress.message(
                    f"iteration {iteration}: engine and learner log-probs differ by "
                    f"{gap.mean:.3f} on average (alarm at {config.runtime.logprob_gap_alarm:g}; "
                    f"runtime.logprob_gap_alarm). The worst samples:\n{gap.table()}"
                )
    return after


def _describe(run: PreparedRun) -> str:
    parallel, rollout = run.config.parallel, run.config.rollout
    return (
        f"{run.spec.architecture}, {run.spec.num_parameters:,} parameters; on "
        f"{run.config.runtime.device}: {parallel.num_ranks} learner ranks (TP {parallel.tensor} x "
        f"PP {parallel.pipeline} x CP {parallel.context} x DP {parallel.data}), "
        f"{rollout.num_engines} rollout engines (TP {rollout.tensor_parallel})"
    )


def _summary(run: PreparedRun, before: Metrics, after: Metrics, seconds: float) -> str:
    """The closing lines: accuracy before and after, and where everything lies."""
    labels = {
        "evaluation/accuracy": "temperature 1.0",
        "evaluation/accuracy_greedy": "greedy",
    }
    lines = [
        f"held-out accuracy, {len(run.held_out_prompts)} unseen problems, {label}: "
        f"{before[name]:.3f} -> {after[name]:.3f} ({after[name] - before[name]:+.3f})"
        for name, label in labels.items()
        if name in before
    ]
    lines.append(f"finished in {seconds / 60:.1f} min; everything lies in {run.run_dir}:")
    files = {
        "metrics.jsonl": "metrics of each iteration",
        "updates.jsonl": "metrics of each optimizer step",
        "config.json": "resolved configuration, versions, commit",
        "learning_curve.png": "learning curve",
        "hf": "final weights in Hugging Face format",
    }
    lines += [f"  {name:<20} {meaning}" for name, meaning in files.items()]
    return "\n".join(lines)
