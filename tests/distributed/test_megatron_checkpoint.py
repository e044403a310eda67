"""Megatron-core loads the torch_dist folders written here, and what it saves is read here."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from r2vpo_megatron.checkpoint.hf_bridge import iterate_hf_weights, load_hf_weights
from r2vpo_megatron.checkpoint.megatron_keys import MegatronCheckpoint
from r2vpo_megatron.checkpoint.torch_dist import TorchDistReader
from r2vpo_megatron.device import get_platform
from r2vpo_megatron.models.spec import padded_vocab_size, read_model_spec
from r2vpo_megatron.parallel.state import ParallelState, destroy_parallel, initialize_parallel
from tests.distributed.ranks import run_ranks
from tests.distributed.tiny_checkpoints import VOCAB_SIZE, save_checkpoint
from tests.torch_dist_files import Form, write_megatron

VARIANTS = ("pangu-tied", "pangu-untied", "qwen2-untied", "llama-tied")


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    pipeline_layout: str = ""

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline


LAYOUTS = {
    "tp1": Layout(),
    "tp2_pp2": Layout(tensor=2, pipeline=2),
    "pp2_vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "pp3_uneven": Layout(pipeline=3, pipeline_layout="1,2,1"),
}
# The rows of the vocabulary differ from those of all layouts: 256 at TP 1 and 2.
FORMS = {
    "as_tp1": Form(padded_vocab=256),
    "as_tp2_pp2_more_rows": Form(tensor=2, pipeline=2, padded_vocab=512),
    "as_pp4_fewer_rows": Form(pipeline=4, padded_vocab=VOCAB_SIZE),
}


def join(rank: int, world_size: int, init_method: str, layout: Layout) -> ParallelState:
    return initialize_parallel(
        get_platform("cpu"),
        rank=rank,
        world_size=world_size,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        pipeline_layout=layout.pipeline_layout,
        init_method=init_method,
        timeout_seconds=60,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind a Hugging Face checkpoint and, beside it, torch_dist folders."""
    folders = {}
    for variant in VARIANTS:
        folders[variant] = tmp_path_factory.mktemp(variant)
        save_checkpoint(variant, folders[variant] / "hf")
        hf = load_file(folders[variant] / "hf" / "model.safetensors")
        for name, form in FORMS.items():
            spec = read_model_spec(folders[variant] / "hf")
            write_megatron(folders[variant] / name, hf, spec, form)
    return folders


def _load_everywhere(
    rank: int, world_size: int, init_method: str, layout: Layout, folders: dict[str, Path]
) -> list[str]:
    """Load every folder by Megatron-core; names of parameters that differ from load_hf_weights."""
    from megatron.core import dist_checkpointing

    from r2vpo_megatron.models.build import build_model

    state = join(rank, world_size, init_method, layout)
    differing = []
    for variant, folder in folders.items():
        spec = read_model_spec(folder / "hf")
        chunks, expected = (build_model(spec, state, get_platform("cpu")) for _ in range(2))
        load_hf_weights(expected, spec, state, folder / "hf")
        for form in FORMS:
            for chunk in chunks:  # what is not loaded must show
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
            template = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
            loaded = dist_checkpointing.load(template, str(folder / form))
            for i, (chunk, reference) in enumerate(zip(chunks, expected, strict=True)):
                chunk.load_state_dict(loaded[f"model{i}"])
                for (name, parameter), (other, wanted) in zip(
                    chunk.named_parameters(), reference.named_parameters(), strict=True
                ):
                    assert name == other
                    if not torch.equal(parameter, wanted):
                        differing.append(f"{variant} {form} chunk {i} {name}")
    destroy_parallel()
    return differing


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_megatron_core_loads_what_is_written(layout: Layout, folders: dict[str, Path]) -> None:
    assert padded_vocab_size(VOCAB_SIZE, layout.tensor) == 256
    by_rank = run_ranks(layout.world_size, _load_everywhere, layout, folders)
    assert by_rank == [[]] * layout.world_size


def _train_and_save(
    rank: int,
    world_size: int,
    init_method: str,
    layout: Layout,
    hf_folder: Path,
    output: Path,
    sharding: str,
) -> dict[str, Tensor]:
    """One step without gradients (weight decay alone), then Megatron-core's own save."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from r2vpo_megatron.models.build import build_model

    # Megatron's writer starts a process of its own, which multiprocessing forbids to daemons.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    platform, state = get_platform("cpu"), join(rank, world_size, init_method, layout)
    spec = read_model_spec(hf_folder)
    chunks = build_model(spec, state, platform, dtype=torch.bfloat16)
    load_hf_weights(chunks, spec, state, hf_folder)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    wrapped = [DistributedDataParallel(chunk.config, ddp_config, chunk) for chunk in chunks]
    config = OptimizerConfig(
        optimizer="adam", lr=1.0, weight_decay=0.5, bf16=True, use_distributed_optimizer=True
    )
    with platform.optimizer_context():
        optimizer = get_megatron_optimizer(config, wrapped)
        optimizer.step()
    model = chunks[0].sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": sharding}
    state_dict: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, metadata=metadata),
    }
    dist_checkpointing.save(state_dict, str(output))
    weights = {
        name: tensor.detach().clone()
        for name, tensor in iterate_hf_weights(wrapped, spec, state)
        if tensor is not None
    }
    destroy_parallel()
    return weights


@pytest.fixture
def saved_folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "saved"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("variant", "sharding"),
    [("pangu-untied", "fully_reshardable"), ("pangu-tied", "dp_reshardable")],
)
def test_what_megatron_core_saved_with_its_optimizer_is_read(
    variant: str, sharding: str, folders: dict[str, Path], saved_folder: Path
) -> None:
    hf_folder = folders[variant] / "hf"
    weights, *_ = run_ranks(
        4, _train_and_save, LAYOUTS["tp2_pp2"], hf_folder, saved_folder, sharding
    )
    before = load_file(hf_folder / "model.safetensors")
    assert sorted(weights) == sorted(before)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(weights[name], before[name].bfloat16())
    with TorchDistReader(saved_folder) as reader:
        optimizer_keys = [key for key in reader.tensors if key.startswith("optimizer.")]
        assert any("exp_avg_sq" in key for key in optimizer_keys)
        for key in optimizer_keys:
            reader.check(key)
    with MegatronCheckpoint(saved_folder, spec=read_model_spec(hf_folder)) as checkpoint:
        assert checkpoint.unmapped == []
        assert checkpoint.names() == list(weights)
        for name, expected in weights.items():
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, expected), name
