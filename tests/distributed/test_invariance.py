"""The same update whatever the layout: no split changes loss, gradients, statistics or lambda.

Every layout takes three updates, on mini-batches of uneven length, with every objective, and is
compared with `reference_update`: textbook formulas in float64, one process, one batch.

It does so twice. In float64 (`float64_for_float32`: the whole learner, unchanged) nothing is left
but the order of sums, so a wrong factor or a token counted twice cannot hide in a tolerance: what
is compared agrees to 1e-12. In fp32, as it runs, what is left is the rounding of the model's
forward and backward pass; the tolerances below say how much of it there is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.parallel.state import destroy_parallel
from r2vpo_megatron.records import Trajectory
from r2vpo_megatron.rl.aggregation import AGGREGATIONS
from r2vpo_megatron.rl.objectives import OBJECTIVES
from tests.distributed.float64 import float64_for_float32
from tests.distributed.learner_runs import Case, learn, run_config, start_state
from tests.distributed.ranks import run_ranks
from tests.distributed.reference_update import (
    STALENESS_NAMES,
    Learned,
    as_vector,
    reference_updates,
    relative_error,
)
from tests.distributed.update_problem import (
    ALL,
    ONE_EACH,
    SOME,
    make_mini_batches,
    save_well_conditioned,
)

R2VPO, GRPO = Case("r2vpo", "token_mean"), Case("grpo", "sequence_mean")
TOPR, SPO = Case("topr_geometric", "token_sum"), Case("spo", "sequence_mean")
FAR = Case("r2vpo", "token_sum")  # with a ratio beyond the limit, see `far_off`
CASES = (
    R2VPO,
    Case("r2vpo", "sequence_mean"),
    FAR,
    Case("r2vpo", importance_cap=1.5),
    Case("r2vpo", "sequence_mean", entropy_coefficient=0.2),
    GRPO,
    Case("grpo_clip_high", "token_sum"),
    Case("gppo", "token_mean"),
    Case("topr", "sequence_mean"),
    TOPR,
    Case("topr_token", "token_mean"),
    SPO,
    Case("unclipped", "token_sum"),
)
FLOAT32_CASES = (R2VPO, GRPO, TOPR, SPO)

# Relative, of a norm where it is a tensor. In float64 the largest found is 7e-15 for what is
# measured, lambda and gradients, and 3e-13 for the way the weights went. In fp32 one rank alone
# is off by 7e-7 (the gradient as a whole) and 1.2e-6 (of a single parameter, the key bias); any
# layout by 1.7e-6 at most, and two layouts by 2.2e-6 from each other. Rounding of the log-probs
# does it, and SPO's gradient changes with them 1 / eps = 5 times as fast as the others': 1.9e-6
# as a whole, 2.8e-6 of a parameter.
EXACT, EXACT_WAY = 1e-12, 1e-11
FLOAT32_GRADIENT, FLOAT32_WHOLE_GRADIENT, SPO_FACTOR = 3e-6, 2e-6, 2.0
FLOAT32_METRIC, FLOAT32_PENALTY, FLOAT32_WEIGHT = 2e-6, 1e-6, 2e-7
# Sums of terms that cancel, and 1 + (rho - 1) where rho is almost 0: of the terms, which are
# about 1. Likewise what staleness has of a few tokens: in their second moment the rounding of a
# ratio near 1 shows.
OF_ONE = ("objective/mean", "ratio/min", "staleness_")


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work, and whose work it is."""

    parallel: ParallelConfig
    token_budget: int = SOME
    distributed: bool = True  # the optimizer
    checkpoint: str = "pangu-untied"


