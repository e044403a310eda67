"""The learner goes on from a checkpoint: bit for bit in its layout, to rounding in any other.

Each run has three updates. It is saved after the second, and the third is made while the file is
still held back; another set of processes loads and makes the third update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from r2vpo_megatron.parallel.state import destroy_parallel
from tests.distributed.learner_runs import (
    copied_weights,
)
from tests.distributed.learner_state_runs import (
    CP2_DP2,
    DP2,
    DP3,
    ONE,
    PP2,
    PP2_VPP2,
    SLOW,
    TP2,
    TP2_DP2,
    TP2_PP2,
    TP2_SP,
    TP4,
    Layout,
    Learned,
    Problem,
    assert_equal_bits,
    bf16,
    go_on,
    problems,
    replicated,
    saved,
    start,
    stored_tensors,
    tied,
    update,
)
from tests.distributed.ranks import run_ranks
from tests.distributed.reference_update import relative_error

__all__ = ["problems", "saved"]  # fixtures


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(ONE, id="one"),
        pytest.param(TP2, id="tp2"),
        pytest.param(tied(TP2_PP2), id="tp2_pp2_tied"),
        pytest.param(DP2, id="dp2"),
        pytest.param(DP3, id="dp3"),  # whose shards end within rows
        pytest.param(replicated(DP2), id="dp2_replicated"),
        pytest.param(bf16(ONE), id="one_bf16"),
        pytest.param(bf16(DP2), id="dp2_bf16"),
        pytest.param(TP2_SP, id="tp2_sp", marks=SLOW),
        pytest.param(PP2_VPP2, id="pp2_vpp2", marks=SLOW),
        pytest.param(CP2_DP2, id="cp2_dp2", marks=SLOW),
        pytest.param(bf16(tied(TP2_PP2)), id="tp2_pp2_tied_bf16", marks=SLOW),
        pytest.param(bf16(TP2_DP2), id="tp2_dp2_bf16", marks=SLOW),
        pytest.param(replicated(bf16(TP2_DP2)), id="tp2_dp2_bf16_replicated", marks=SLOW),
    ],
)
def test_in_the_same_layout_it_goes_on_bit_for_bit(
    layout: Layout,
    saved: Callable[[Layout], tuple[Path, list[Learned]]],
    problems: Callable[[str], Problem],
    tmp_path: Path,
) -> None:
    folder, straight = saved(layout)
    problem = problems(layout.checkpoint)
    resumed = run_ranks(layout.parallel.num_ranks, go_on, layout, problem, folder, tmp_path)
    for rank, (learned, expected) in enumerate(zip(resumed, straight, strict=True)):
        for weights, wanted in zip(learned.weights, expected.weights, strict=True):
            assert_equal_bits(weights, wanted)
        assert_equal_bits(learned.pieces, expected.pieces)
        assert learned.metrics == expected.metrics
        assert learned.drawn == expected.drawn
        assert bool(learned.weights[0]) == (rank == 0)
    before, after = straight[0].weights
    moved = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    # bf16 does not show the smallest steps; the copies that are stepped do.
    assert len(moved) == len(before) or layout.dtype == "bfloat16"
    assert len({tuple(learned.drawn) for learned in straight}) == len(straight)


@pytest.mark.parametrize(
    ("layout", "other"),
    [
        pytest.param(TP2, PP2, id="tp2-pp2"),
        pytest.param(tied(TP2_PP2), tied(ONE), id="tp2_pp2_tied-one_tied"),
        pytest.param(DP2, ONE, id="dp2-one"),
        pytest.param(ONE, TP4, id="one-tp4"),  # two ranks with nothing but padded vocabulary
        pytest.param(replicated(DP2), DP2, id="dp2_replicated-dp2"),
        pytest.param(bf16(DP2), bf16(TP2), id="dp2_bf16-tp2_bf16"),
        pytest.param(TP4, DP3, id="tp4-dp3", marks=SLOW),
        pytest.param(DP3, PP2_VPP2, id="dp3-pp2_vpp2"),
        pytest.param(PP2_VPP2, CP2_DP2, id="pp2_vpp2-cp2_dp2", marks=SLOW),
        pytest.param(tied(ONE), tied(TP2_PP2), id="one_tied-tp2_pp2_tied", marks=SLOW),
        pytest.param(bf16(TP2_DP2), bf16(replicated(PP2)), id="tp2_dp2_bf16-pp2", marks=SLOW),
    ],
)
def test_another_layout_gets_the_same_state_and_goes_on_within_rounding(
    layout: Layout,
    other: Layout,
    saved: Callable[[Layout], tuple[Path, list[Learned]]],
    problems: Callable[[str], Problem],
    tmp_path: Path,
) -> None:
    folder, straight = saved(layout)
    problem = problems(other.checkpoint)
    resumed = run_ranks(other.parallel.num_ranks, go_on, other, problem, folder, tmp_path)
    assert_equal_bits(resumed[0].weights[0], straight[0].weights[0])
    assert_equal_bits(stored_tensors(tmp_path), stored_tensors(folder))
    learner, again = (json.loads((f / "learner.json").read_text()) for f in (folder, tmp_path))
    assert again["num_steps"] == learner["num_steps"] == 2
    tolerance = 1e-5 if other.dtype == "float32" else 4e-3  # half a bit of bfloat16
    for name, weight in straight[0].weights[1].items():
        error = relative_error(resumed[0].weights[1][name], weight)
        assert error <= tolerance, f"{name}: {error:.1e} off"
    if layout.parallel.num_ranks != other.parallel.num_ranks:
        for rank, learned in enumerate(resumed):
            assert learned.drawn != straight[min(rank, len(straight) - 1)].drawn


def test_a_range_of_elements_is_cut_into_few_boxes_in_order() -> None:
    from r2vpo_megatron.learner.state_pieces import boxes_of_range

    for shape in ((7,), (3, 4), (1, 3, 2), (2, 3, 4), (2, 1, 3)):
        numel = math.prod(shape)
        elements = torch.arange(numel).view(shape)
        for first in range(numel):
            for last in range(first + 1, numel + 1):
                boxes = list(boxes_of_range(shape, first, last))
                parts = [
                    elements[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))]
                    for box in boxes
                ]
                assert torch.cat([p.flatten() for p in parts]).tolist() == [*range(first, last)]
                assert len(boxes) <= 2 * len(shape) - 1


def load_by_megatron(
    rank: int, world_size: int, init_method: str, layout: Layout, problem: Problem, folder: Path
) -> dict[str, Tensor]:
    from megatron.core import dist_checkpointing

    actor, _, _ = start(rank, world_size, init_method, layout, problem)
    (chunk,) = actor._model.chunks
    template = {"model": chunk.module.sharded_state_dict()}
    chunk.load_state_dict(dist_checkpointing.load(template, str(folder))["model"])
    weights = copied_weights(actor)
    destroy_parallel()
    return weights


def test_megatron_core_loads_the_weights(
    saved: Callable[[Layout], tuple[Path, list[Learned]]], problems: Callable[[str], Problem]
) -> None:
    folder, straight = saved(DP2)
    weights, _ = run_ranks(2, load_by_megatron, TP2, problems(TP2.checkpoint), folder)
    assert_equal_bits(weights, straight[0].weights[0])


def save_before_any_update(
    rank: int, world_size: int, init_method: str, layout: Layout, problem: Problem, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An update from the start, then back to the start and the same update."""
    actor, state, saver = start(rank, world_size, init_method, layout, problem)
    saver.begin_save(folder, {})
    saver.finish_save()
    ends = []
    for _ in range(2):
        update(actor, state, layout, problem.mini_batches[0])
        ends.append(copied_weights(actor))
        assert saver.load(folder) == {}
        actor._num_updates = 0
    destroy_parallel()
    return ends[0], ends[1]


def test_a_run_that_has_not_stepped_yet_is_saved(
    problems: Callable[[str], Problem], tmp_path: Path
) -> None:
    (first, second), _ = run_ranks(
        2, save_before_any_update, DP2, problems(DP2.checkpoint), tmp_path
    )
    assert_equal_bits(first, second)
    assert not any(key.startswith("optimizer.") for key in stored_tensors(tmp_path))
