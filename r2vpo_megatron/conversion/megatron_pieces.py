"""How a torch_dist folder is cut into pieces: geometry, and what each is made of; no Megatron."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import Placement, placements, read_rows
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.conversion.plan import PipelineChunk, row_blocks
from r2vpo_megatron.models.pipeline import layers_of_chunks
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size


@dataclass(frozen=True)
class ParallelLayout:
    """How the model is cut; sizes of 1 leave it whole."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    pipeline_layout: str = ""  # "9,8,8,9"; empty: as many layers in each chunk

    def chunks(self, num_layers: int) -> tuple[PipelineChunk, ...]:
        """All chunks, from the bottom of the model up."""
        dealt = layers_of_chunks(
            num_layers, self.pipeline, self.virtual_pipeline, self.pipeline_layout
        )
        return tuple(
            PipelineChunk(number % self.pipeline, number // self.pipeline, tuple(layers))
            for number, layers in enumerate(dealt)
        )


@dataclass(frozen=True)
class Piece:
    """A part of a Megatron tensor that one tensor rank stores, as one blob."""

    file: str
    starts: tuple[int, ...]  # in the global tensor of the layer, padding included
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """Rows of a global tensor that are read at once, and the pieces they are cut into."""

    placement: Placement
    start: int
    stop: int
    pieces: tuple[Piece, ...]


def plan_units(
    spec: ModelSpec, layout: ParallelLayout, dtypes: Mapping[str, torch.dtype]
) -> list[Unit]:
    """Everything to write, in order: chunk by chunk, a tensor at a time, in blocks of BLOCK_BYTES.

    Args:
        spec: the model.
        layout: how it is cut.
        dtypes: of the Hugging Face tensors, as they are written.
    """
    units: list[Unit] = []
    chunks = layout.chunks(spec.num_layers)
    for chunk in chunks:
        for placement in (placement for group in placements(spec) for placement in group):
            if _chunk_of(placement, chunks) != chunk:
                continue
            files = [
                f"__{chunk.stage * layout.tensor + rank}_{chunk.virtual}.distcp"
                for rank in range(layout.tensor)
            ]
            item_bytes = dtypes[next(iter(placement.hf_shapes))].itemsize
            units += _cut(placement, spec, files, item_bytes)
    return units


def load_unit(unit: Unit, spec: ModelSpec, reader: CheckpointReader, dtype: torch.dtype) -> Tensor:
    """Rows of the global Megatron tensor, made of the rows of its Hugging Face tensors."""

    def read(name: str, dimension: int, start: int, stop: int) -> Tensor:
        return reader.read_slice(name, dimension, start, stop).to(dtype)

    return read_rows(unit.placement, spec, unit.start, unit.stop, read)


def _cut(placement: Placement, spec: ModelSpec, files: list[str], item_bytes: int) -> list[Unit]:
    """Cut a global tensor into units; files are those of the tensor ranks, in their order."""
    tensor_size = len(files)
    rows, *rest = global_shape(placement, spec, tensor_size)
    row_bytes = math.prod(rest) * item_bytes
    if placement.kind == "replicated":
        pieces = (Piece(files[0], tuple(0 for _ in (rows, *rest)), (rows, *rest)),)
        return [Unit(placement, 0, rows, pieces)]
    if placement.kind == "row":
        columns = rest[0] // tensor_size
        return [
            Unit(
                placement,
                start,
                stop,
                tuple(
                    Piece(file, (start, rank * columns), (stop - start, columns))
                    for rank, file in enumerate(files)
                ),
            )
            for start, stop in row_blocks(rows, row_bytes)
        ]
    # Rows that stay together: those of a KV head and its query heads.
    together = (spec.heads_per_kv_head + 2) * spec.head_dim if placement.kind == "qkv" else 1
    num_parts = 2 if placement.kind == "gate_up" else 1
    rank_rows = rows // (num_parts * tensor_size)
    units = []
    for part in range(num_parts):
        for rank, file in enumerate(files):
            first = (part * tensor_size + rank) * rank_rows
            for begin, end in row_blocks(rank_rows // together, together * row_bytes):
                start, stop = first + begin * together, first + end * together
                piece = Piece(file, (start, *(0 for _ in rest)), (stop - start, *rest))
                units.append(Unit(placement, start, stop, (piece,)))
    return units


def global_shape(placement: Placement, spec: ModelSpec, tensor_size: int) -> tuple[int, ...]:
    """Of one layer's tensor over all tensor ranks, the vocabulary padded."""
    shapes = list(placement.hf_shapes.values())
    if placement.kind == "vocab":
        return (padded_vocab_size(spec.vocab_size, tensor_size), *shapes[0][1:])
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _chunk_of(placement: Placement, chunks: Sequence[PipelineChunk]) -> PipelineChunk:
    if placement.layer is not None:
        return next(chunk for chunk in chunks if placement.layer in chunk.layers)
    return chunks[0 if placement.megatron_name.startswith("embedding.") else -1]