LAYOUTS = {
    "one": Layout(ParallelConfig(), ALL),
    "one_each": Layout(ParallelConfig(recompute="full"), ONE_EACH, distributed=False),
    "tp2": Layout(ParallelConfig(tensor=2)),
    "tp2_sp": Layout(ParallelConfig(tensor=2, sequence_parallel=True, recompute="core_attn"), ALL),
    "tp2_tied": Layout(ParallelConfig(tensor=2), checkpoint="pangu-tied"),
    # Two of four ranks hold nothing but padding of the vocabulary.
    "tp4": Layout(ParallelConfig(tensor=4), ALL),
    "tp4_sp": Layout(ParallelConfig(tensor=4, sequence_parallel=True, recompute="mlp"), ALL),
    "pp2": Layout(ParallelConfig(pipeline=2, recompute="mlp"), ONE_EACH),
    "pp2_tied": Layout(ParallelConfig(pipeline=2), distributed=False, checkpoint="pangu-tied"),
    "pp2_vpp2": Layout(ParallelConfig(pipeline=2, virtual_pipeline=2, recompute="full"), ONE_EACH),
    "pp2_uneven_tied": Layout(
        ParallelConfig(pipeline=2, pipeline_layout="3,1"), checkpoint="pangu-tied"
    ),
    "pp2_vpp2_uneven": Layout(
        ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layout="0,3,1,0"), ONE_EACH
    ),
    "tp2_pp2": Layout(ParallelConfig(tensor=2, pipeline=2, recompute="core_attn"), ALL),
    "tp2_pp2_sp_tied": Layout(
        ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True, recompute="full"),
        checkpoint="pangu-tied",
    ),
    "cp2": Layout(ParallelConfig(context=2, recompute="full")),
    "tp2_cp2": Layout(ParallelConfig(tensor=2, context=2), ALL),
    "tp2_cp2_sp": Layout(ParallelConfig(tensor=2, context=2, sequence_parallel=True)),
    "pp2_cp2_tied": Layout(ParallelConfig(pipeline=2, context=2), checkpoint="pangu-tied"),
    "cp2_dp2": Layout(ParallelConfig(context=2, data=2), distributed=False),
    "dp2": Layout(ParallelConfig(data=2)),
    "dp2_replicated": Layout(ParallelConfig(data=2), ONE_EACH, distributed=False),
    "dp3": Layout(ParallelConfig(data=3)),
    "tp2_dp2": Layout(ParallelConfig(tensor=2, data=2), ALL),
}


def far_off(mini_batches: Sequence[Sequence[Trajectory]]) -> list[list[Trajectory]]:
    """The last response gets a token whose ratio is far above the limit of e^20.

    Its value is limited, its gradient is not: the whole update then comes of this token.
    """
    *others, last = mini_batches[-1]
    behavior_logprobs = last.behavior_logprobs.copy()
    behavior_logprobs[1] = -40.0
    return [*mini_batches[:-1], [*others, replace(last, behavior_logprobs=behavior_logprobs)]]


def batches_of(
    case: Case, mini_batches: Sequence[Sequence[Trajectory]]
) -> Sequence[Sequence[Trajectory]]:
    """What this case learns from."""
    return far_off(mini_batches) if case == FAR else mini_batches


@dataclass(frozen=True)
class Problem:
    """A checkpoint, what is learned from, and what should come of it."""

    variant: str
    folder: Path
    start: dict[str, Tensor]  # float64 weights by Hugging Face name
    mini_batches: list[list[Trajectory]]
    references: dict[Case, Learned]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Problem]:
    @functools.cache
    def make(variant: str) -> Problem:
        folder = tmp_path_factory.mktemp(variant)
        model = save_well_conditioned(variant, folder)
        mini_batches = make_mini_batches(model)
        references = {
            case: reference_updates(
                model, run_config(ParallelConfig(), case), batches_of(case, mini_batches)
            )
            for case in CASES
        }
        start = {name: p.detach().double() for name, p in model.named_parameters()}
        return Problem(variant, folder, start, mini_batches, references)

    return make


def learn_all(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    folder: Path,
    mini_batches: Sequence[Sequence[Trajectory]],
    precisions: Sequence[str] = ("float64", "float32"),
) -> dict[str, dict[Case, Learned]]:
    """By precision: every case in float64, some in fp32."""
    state = start_state(rank, world_size, init_method, layout.parallel)
    results: dict[str, dict[Case, Learned]] = {precision: {} for precision in precisions}
    for precision, by_case in results.items():
        with float64_for_float32() if precision == "float64" else nullcontext():
            for case in CASES if precision == "float64" else FLOAT32_CASES:
                config = run_config(
                    layout.parallel,
                    case,
                    token_budget=layout.token_budget,
                    distributed=layout.distributed,
                )
                by_case[case] = learn(config, folder, state, batches_of(case, mini_batches))
    destroy_parallel()
    return results


@dataclass(frozen=True)
class Outcome:
    """What a layout made of its problem: by precision and case, on each rank."""

    problem: Problem
    by_rank: list[dict[str, dict[Case, Learned]]]


@pytest.fixture(scope="module", params=LAYOUTS)
def outcome(request: pytest.FixtureRequest, problems: Callable[[str], Problem]) -> Outcome:
    layout = LAYOUTS[request.param]
    problem = problems(layout.checkpoint)
    by_rank = run_ranks(
        layout.parallel.num_ranks,
        learn_all,
        layout,
        problem.folder,
        problem.mini_batches,
        timeout_seconds=280.0,
    )
    return Outcome(problem, by_rank)


@pytest.fixture(scope="module")
def one_rank(problems: Callable[[str], Problem]) -> Callable[[str], dict[Case, Learned]]:
    """Checkpoint -> what one rank makes of it in fp32, all of a mini-batch in a micro-batch."""

    @functools.cache
    def learn_on_one_rank(variant: str) -> dict[Case, Learned]:
        layout = Layout(ParallelConfig(), ALL, checkpoint=variant)
        problem = problems(variant)
        (results,) = run_ranks(
            1, learn_all, layout, problem.folder, problem.mini_batches, ("float32",)
        )
        return results["float32"]

    return learn_on_one_rank


