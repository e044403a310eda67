"""Which layers each chunk of a pipeline holds, by value; and what is said where none fits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from r2vpo_megatron.cli.overrides import apply_overrides
from r2vpo_megatron.config import ParallelConfig, RunConfig
from r2vpo_megatron.models.pipeline import balanced_layout, layers_of_chunks, stage_of_layer
from r2vpo_megatron.models.spec import ModelSpec
from r2vpo_megatron.orchestration.inputs import _check_fit


def test_even_chunks() -> None:
    assert layers_of_chunks(4, 1) == [[0, 1, 2, 3]]
    assert layers_of_chunks(4, 2) == layers_of_chunks(4, 2, 1) == [[0, 1], [2, 3]]
    # Stage 0 holds the first and the third, stage 1 the second and the fourth.
    assert layers_of_chunks(8, 2, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_uneven_chunks() -> None:
    assert layers_of_chunks(4, 1, None, "4") == [[0, 1, 2, 3]]
    assert layers_of_chunks(4, 2, None, "3,1") == [[0, 1, 2], [3]]
    assert layers_of_chunks(7, 2, 2, " 1, 3,2 ,1 ") == [[0], [1, 2, 3], [4, 5], [6]]
    chunks = layers_of_chunks(34, 4, None, "9,8,8,9")  # openPangu-7B
    assert [(layers[0], layers[-1]) for layers in chunks] == [(0, 8), (9, 16), (17, 24), (25, 33)]


def test_embedding_and_head_may_stand_alone() -> None:
    assert layers_of_chunks(4, 3, None, "0,4,0") == [[], [0, 1, 2, 3], []]
    assert layers_of_chunks(3, 2, 2, "0,2,1,0") == [[], [0, 1], [2], []]


def test_stage_of_every_layer() -> None:
    def stages(n: int, pipeline: int, virtual: int | None = None, layout: str = "") -> list[int]:
        return [stage_of_layer(layer, n, pipeline, virtual, layout) for layer in range(n)]

    assert stages(8, 2) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert stages(8, 2, 2) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert stages(4, 3, None, "2,1,1") == [0, 0, 1, 2]
    assert stages(7, 2, 2, "1,3,2,1") == [0, 1, 1, 1, 0, 0, 1]
    assert stages(4, 2, 2, "0,3,1,0") == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("num_layers", "pipeline", "virtual", "layout"),
    [
        (34, 4, None, "8,9,9,8"),
        (33, 4, None, "8,8,9,8"),
        (35, 4, None, "9,9,9,8"),
        (5, 2, 1, "3,2"),
        (26, 2, 2, "6,7,7,6"),
        (27, 2, 2, "7,7,7,6"),
        (5, 2, 2, "1,1,2,1"),
        (34, 4, 2, "4,5,5,4,4,4,4,4"),
        (34, 1, None, "34"),
    ],
)
def test_the_balanced_layout_spares_the_stages_of_embedding_and_head(
    num_layers: int, pipeline: int, virtual: int | None, layout: str
) -> None:
    assert balanced_layout(num_layers, pipeline, virtual) == layout


def test_balanced_layouts_fit_and_differ_by_one_layer_at_most() -> None:
    for pipeline in range(1, 7):
        for virtual in (None, 1, *(range(2, 5) if pipeline > 1 else ())):
            fewest = pipeline * (virtual or 1)
            for num_layers in range(fewest, 3 * fewest + 1):
                layout = balanced_layout(num_layers, pipeline, virtual)
                chunks = layers_of_chunks(num_layers, pipeline, virtual, layout)
                counts = [len(layers) for layers in chunks]
                stages = [sum(counts[stage::pipeline]) for stage in range(pipeline)]
                assert [layer for chunk in chunks for layer in chunk] == list(range(num_layers))
                assert max(counts) - min(counts) <= 1 and max(stages) - min(stages) <= 1
                assert counts[-1] == min(counts) and stages[-1] == min(stages)
                if num_layers % fewest == 0:
                    assert chunks == layers_of_chunks(num_layers, pipeline, virtual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (34, 4),
            "pipeline size 4 does not divide 34 layers; valid sizes: 1, 2, 17, 34; "
            "or an uneven split: pipeline_layout = '8,9,9,8'",
        ),
        (
            (26, 2, 2),
            "pipeline x virtual pipeline size 4 does not divide 26 layers; valid sizes: 1, 2, 13, "
            "26; or an uneven split: pipeline_layout = '6,7,7,6'",
        ),
        ((2, 3), "pipeline size 3 does not divide 2 layers; valid sizes: 1, 2"),
        (
            (34, 4, None, "9,8,8"),
            "pipeline_layout = '9,8,8': has 3 counts, but pipeline size 4 needs 4; "
            "for example pipeline_layout = '8,9,9,8'",
        ),
        (
            (7, 2, 2, "3,4"),
            "pipeline_layout = '3,4': has 2 counts, but pipeline x virtual pipeline size 4 needs "
            "4; for example pipeline_layout = '2,2,2,1'",
        ),
        (
            (34, 4, None, "9,8,8,8"),
            "pipeline_layout = '9,8,8,8': adds up to 33 layers, but the model has 34; "
            "for example pipeline_layout = '8,9,9,8'",
        ),
        (
            (4, 3, None, "2,0,2"),
            "pipeline_layout = '2,0,2': only the first and the last chunk may have no layers; "
            "for example pipeline_layout = '1,2,1'",
        ),
        (
            (4, 2, None, "-1,5"),
            "pipeline_layout = '-1,5': must be numbers of layers with commas between; "
            "for example pipeline_layout = '2,2'",
        ),
        ((4, 0), "pipeline size 0: must be at least 1"),
        ((4, 2, 0), "virtual pipeline size 0: must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        layers_of_chunks(*arguments)
    assert str(refusal.value) == message


@pytest.mark.parametrize("layout", ["x", "1,,2", ",", "1 2", "1.5,2.5", "Ett|tL", "3,1,"])
def test_anything_but_counts_is_refused(layout: str) -> None:
    with pytest.raises(ValueError, match="must be numbers of layers with commas between"):
        layers_of_chunks(4, 2, None, layout)
    with pytest.raises(ValueError, match=r"^parallel.pipeline_layout = .* = 2 chunks"):
        ParallelConfig(pipeline=2, pipeline_layout=layout)


def test_the_configuration_takes_one_count_for_each_chunk() -> None:
    arguments = ["--parallel.pipeline", "2", "--parallel.pipeline-layout", "3,1"]
    assert apply_overrides(RunConfig(), arguments).parallel.pipeline_layout == "3,1"
    ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layout="1,3,2,1")
    with pytest.raises(ValueError, match=r"pipeline_layout = '3,1' is not valid: .* = 4 chunks"):
        ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layout="3,1")


def test_a_run_is_checked_with_its_layout() -> None:
    spec = ModelSpec(
        architecture="pangu",
        num_layers=34,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=128,
        vocab_size=256,
        rope_theta=1e4,
        norm_eps=1e-5,
        max_positions=32768,
        qkv_bias=True,
        o_bias=True,
        tied_embeddings=False,
        dtype="bfloat16",
    )
    _check_fit(RunConfig(parallel=ParallelConfig(pipeline=4, pipeline_layout="9,8,8,9")), spec)
    with pytest.raises(ValueError, match="pipeline_layout = '8,9,9,8'"):
        _check_fit(RunConfig(parallel=ParallelConfig(pipeline=4)), spec)


def test_it_needs_neither_torch_nor_megatron() -> None:
    code = "import sys, r2vpo_megatron.models.pipeline, r2vpo_megatron.models.spec; "
    code += "sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
