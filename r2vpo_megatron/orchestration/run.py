"""One prepared training run: start the processes, turn the ring, report, clean up."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from r2vpo_megatron.checkpoint.host_random import HostRandom
from r2vpo_megatron.checkpoint.position import Position
from r2vpo_megatron.checkpoint.run_folder import CHECKPOINTS_FOLDER
from r2vpo_megatron.config import RunConfig
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
from r2vpo_megatron.orchestration.cluster import NoAnswer, get_in_time, ray_session
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.driver_watch import DriverWatch
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


def run_training(run: PreparedRun) -> None:
    """Train, and write metrics, checkpoints, learning curve and final weights to the run's folder.

    Raises:
        RuntimeError: a stage failed; what was written before stays. Errors of workers keep their
            type.
        KeyboardInterrupt, SystemExit: a signal asked the run to end; see `Interrupts`.
    """
    started = time.monotonic()
    print(f"{run.recipe} -> {run.run_dir}", describe_run(run), sep="\n", flush=True)
    interrupts = Interrupts(run.config.checkpoint.grace_seconds)
    with ExitStack() as stack:
        stack.callback(run.lock.release)
        stack.callback(interrupts.close)
        learner, rollout = stack.enter_context(_workers(run, interrupts))
        ring = _make_ring(run, learner, rollout)
        before = None
        if run.resume is None:
            before = _begin(run, ring)
        else:
            _go_on(run, ring, run.resume)
        _turn(run, ring, interrupts, before)
        save_weights(learner, run.run_dir / "hf")
    records = read_metrics(run.run_dir / "metrics.jsonl")
    plot_learning_curve(run.run_dir / "metrics.jsonl", run.run_dir / "learning_curve.png")
    print(summarize_run(run, records[0], records[-1], time.monotonic() - started))


@contextmanager
def _workers(
    run: PreparedRun, interrupts: Interrupts
) -> Iterator[tuple[LearnerGroup, RolloutPool]]:
    """Both groups, started side by side; gone, with their Ray, however the block ends."""
    config = run.config
    with ray_session(config, needed_resources(config)):
        learner, rollout = LearnerGroup(config, run.model_dir), RolloutPool(config, run.model_dir)
        try:
            with (
                explain_timeouts(config.parallel.num_ranks, run.run_dir / "stacks.txt"),
                learner.naming_lost_ranks(has_time=lambda: interrupts.stop_signal is None),
            ):
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


def _begin(run: PreparedRun, ring: Ring) -> Metrics:
    """Make the engines ready for iteration 1; metrics of what was there before."""
    _first_push(run, ring.learner, ring.rollout, version=0)
    before = ring.held_out.evaluate_both(ring.rollout) if ring.held_out else {}
    return before | ring.rollout.metrics()


def _go_on(run: PreparedRun, ring: Ring, checkpoint: Path) -> None:
    """Bring all parts to where the checkpoint was written.

    The engines call the weights by the iterations that are complete, also where they have learned
    from some mini-batches of the next: what is sampled from these is younger than it says.
    """
    ring.learner.load_state(checkpoint / LEARNER_FOLDER)
    iteration = Position.parse(checkpoint.name).iteration
    _first_push(run, ring.learner, ring.rollout, version=iteration)
    ring.rollout.metrics()  # what the engines did until now is none of the next iteration
    restore(checkpoint, ring.replay, _parts(ring), ring.progress)


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
        timers=StageTimers(),
    )


def _parts(ring: Ring) -> dict[str, Stateful]:
    """What a checkpoint has of the driver, beside the buffer and the progress."""
    return {
        "collector": ring.collector,
        "dual": ring.dual,
        "guard": ring.guard,
        "timers": ring.timers,
        "random": HostRandom(),
    }


def _turn(run: PreparedRun, ring: Ring, interrupts: Interrupts, before: Metrics | None) -> None:
    """Run all iterations that are left, writing and showing each one's metrics.

    Args:
        run: the run.
        ring: its parts.
        interrupts: takes signals meanwhile.
        before: metrics of iteration 0; None where they have been written before.
    """
    config, run_dir = run.config, run.run_dir
    with (
        MetricsWriter(run_dir, tensorboard=config.output.tensorboard) as writer,
        MetricsWriter(run_dir, tensorboard=False, key="update") as update_writer,
        ProgressLine(config.train.num_iterations) as line,
        interrupts,
        DriverWatch(2 * config.runtime.timeout_seconds) as watch,
        _checkpoints(run, ring, line.message) as checkpoints,
    ):
        interrupts.say = line.message

        def attend() -> None:
            """Do what signals ask for; called where the learner is at rest."""
            watch.beat()
            checkpoints.poll()
            interrupts.raise_if_stopping()
            if interrupts.take_checkpoint_request():
                checkpoints.save(is_asked_for=True)
            if interrupts.take_export_request():
                _export(run, ring, line.message)

        def on_update(number: int, metrics: Metrics) -> None:
            _record(update_writer, checkpoints, number, metrics)
            attend()

        if before is not None:
            writer.write(0, before)
            line.update(0, before)
        ring.rollout.on_event = ring.guard.on_alarm = line.message
        ring.rollout.before_look = attend

        def enter(stage: str) -> None:
            watch.beat(stage)
            line.stage(stage)

        ring.timers.on_enter = enter
        try:
            for metrics, gap in train(config, ring, on_update):
                iteration = int(metrics.pop("iteration"))
                metrics |= _machine_metrics(run, ring) | checkpoints.metrics()
                _record(writer, checkpoints, iteration, metrics)
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


def _record(
    writer: MetricsWriter, checkpoints: RunCheckpoints, number: int, metrics: Metrics
) -> None:
    """Write metrics; the checkpoint that is being written may be what fills the disk."""
    try:
        writer.write(number, metrics)
    except OSError:
        checkpoints.conclude()
        writer.write(number, metrics)


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
        resumed=run.resume,
    )


def _export(run: PreparedRun, ring: Ring, say: Callable[[str], None]) -> None:
    """Write the current weights in Hugging Face format."""
    folder = run.run_dir / "exports" / ring.progress.position.name
    try:
        save_weights(ring.learner, folder)
        say(f"weights: {folder}")
    except NoAnswer:  # an OSError, too
        raise
    except OSError as error:
        say(f"weights were not written to {folder}: {error}")


def save_weights(learner: LearnerGroup, folder: Path) -> None:
    """Write the weights in Hugging Face format, whole or not at all; those of before go then.

    Args:
        learner: all its ranks.
        folder: to make; a run that went back comes to the same place twice.
    """
    new, old = (folder.with_name(f".{folder.name}-{which}") for which in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    learner.save_hf(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
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