def assert_metrics_equal(learned: Learned, expected: Learned, tolerance: float) -> None:
    """All of them, but for what measures rounding itself."""
    for update, metrics in enumerate(learned.metrics):
        wanted = expected.metrics[update]
        names = {name for name in metrics if not name.startswith("head_check/")}
        assert names == {name for name in wanted if not name.startswith("head_check/")}
        for name in names:
            absolute = tolerance if name.startswith(OF_ONE) else 0.0
            assert metrics[name] == pytest.approx(wanted[name], rel=tolerance, abs=absolute), (
                f"{name} of update {update}"
            )


def assert_tensors_equal(
    tensors: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str
) -> None:
    """Each by itself within `tolerance`."""
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(tensors[name], value)
        assert error <= tolerance, f"{what} of {name}: {error:.1e} off"


def assert_gradients_equal(
    learned: Learned, expected: Learned, tolerance: float, whole_tolerance: float
) -> None:
    """Of every parameter, and of all of them as one vector."""
    for update, gradients in enumerate(learned.gradients):
        wanted = expected.gradients[update]
        assert_tensors_equal(gradients, wanted, tolerance, f"gradient {update}")
        error = relative_error(as_vector(gradients), as_vector(wanted))
        assert error <= whole_tolerance, f"gradient {update}: {error:.1e} off"


def ways(weights: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight - start[name] for name, weight in weights.items()}


def test_every_rank_reports_the_same(outcome: Outcome) -> None:
    first, *others = outcome.by_rank
    for results in others:
        for precision, by_case in results.items():
            for case, learned in by_case.items():
                assert learned.metrics == first[precision][case].metrics, case
                assert learned.ratio_penalties == first[precision][case].ratio_penalties, case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_in_float64_it_is_the_textbook_update(outcome: Outcome, case: Case) -> None:
    learned = outcome.by_rank[0]["float64"][case]
    expected, start = outcome.problem.references[case], outcome.problem.start
    assert_metrics_equal(learned, expected, EXACT)
    assert_gradients_equal(learned, expected, EXACT, EXACT)
    assert learned.ratio_penalties == pytest.approx(expected.ratio_penalties, rel=EXACT)
    way, expected_way = ways(learned.weights, start), ways(expected.weights, start)
    assert_tensors_equal(way, expected_way, EXACT_WAY, "way")


@pytest.mark.parametrize("against", ["reference", "one_rank"])
@pytest.mark.parametrize("case", FLOAT32_CASES, ids=lambda case: case.name)
def test_in_float32_it_is_the_same_within_rounding(
    outcome: Outcome,
    case: Case,
    against: str,
    one_rank: Callable[[str], dict[Case, Learned]],
) -> None:
    learned, expected = outcome.by_rank[0]["float32"][case], outcome.problem.references[case]
    if against == "one_rank":
        expected = one_rank(outcome.problem.variant)[case]
    factor = SPO_FACTOR if case == SPO else 1.0
    assert_metrics_equal(learned, expected, FLOAT32_METRIC)
    assert_gradients_equal(
        learned, expected, factor * FLOAT32_GRADIENT, factor * FLOAT32_WHOLE_GRADIENT
    )
    assert learned.ratio_penalties == pytest.approx(expected.ratio_penalties, rel=FLOAT32_PENALTY)
    assert_tensors_equal(learned.weights, expected.weights, FLOAT32_WEIGHT, "weights")


def test_the_problem_leaves_nothing_untested(problems: Callable[[str], Problem]) -> None:
    """Every objective, aggregation and limit is in force in what the layouts are held to."""
    assert {case.objective for case in CASES} == set(OBJECTIVES)
    assert {case.aggregation for case in CASES} == set(AGGREGATIONS)
    problem = problems("pangu-untied")
    for case, reference in problem.references.items():
        assert all(update["optimizer/gradient_norm"] > 0.5 for update in reference.metrics)
        assert all(update["ratio/second_moment"] > 0.1 for update in reference.metrics)
        assert np.all(np.diff(reference.ratio_penalties) != 0)
        assert reference.metrics[0]["ratio/clamped_fraction"] > 0
        for name in STALENESS_NAMES:
            assert all(f"staleness_{name}/tokens" in update for update in reference.metrics)
        clipped = [update["ratio/clipped_fraction"] for update in reference.metrics]
        assert all(share > 0.1 for share in clipped) == case.objective.startswith("grpo")
    assert problem.references[FAR].metrics[2]["ratio/max"] == pytest.approx(math.exp(20))
    lambdas = problem.references[R2VPO].ratio_penalties
    assert lambdas != pytest.approx(problem.references[GRPO].ratio_penalties, rel=1e-3)
