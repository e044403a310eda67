"""Checkpoint -> Megatron shards -> stream of whole tensors is bit-exact, or refuses."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2vpo_megatron.checkpoint.hf_bridge import iterate_hf_weights, load_hf_weights
from r2vpo_megatron.checkpoint.safetensors_io import save_hf_checkpoint
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.device.process_memory import MemoryOffer
from r2vpo_megatron.models.pipeline import layers_of_chunks
from r2vpo_megatron.models.spec import padded_vocab_size, read_model_spec
from r2vpo_megatron.parallel.state import destroy_parallel, initialize_parallel
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import VARIANTS, VOCAB_SIZE, save_checkpoint


@dataclass(frozen=True)
class Grid:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    data: int = 1
    pipeline_layout: str = ""


GRIDS = {
    "tp1": Grid(),
    "tp2": Grid(tensor=2),
    "pp2": Grid(pipeline=2),
    "tp2_pp2": Grid(tensor=2, pipeline=2),
    "pp2_vpp2": Grid(pipeline=2, virtual_pipeline=2),
    "pp2_dp2": Grid(pipeline=2, data=2),
    "pp3_uneven": Grid(pipeline=3, pipeline_layout="2,1,1"),
    "tp2_pp2_uneven": Grid(tensor=2, pipeline=2, pipeline_layout="1,3"),
    "pp2_vpp2_bare_ends": Grid(pipeline=2, virtual_pipeline=2, pipeline_layout="0,3,1,0"),
}


Stream = list[tuple[str, Tensor | None]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind, and one in bfloat16."""
    folders = {}
    for variant in VARIANTS:
        folders[variant] = tmp_path_factory.mktemp(variant)
        save_checkpoint(variant, folders[variant])
    source, folder = folders["pangu-tied"], tmp_path_factory.mktemp("bfloat16")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "model.safetensors")
    return folders | {"pangu-tied-bfloat16": folder}


def _round_trip(
    rank: int,
    world_size: int,
    init_method: str,
    grid: Grid,
    folders: dict[str, Path],
) -> dict[str, Stream]:
    from r2vpo_megatron.models.build import build_model

    tensor = grid.tensor
    platform = get_platform("cpu")
    state = initialize_parallel(
        platform,
        rank=rank,
        world_size=world_size,
        tensor=tensor,
        pipeline=grid.pipeline,
        virtual_pipeline=grid.virtual_pipeline,
        pipeline_layout=grid.pipeline_layout,
        init_method=init_method,
        timeout_seconds=60,
    )
    streams = {}
    for name, folder in folders.items():
        spec = read_model_spec(folder)
        dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
        chunks = build_model(spec, state, platform, dtype=dtype)
        for chunk in chunks:  # what is not loaded must show
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        load_hf_weights(chunks, spec, state, folder)
        if state.is_last_stage:  # padding rows of the LM head are zero
            head = chunks[-1].lm_head_weight()
            assert head.shape[0] == padded_vocab_size(VOCAB_SIZE, tensor) // tensor
            if state.tensor_rank == tensor - 1:
                assert torch.count_nonzero(head[VOCAB_SIZE - padded_vocab_size(200, tensor) :]) == 0
        streams[name] = [
            (tensor_name, value if value is None else value.detach().clone())
            for tensor_name, value in iterate_hf_weights(chunks, spec, state)
        ]
    destroy_parallel()
    return streams


def _assert_round_trip(
    grid: Grid, folders: dict[str, Path], on_rank: Callable[..., dict[str, Stream]] = _round_trip
) -> None:
    world_size = grid.tensor * grid.pipeline * grid.data
    by_rank: list[dict[str, Stream]] = run_ranks(world_size, on_rank, grid, folders)
    for name, folder in folders.items():
        source = load_file(folder / "model.safetensors")
        stream = by_rank[0][name]
        assert sorted(key for key, _ in stream) == sorted(source)
        for key, value in stream:
            assert value is not None and value.is_contiguous()
            assert value.dtype == source[key].dtype
            assert torch.equal(value, source[key]), f"{name} {key}"
        for other in by_rank[1:]:
            assert other[name] == [(key, None) for key, _ in stream]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_round_trip_is_bit_exact(grid: Grid, folders: dict[str, Path]) -> None:
    _assert_round_trip(grid, folders)


def _round_trip_between_hosts(
    rank: int, world_size: int, init_method: str, grid: Grid, folders: dict[str, Path]
) -> dict[str, Stream]:
    with patch.object(MemoryOffer, "is_readable", lambda offer: False):
        return _round_trip(rank, world_size, init_method, grid, folders)


def test_round_trip_where_ranks_share_no_memory(folders: dict[str, Path]) -> None:
    some = {name: folders[name] for name in ("pangu-untied", "pangu-tied-bfloat16")}
    _assert_round_trip(GRIDS["tp2"], some, _round_trip_between_hosts)


def _stream_and_change(
    rank: int, world_size: int, init_method: str, folder: Path
) -> list[tuple[str, Any]]:
    """All ranks change their parameters as soon as their stream has ended; rank 0 is slow."""
    from r2vpo_megatron.models.build import build_model

    platform, spec = get_platform("cpu"), read_model_spec(folder)
    state = initialize_parallel(
        platform, rank=rank, world_size=world_size, tensor=2, init_method=init_method
    )
    chunks = build_model(spec, state, platform)
    load_hf_weights(chunks, spec, state, folder)
    copies: list[tuple[str, Any]] = []
    for name, pieces in iterate_hf_weights(chunks, spec, state).in_pieces():
        if pieces is not None:
            place = torch.empty(pieces.shape, dtype=pieces.dtype)
            pieces.copy_into(place)
            copies.append((name, place))
            time.sleep(0.01)
    for parameter in chunks[0].parameters():
        parameter.data.fill_(float("nan"))
    destroy_parallel()
    return copies


