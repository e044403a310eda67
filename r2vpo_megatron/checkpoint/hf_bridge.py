"""Hugging Face checkpoint <-> this rank's Megatron parameters, streamed in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import (
    Placement,
    Shard,
    TensorPieces,
    merge_shards,
    placements,
    read_shard,
    shard_shape,
)
from r2vpo_megatron.checkpoint.megatron_keys import open_checkpoint
from r2vpo_megatron.checkpoint.shard_gather import ShardGather
from r2vpo_megatron.checkpoint.tensor_check import check_tensors, entries_of
from r2vpo_megatron.models.pipeline import stage_of_layer
from r2vpo_megatron.models.spec import ModelSpec
from r2vpo_megatron.parallel.state import ParallelState

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def load_hf_weights(
    model_chunks: Sequence[Any], spec: ModelSpec, state: ParallelState, model_dir: str | Path
) -> None:
    """Fill every parameter of this rank from a checkpoint, reading only the slices it needs.

    No collective: ranks read on their own. Values are converted to the parameters' dtype.

    Args:
        model_chunks: from build_model, wrapped (DDP) or not.
        spec: of the same checkpoint.
        state: where this rank stands.
        model_dir: Hugging Face folder, or a torch_dist one.

    Raises:
        ValueError: tensors that are missing, of the wrong shape, or not used by this model.
    """
    by_name = {p.megatron_name: p for group in placements(spec) for p in group}
    if spec.tied_embeddings:
        # The last of several stages keeps a copy of the embedding as its head.
        by_name["output_layer.weight"] = by_name["embedding.word_embeddings.weight"]
    with open_checkpoint(model_dir, spec) as reader, torch.no_grad():
        check_tensors(entries_of(reader), spec, reader.folder)
        for name, parameter in _local_parameters(model_chunks).items():
            shard = read_shard(
                by_name[name], spec, state.tensor_rank, state.tensor_size, reader.read_slice
            )
            assert parameter.shape == shard.shape, (name, parameter.shape, shard.shape)
            parameter.copy_(shard)


class HfWeights(Iterator[tuple[str, Any]]):
    """The stream of `iterate_hf_weights`."""

    def __init__(self, model_chunks: Sequence[Any], spec: ModelSpec, state: ParallelState) -> None:
        """Begin the stream; see `iterate_hf_weights`."""
        self._stream = self._generate(model_chunks, spec, state)

    def __next__(self) -> tuple[str, Any]:
        """The next tensor; as collective as the stream."""
        name, pieces = next(self._stream)
        return name, None if pieces is None else pieces.whole()

    def in_pieces(self) -> Iterator[tuple[str, TensorPieces | None]]:
        """The same stream, for those who copy each tensor to its place before they ask for more."""
        return self._stream

    def _generate(
        self, model_chunks: Sequence[Any], spec: ModelSpec, state: ParallelState
    ) -> Iterator[tuple[str, TensorPieces | None]]:
        parameters = _local_parameters(model_chunks)
        takes_part = state.data_rank == 0 and state.context_rank == 0
        if takes_part:
            stage = ShardGather(state, parameters)
        for group in placements(spec):
            merged: list[dict[str, TensorPieces]] = []
            if takes_part:
                for placement in group:
                    shards = _collect_shards(placement, spec, state, parameters, stage)
                    if state.is_writer:
                        merged.append(merge_shards(placement, spec, shards))
                    del shards
            # Weight and bias alternate: q weight, q bias, k weight, ...
            for names in zip(*(placement.hf_shapes for placement in group), strict=True):
                for position, name in enumerate(names):
                    yield name, merged[position].pop(name) if merged else None
        if takes_part:
            stage.finish()


def iterate_hf_weights(
    model_chunks: Sequence[Any], spec: ModelSpec, state: ParallelState
) -> HfWeights:
    """Yield every tensor of the Hugging Face checkpoint, whole, in its order.

    Collective: every rank must iterate to the end, in step; data-parallel replicas other than
    the first take no part in the transfers. One fused tensor is in memory at a time. A tied LM
    head is not yielded, as Hugging Face does not store it.

    Args:
        model_chunks: wrapped (DDP) or not.
        spec: the model.
        state: where this rank stands.

    Yields:
        (name, tensor): on global rank 0 the unpadded, contiguous tensor on state.device in the
        parameters' dtype, which may share memory with a parameter; None on every other rank.
    """
    return HfWeights(model_chunks, spec, state)


def _collect_shards(
    placement: Placement,
    spec: ModelSpec,
    state: ParallelState,
    parameters: dict[str, Tensor],
    stage: ShardGather,
) -> list[Shard]:
    """Bring the shards of one parameter to global rank 0, from the TP ranks of its stage."""
    owner = _stage_of(placement, spec, state)
    shape = shard_shape(placement, spec, state.tensor_size)
    num_shards = 1 if placement.kind == "replicated" else state.tensor_size
    shards: list[Shard] = []
    if state.pipeline_rank == owner:
        name = placement.megatron_name
        shards = stage.gather(name) if num_shards > 1 else [parameters[name].detach()]
    if owner == 0 or state.tensor_rank != 0:
        return shards
    stages = dist.get_process_group_ranks(state.pipeline_group)
    if state.pipeline_rank == owner:
        for shard in shards:
            dist.send(shard.contiguous(), dst=stages[0], group=state.pipeline_group)
    elif state.pipeline_rank == 0:
        dtype = next(iter(parameters.values())).dtype
        received = [torch.empty(shape, dtype=dtype, device=state.device) for _ in range(num_shards)]
        for shard in received:
            dist.recv(shard, src=stages[owner], group=state.pipeline_group)
        return [*received]
    return shards


def _stage_of(placement: Placement, spec: ModelSpec, state: ParallelState) -> int:
    if placement.layer is not None:
        return stage_of_layer(
            placement.layer,
            spec.num_layers,
            state.pipeline_size,
            state.virtual_pipeline_size,
            state.pipeline_layout,
        )
    return 0 if placement.megatron_name.startswith("embedding.") else state.pipeline_size - 1


def _local_parameters(model_chunks: Sequence[Any]) -> dict[str, Tensor]:
    """Parameters of this rank, with layers numbered from the bottom of the whole model."""
    parameters: dict[str, Tensor] = {}
    for chunk in model_chunks:
        model = chunk
        while hasattr(model, "module"):  # DistributedDataParallel, Float16Module
            model = model.module
        for name, parameter in model.named_parameters():
            match = _LAYER.match(name)
            if match:
                layer = model.decoder.layers[int(match.group(1))].layer_number - 1
                name = f"decoder.layers.{layer}.{name[match.end() :]}"
            parameters[name] = parameter
    return parameters
