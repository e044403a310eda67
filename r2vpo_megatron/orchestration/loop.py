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

Nor whether rollout and learner take turns. The engines sample by themselves, in `rollout`;
`collect` starts what they may be doing meanwhile and waits for what is to be learned now.

    synchronous     rollout 1 | learn 1 | push | rollout 2 | learn 2 | push | ...
    asynchronous    rollout 1 | rollout 2 ........ | rollout 3 ........ | ...
                              | learn 1     | push | learn 2     | push | ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from r2vpo_megatron.config import AlgorithmConfig, RunConfig
from r2vpo_megatron.evaluation.held_out import HeldOutSet
from r2vpo_megatron.observability import StageTimers
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.orchestration.guards import UpdateGuard
from r2vpo_megatron.orchestration.iteration_metrics import Metrics, merge_updates, throughput
from r2vpo_megatron.orchestration.learner_group import LearnerGroup
from r2vpo_megatron.orchestration.logprob_gap import LogprobGap
from r2vpo_megatron.orchestration.progress import Progress, is_due
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.orchestration.step_gate import check_first_update
from r2vpo_megatron.orchestration.weight_push import push_weights
from r2vpo_megatron.replay import ReplayBuffer
from r2vpo_megatron.rl.dual import DualSettings, DualVariable


@dataclass(frozen=True)
class Ring:
    """The parts that the loop turns; `orchestration.run` makes them."""

    rollout: RolloutPool
    collector: Collector
    replay: ReplayBuffer
    learner: LearnerGroup
    held_out: HeldOutSet | None
    dual: DualVariable  # lambda
    guard: UpdateGuard
    progress: Progress  # where the loop begins, and where it stands
    timers: StageTimers


def train(
    config: RunConfig, ring: Ring, on_update: Callable[[int, Metrics], None]
) -> Iterator[tuple[Metrics, LogprobGap]]:
    """Run all iterations; yields each one's metrics once its weights are on the engines.

    With them comes how far the engines' log-probs were from the learner's, sample by sample.
    `on_update` gets the number, from 1 on, and the metrics of every optimizer step, and may end
    the loop by an exception: `ring.progress` is then where it can be taken up again.
    """
    algorithm, dual, progress, timers = config.algorithm, ring.dual, ring.progress, ring.timers
    has_penalty = algorithm.objective == "r2vpo"
    if progress.collected is None:
        timers.restart()  # what came before is no part of the iteration

    while progress.iteration <= config.train.num_iterations:
        iteration, gap = progress.iteration, LogprobGap()

        # G responses per prompt, sampled from pi_off: score them, and keep log pi_off.
        if progress.collected is None:
            with timers.stage("collect"):
                collected = ring.collector.collect(iteration)
                ring.replay.add(iteration, collected.trajectories)
                gap = collected.gap
                progress.undrawn = ring.replay.state_dict()
                worst = {"logprob_gap/worst": gap.summary()}
                progress.collected = collected.metrics | gap.metrics() | worst

        # Update on uniform mini-batches of the buffer; lambda follows E[(rho - 1)^2].
        with timers.stage("learn"):
            mini_batches = ring.replay.mini_batches(
                config.updates_in_iteration(iteration),
                config.train.mini_batch_samples,
                with_replacement=config.replay.with_replacement,
            )
            for number, mini_batch in enumerate(mini_batches, start=1):
                if algorithm.filter_zero_advantage_groups:
                    mini_batch = [sample for sample in mini_batch if sample.advantage != 0.0]
                if not mini_batch or number <= progress.num_mini_batches:
                    continue
                penalty = {"ratio/penalty": dual.value} if has_penalty else {}
                result = ring.learner.update(mini_batch, dual.value, policy_version=iteration - 1)
                if ring.guard.accept(result, mini_batch, iteration):
                    if dual.num_updates == 0:
                        check_first_update(result.metrics, config)
                    dual.step(result.metrics["ratio/second_moment"])
                    progress.updates.append(result.metrics | penalty)
                progress.num_mini_batches = number
                metrics = result.metrics | penalty | {"guard/skipped": float(not result.is_made)}
                on_update(ring.guard.num_updates, metrics | {"iteration": iteration})

        # The engines go on with the new weights.
        with timers.stage("push"):
            pushed = push_weights(ring.learner, ring.rollout, version=iteration)

        metrics = progress.collected | pushed
        if ring.held_out is not None and _is_evaluated(iteration, config):
            with timers.stage("evaluate"):
                is_last = iteration == config.train.num_iterations
                evaluate = ring.held_out.evaluate_both if is_last else ring.held_out.evaluate
                metrics |= evaluate(ring.rollout)

        metrics |= merge_updates(progress.updates) | ring.guard.metrics()
        metrics |= ring.replay.metrics() | ring.rollout.metrics() | timers.metrics(reset=True)
        progress.begin_next()
        yield {"iteration": iteration, **metrics, **throughput(metrics)}, gap


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


def _is_evaluated(iteration: int, config: RunConfig) -> bool:
    is_last = iteration == config.train.num_iterations
    return is_last or is_due(iteration, config.evaluation.every_iterations)
