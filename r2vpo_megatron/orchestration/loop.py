"""R2VPO (arXiv 2601.03320), Algorithms 1 and 2, as one loop.

        prompts                                   FIFO of the last iterations
           |                                                |
           v        token ids,          rewards,            v uniform mini-batches
      [ rollout ] -- log-probs --> [ score ] -- A_hat --> [ replay ] ------.
           ^        of pi_off                                              v
           |                                                          [ learner ]
           |            weights, version v + 1            rho, loss, step, E[(rho - 1)^2]
           '------------------------------------------------------- |       |
                                                                    v       v
                                                                 weights  lambda

Algorithm 1 (on-policy): replay of 1 iteration, UTD 1: each response is used once, then dropped.
Algorithm 2 (off-policy): replay of 4 iterations, UTD 2: each response is used twice on average,
by policies up to 3 iterations younger. Nothing below tells the two apart; configuration does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from r2vpo_megatron.config import AlgorithmConfig, RunConfig
from r2vpo_megatron.data.prompts import PromptStream
from r2vpo_megatron.evaluation.held_out import HeldOutSet
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.groups import LearnerGroup, RolloutGroup
from r2vpo_megatron.orchestration.iteration_metrics import Metrics, merge_updates, throughput
from r2vpo_megatron.orchestration.step_gate import check_first_update
from r2vpo_megatron.records import Prompt, Trajectory
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.rl.dual import DualSettings, DualVariable


@dataclass(frozen=True)
class Ring:
    """The parts that the loop turns; `orchestration.run` makes them."""

    prompts: PromptStream[Prompt]
    rollout: RolloutGroup
    collector: Collector
    replay: ReplayBuffer
    learner: LearnerGroup
    held_out: HeldOutSet | None


def train(
    config: RunConfig,
    ring: Ring,
    timers: StageTimers,
    on_update: Callable[[int, Metrics], None],
) -> Iterator[Metrics]:
    """Run all iterations; yields each one's metrics once its weights are on the engines.

    `on_update` gets the number, from 1 on, and the metrics of every optimizer step.
    """
    algorithm, batch_size = config.algorithm, config.train.mini_batch_samples
    dual = make_dual(algorithm)  # lambda
    has_penalty = algorithm.objective == "r2vpo"
    is_first_update = True

    for iteration in range(1, config.train.num_iterations + 1):
        # Sample G responses per prompt from pi_off, score them, and keep log pi_off.
        with timers.stage("collect"):
            trajectories, metrics = ring.collector.collect(ring.prompts.next_batch(), iteration)
            ring.replay.add(iteration, trajectories)

        # Update on uniform mini-batches of the buffer; lambda follows E[(rho - 1)^2].
        updates: list[Metrics] = []
        with timers.stage("learn"):
            samples = ring.replay.sample(
                config.updates_per_iteration * batch_size,
                with_replacement=config.replay.with_replacement,
            )
            for mini_batch in _mini_batches(
                samples, batch_size, algorithm.filter_zero_advantage_groups
            ):
                update = ring.learner.update(mini_batch, dual.value)
                if is_first_update:
                    check_first_update(update, config)
                    is_first_update = False
                updates.append(update | ({"ratio/penalty": dual.value} if has_penalty else {}))
                dual.step(update["ratio/second_moment"])
                on_update(dual.num_updates, updates[-1] | {"iteration": iteration})

        # The engines sample the next iteration from the new weights.
        with timers.stage("push"):
            metrics |= ring.learner.push_weights(ring.rollout, version=iteration)

        if ring.held_out is not None and _is_due(iteration, config):
            with timers.stage("evaluate"):
                metrics |= ring.held_out.evaluate(ring.rollout)

        metrics |= merge_updates(updates) | ring.replay.metrics() | timers.metrics(reset=True)
        yield {"iteration": iteration, **metrics, **throughput(metrics)}


def make_dual(algorithm: AlgorithmConfig) -> DualVariable:
    """Lambda as it is before the first update."""
    settings = DualSettings(
        target=algorithm.dual_target,
        step_size=algorithm.dual_step_size,
        gain=algorithm.dual_gain,
        minimum=algorithm.ratio_penalty_min,
        maximum=algorithm.ratio_penalty_max,
    )
    return DualVariable(algorithm.dual_controller, algorithm.ratio_penalty, settings)


def _mini_batches(
    samples: Sequence[Trajectory], size: int, filter_zero_advantage: bool
) -> Iterator[list[Trajectory]]:
    """Consecutive mini-batches; one that the filter leaves empty is skipped."""
    for start in range(0, len(samples), size):
        mini_batch = [
            sample
            for sample in samples[start : start + size]
            if sample.advantage != 0.0 or not filter_zero_advantage
        ]
        if mini_batch:
            yield mini_batch


def _is_due(iteration: int, config: RunConfig) -> bool:
    """Whether to evaluate after this iteration; the last is left to the closing evaluation."""
    every = config.evaluation.every_iterations
    return every > 0 and iteration % every == 0 and iteration < config.train.num_iterations
