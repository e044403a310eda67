"""One prepared training run: start the processes, turn the ring, report, clean up."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from r2vpo_megatron.checkpoint.run_folder import CHECKPOINTS_FOLDER, Position
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.conversion.folder_lock import take_lock
from r2vpo_megatron.data.prompts import PromptStream
from r2vpo_megatron.evaluation.held_out import HeldOutSet
from r2vpo_megatron.observability import MetricsWriter, ProgressLine, StageTimers, read_metrics
from r2vpo_megatron.observability.memory import resident_bytes
from r2vpo_megatron.observability.metric_names import RATIO_TARGET
from r2vpo_megatron.orchestration.checkpoints import (
    LEARNER_FOLDER,
    RunCheckpoints,
    Stateful,
    restore,
)
from r2vpo_megatron.orchestration.cluster import get_in_time, ray_session
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.guards import UpdateGuard
from r2vpo_megatron.orchestration.inputs import PreparedRun
from r2vpo_megatron.orchestration.interrupts import (
    Interrupts,
    StopRequested,
    end_by,
)
from r2vpo_megatron.orchestration.iteration_metrics import Metrics
from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.logprob_gap import LogprobGap
from r2vpo_megatron.orchestration.loop import Ring, make_dual, train
from r2vpo_megatron.orchestration.parity import require_parity
from r2vpo_megatron.orchestration.placement import needed_resources
from r2vpo_megatron.orchestration.progress import Progress, is_due
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.orchestration.run_report import describe_run, summarize_run
from r2vpo_megatron.orchestration.watchdog import explain_timeouts
from r2vpo_megatron.orchestration.weight_push import push_weights
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.report.learning_curve import plot_learning_curve
from r2vpo_megatron.rewards import load_reward
from r2vpo_megatron.weight_sync import requires_one_node

LOCK_FILE = ".lock"


def run_training(run: PreparedRun) -> None:
    """Train, and write metrics, checkpoints, learning curve and final weights to the run's folder.

    Raises:
        ValueError: another process is at work in the run's folder.
        RuntimeError: a stage failed; what was written before stays. Errors of workers keep their
            type.
        KeyboardInterrupt, SystemExit: a signal asked the run to end; see `Interrupts`.
    """
    started = time.monotonic()
    print(f"{run.recipe} -> {run.run_dir}", describe_run(run), sep="\n", flush=True)
    with _alone(run.run_dir), _workers(run) as (learner, rollout):
        ring = _make_ring(run, learner, rollout)
        before: Metrics | None = None
        if run.resume is None:
            _first_push(run, learner, rollout, version=0)
            before = ring.held_out.evaluate_both(rollout) if ring.held_out else {}
            # What the engines did until now is none of iteration 1.
            before |= rollout.metrics()
        else:
            learner.load_state(run.resume / LEARNER_FOLDER)
            _first_push(run, learner, rollout, Position.parse(run.resume.name).iteration)
            restore(run.resume, ring.replay, _parts(ring), ring.progress)
        _turn(run, ring, before)
        _save_final_weights(run.run_dir, learner)
    records = read_metrics(run.run_dir / "metrics.jsonl")
    plot_learning_curve(run.run_dir / "metrics.jsonl", run.run_dir / "learning_curve.png")
    print(summarize_run(run, records[0], records[-1], time.monotonic() - started))


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep other processes from going on with the same run; the lock ends with this process."""
    lock = take_lock(run_dir / LOCK_FILE)
    if lock is None:
        raise ValueError(f"{run_dir}: another process is at work on this run; wait for its end")
    try:
        yield
    finally:
        (run_dir / LOCK_FILE).unlink(missing_ok=True)
        os.close(lock)


@contextmanager
def _workers(run: PreparedRun) -> Iterator[tuple[LearnerGroup, RolloutPool]]:
    """Both groups, started side by side; gone, with their Ray, however the block ends."""
    config = run.config
    with ray_session(config, needed_resources(config)):
        learner, rollout = LearnerGroup(config, run.model_dir), RolloutPool(config, run.model_dir)
        try:
            with explain_timeouts(config.parallel.num_ranks, run.run_dir / "stacks.txt"):
                _require_reach(run, learner, rollout)
                # Side by side, and the first error of either ends the wait.
                starts = learner.begin_start() + rollout.begin_start()
                get_in_time(starts, config.runtime.timeout_seconds, "start")
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