def test_no_rank_leaves_the_stream_before_its_shards_are_read(folders: dict[str, Path]) -> None:
    copies, nothing = run_ranks(2, _stream_and_change, folders["pangu-untied"])
    source = load_file(folders["pangu-untied"] / "model.safetensors")
    assert sorted(name for name, _ in copies) == sorted(source) and nothing == []
    for name, tensor in copies:
        assert torch.equal(tensor, source[name]), name


def test_round_trip_of_uneven_interleaved_chunks(tmp_path: Path) -> None:
    save_checkpoint("pangu-tied", tmp_path, num_layers=7)
    grid = Grid(pipeline=2, virtual_pipeline=2, pipeline_layout="1,3,2,1")
    _assert_round_trip(grid, {"a": tmp_path})


def _built_and_counted_by_megatron(
    rank: int, world_size: int, init_method: str, folder: Path, layouts: list[str]
) -> list[tuple[list[list[int]], list[list[int]]]]:
    """For each layout, layers by this rank's chunks: as built, and as Megatron alone says."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from r2vpo_megatron.models.build import build_model

    platform, spec = get_platform("cpu"), read_model_spec(folder)
    results = []
    for number, layout in enumerate(layouts):
        state = initialize_parallel(
            platform,
            rank=rank,
            world_size=world_size,
            pipeline=2,
            virtual_pipeline=2,
            pipeline_layout=layout,
            init_method=f"{init_method}-{number}",
            timeout_seconds=60,
        )
        chunks = build_model(spec, state, platform)
        built = [[layer.layer_number - 1 for layer in c.decoder.layers] for c in chunks]
        counted = []
        for stage in range(2):
            first = get_transformer_layer_offset(chunks[0].config, stage)
            count = get_num_layers_to_build(chunks[0].config, stage)
            counted.append(list(range(first, first + count)))
        results.append((built, counted))
        destroy_parallel()
    return results


def test_chunks_are_dealt_out_as_megatron_deals_them(tmp_path: Path) -> None:
    save_checkpoint("llama-tied", tmp_path, num_layers=8)
    layouts = {  # by stage, then chunk
        "": [[[0, 1], [4, 5]], [[2, 3], [6, 7]]],
        "1,3,2,2": [[[0], [4, 5]], [[1, 2, 3], [6, 7]]],
        "0,5,3,0": [[[], [5, 6, 7]], [[0, 1, 2, 3, 4], []]],
    }
    by_rank = run_ranks(2, _built_and_counted_by_megatron, tmp_path, list(layouts))
    for number, (layout, expected) in enumerate(layouts.items()):
        for rank in range(2):
            ours = layers_of_chunks(8, 2, 2, layout)[rank::2]
            assert by_rank[rank][number] == (ours, ours) == (expected[rank], expected[rank])


def test_the_stream_has_the_order_of_transformers(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = save_checkpoint("pangu-untied", tmp_path / "model")
    (streams,) = run_ranks(1, _round_trip, GRIDS["tp1"], {"a": tmp_path / "model"})
    expected = list(model.state_dict())
    assert expected[1:9:2] == [
        f"model.layers.0.self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")
    ]
    assert [name for name, _ in streams["a"]] == expected


def _refusal(rank: int, world_size: int, init_method: str, folder: Path) -> str:
    from r2vpo_megatron.models.build import build_model

    platform = get_platform("cpu")
    state = initialize_parallel(platform, rank=rank, world_size=world_size, init_method=init_method)
    spec = read_model_spec(folder)
    chunks = build_model(spec, state, platform)
    with pytest.raises(ValueError) as refusal:
        load_hf_weights(chunks, spec, state, folder)
    return str(refusal.value)


def _edited(source: Path, target: Path, **changes: Tensor | None) -> Path:
    """A copy of a checkpoint with tensors added, replaced or (None) left out."""
    shutil.copytree(source, target)
    tensors: dict[str, Tensor | None] = dict(load_file(source / "model.safetensors")) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.layers.2.self_attn.o_proj.bias": None},
            "unfilled (missing in the checkpoint): model.layers.2.self_attn.o_proj.bias",
        ),
        (
            {"model.layers.0.mlp.up_proj.bias": torch.zeros(48)},
            "unmapped (not used by this model): model.layers.0.mlp.up_proj.bias",
        ),
        (
            {"model.norm.weight": torch.zeros(31)},
            "wrong shape: model.norm.weight [31], expected [32]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    changes: dict[str, Tensor | None], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = _edited(folders["pangu-untied"], tmp_path / "edited", **changes)
    (refusal,) = run_ranks(1, _refusal, folder)
    assert refusal.endswith(f"does not fit its config.json (pangu): {message}")


def test_computed_and_tied_tensors_are_ignored_on_the_way_in_and_copied_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.arange(8.0),
        "lm_head.weight": torch.ones(VOCAB_SIZE, 32),
    }
    source = _edited(folders["pangu-tied"], tmp_path / "source", **extra)
    (streams,) = run_ranks(1, _round_trip, GRIDS["tp1"], {"a": source})
    save_hf_checkpoint(streams["a"], tmp_path / "saved", source)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(load_file(source / "model.safetensors")) - {"lm_head.weight"}
    assert torch.equal(saved["model.layers.1.self_attn.rotary_emb.inv_freq"], torch.arange(8.0))
