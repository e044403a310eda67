"""A self-test that needs no reference: with a learning rate of 0 every ratio must stay 1.

Prompts, temperatures, positions, weights, caches, versions and the buffer all have to be right for
that, on the engines and on the learner, for as long as the run lasts. So a run in each pipeline
mode is made, long enough for samples to grow old, and the second moment of the ratio must stay at
what rounding leaves of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.observability import read_metrics
from r2vpo_megatron.observability.metric_names import RATIO_SECOND_MOMENT

# Largest E[(rho - 1)^2] of an iteration. Rounding on two sides that batch differently leaves
# about 1e-10 in fp32 and 1e-3 in bf16; any of the faults above leaves more than 0.1.
NOISE_FLOOR = {"float32": 1e-8, "bfloat16": 2e-2}
# The last fifth of the iterations may have this many times the mean of the first: a leak of old
# weights or caches grows with age, rounding does not.
MAX_GROWTH = 5.0
NOTICEABLE = 1e-3  # of the noise floor; single tokens move what is below
MODES = ("synchronous", "asynchronous")


@dataclass(frozen=True)
class SelfTestResult:
    """What one run of the self-test has shown.

    Attributes:
        mode: of its pipeline.
        num_iterations: that it made.
        mean, max: of E[(rho - 1)^2] over the iterations.
        first_fifth, last_fifth: its mean over the first and the last iterations.
        gap: mean absolute difference of the log-probs, in nats.
        staleness: largest, in versions, of a sample that was new to an iteration.
        age: largest, in iterations, of a sample that was learned from.
        faults: why it failed; empty where it passed.
    """

    mode: str
    num_iterations: int
    mean: float
    max: float
    first_fifth: float
    last_fifth: float
    gap: float
    staleness: int
    age: int
    faults: tuple[str, ...]

    def row(self) -> str:
        """One line for a person."""
        verdict = "passed" if not self.faults else "FAILED: " + "; ".join(self.faults)
        return (
            f"{self.mode:12}  {self.num_iterations} iterations  E[(rho - 1)^2]: mean "
            f"{self.mean:.1e}, max {self.max:.1e}, first fifth {self.first_fifth:.1e}, last "
            f"{self.last_fifth:.1e}  log-prob gap {self.gap:.1e}  staleness up to "
            f"{self.staleness}, age up to {self.age}  {verdict}"
        )


def self_test_config(config: RunConfig, mode: str) -> RunConfig:
    """The configuration of one run: the recipe's in everything but what the test is about.

    The engines' own log-probs are the denominator, so that both sides enter into every ratio.
    """
    return replace(
        config,
        optimizer=replace(config.optimizer, lr=0.0),
        algorithm=replace(
            config.algorithm,
            behavior_logprobs="rollout",
            truncated_importance_cap=0.0,
            dual_controller="fixed",
            filter_zero_advantage_groups=False,
        ),
        pipeline=replace(config.pipeline, mode=mode),
        evaluation=replace(config.evaluation, every_iterations=0),
        output=replace(config.output, run_name=f"self-test-{mode}", tensorboard=False),
    )


def judge_run(records: Sequence[dict[str, float]], mode: str, dtype: str) -> SelfTestResult:
    """Judge a finished run by the metrics of its iterations.

    Args:
        records: of iterations 1, 2, ...; at least one.
        mode: of the pipeline.
        dtype: of the weights, "float32" or "bfloat16".
    """
    # Under a fractional UTD an iteration may have no update.
    learned = [record for record in records if RATIO_SECOND_MOMENT in record]
    moments = np.array([record[RATIO_SECOND_MOMENT] for record in learned])
    fifth = max(len(moments) // 5, 1)
    first, last = float(moments[:fifth].mean()), float(moments[-fifth:].mean())
    allowed = NOISE_FLOOR[dtype]
    faults = []
    if not moments.max() <= allowed:
        worst = int(np.argmax(np.where(np.isnan(moments), np.inf, moments)))
        faults.append(
            f"E[(rho - 1)^2] is {moments[worst]:.1e} at iteration {learned[worst]['iteration']}, "
            f"above the noise floor of {allowed:g} in {dtype}"
        )
    if not last <= max(MAX_GROWTH * first, allowed * NOTICEABLE):
        faults.append(f"it grew {last / first if first else np.inf:.1f} times over the run")
    staleness = int(max(record["pipeline/staleness_max"] for record in records))
    if mode == "asynchronous" and len(records) > 1 and not staleness:
        faults.append("no sample was stale: rollout and learner did not overlap")
    return SelfTestResult(
        mode=mode,
        num_iterations=len(records),
        mean=float(moments.mean()),
        max=float(moments.max()),
        first_fifth=first,
        last_fifth=last,
        gap=float(np.mean([record.get("logprob_gap/mean", 0.0) for record in records])),
        staleness=staleness,
        age=int(max(record["replay/sampled_age_max"] for record in records)),
        faults=tuple(faults),
    )


def run_self_test(config: RunConfig, train: Callable[[RunConfig], Path]) -> list[SelfTestResult]:
    """Make one run in each mode and judge it.

    Args:
        config: of the recipe to test; its number of iterations is that of each run.
        train: makes a run and gives its folder.

    Raises:
        ValueError: one of the modes does not go with the recipe; nothing has been run then.
    """
    configs = {mode: self_test_config(config, mode) for mode in MODES}
    for of_mode in configs.values():
        of_mode.validate()
    results = []
    for mode, of_mode in configs.items():
        run_dir = train(of_mode)
        records = [
            record for record in read_metrics(run_dir / "metrics.jsonl") if record["iteration"] > 0
        ]
        results.append(judge_run(records, mode, config.model.dtype))
    return results