def _first_push(
    run: PreparedRun, learner: LearnerGroup, rollout: RolloutPool, version: int
) -> None:
    """Give the engines the learner's weights before anything is sampled, and see that they fit.

    The engines have loaded the model folder themselves; only weights that came by the way that all
    later ones will take show that this way is sound.
    """

    def refresh() -> None:  # of an engine that had to be restarted
        push_weights(learner, rollout, rollout.policy_version, only_waiting=True)

    rollout.refresh = refresh
    rollout.on_event = lambda event: print(event, flush=True)  # until there is a progress line
    push_weights(learner, rollout, version)
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
        dual=make_dual(config.algorithm),
        guard=UpdateGuard(config.guard, run.run_dir),
        progress=Progress(),
    )


def _parts(ring: Ring) -> dict[str, Stateful]:
    """What a checkpoint has of the driver, beside the buffer and the progress."""
    return {"collector": ring.collector, "dual": ring.dual, "guard": ring.guard}


def _turn(run: PreparedRun, ring: Ring, before: Metrics | None) -> None:
    """Run all iterations that are left, writing and showing each one's metrics.

    Args:
        run: the run.
        ring: its parts.
        before: metrics of iteration 0; None where they have been written before.
    """
    config, run_dir = run.config, run.run_dir
    with (
        MetricsWriter(run_dir, tensorboard=config.output.tensorboard) as writer,
        MetricsWriter(run_dir, tensorboard=False, key="update") as update_writer,
        ProgressLine(config.train.num_iterations) as line,
        Interrupts(config.checkpoint.grace_seconds, line.message) as interrupts,
        closing(_checkpoints(run, ring, line.message)) as checkpoints,
    ):

        def attend() -> None:
            """Do what signals ask for; called where the learner is at rest."""
            checkpoints.poll()
            if interrupts.take_checkpoint_request():
                checkpoints.save()
            if interrupts.take_export_request():
                _export(run, ring, line.message)
            interrupts.raise_if_stopping()

        def on_update(number: int, metrics: Metrics) -> None:
            update_writer.write(number, metrics)
            attend()

        if before is not None:
            writer.write(0, before)
            line.update(0, before)
        ring.rollout.on_event = ring.guard.on_alarm = line.message
        ring.rollout.before_look = attend
        timers = StageTimers(on_enter=line.stage)
        try:
            for metrics, gap in train(config, ring, timers, on_update):
                iteration = int(metrics.pop("iteration"))
                metrics |= _machine_metrics(run, ring) | checkpoints.metrics()
                writer.write(iteration, metrics)
                line.update(iteration, metrics)
                _warn_of_gap(config, iteration, gap, line.message)
                if is_due(iteration, config.checkpoint.export_every_iterations):
                    _export(run, ring, line.message)
                checkpoints.after_iteration()
                attend()
            checkpoints.save(wait=True)
        except StopRequested:
            checkpoints.save(wait=True)
            assert interrupts.stop_signal is not None
            end_by(interrupts.stop_signal)


def _checkpoints(run: PreparedRun, ring: Ring, say: Callable[[str], None]) -> RunCheckpoints:
    return RunCheckpoints(
        config=run.config.checkpoint,
        root=run.run_dir / CHECKPOINTS_FOLDER,
        facts=run.facts,
        learner=ring.learner,
        replay=ring.replay,
        parts=_parts(ring),
        progress=ring.progress,
        say=say,
    )


def _export(run: PreparedRun, ring: Ring, say: Callable[[str], None]) -> None:
    """Write the current weights in Hugging Face format; those of before with this name stay."""
    folder = run.run_dir / "exports" / ring.progress.position.name
    try:
        if not folder.exists():
            ring.learner.save_hf(folder)
        say(f"weights: {folder}")
    except TimeoutError:  # an OSError, too: a rank does not answer
        raise
    except OSError as error:
        say(f"weights were not written to {folder}: {error}")


def _save_final_weights(run_dir: Path, learner: LearnerGroup) -> None:
    """Write RUN_DIR/hf; where the run had ended before and went on, it takes the place of that."""
    final, new, old = run_dir / "hf", run_dir / ".hf-new", run_dir / ".hf-old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    learner.save_hf(new)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _machine_metrics(run: PreparedRun, ring: Ring) -> Metrics:
    metrics = {"memory/driver_bytes": float(resident_bytes())} | ring.learner.memory_metrics()
    if run.config.algorithm.dual_controller != "fixed":
        metrics[RATIO_TARGET] = run.config.algorithm.dual_target
    return metrics


def _warn_of_gap(
    config: RunConfig, iteration: int, gap: LogprobGap, say: Callable[[str], None]
) -> None:
    if not gap.mean <= config.runtime.logprob_gap_alarm:  # not a number is an alarm too
        say(
            f"iteration {iteration}: engine and learner log-probs differ by "
            f"{gap.mean:.3f} on average (alarm at {config.runtime.logprob_gap_alarm:g}; "
            f"runtime.logprob_gap_alarm). The worst samples:\n{gap.table()}"
        )
