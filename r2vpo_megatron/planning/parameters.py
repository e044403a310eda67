"""Parameters of every rank, from the table that loads and saves them (`checkpoint/layout.py`)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from r2vpo_megatron.checkpoint.layout import placements, shard_shape
from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.models.pipeline import layers_of_chunks
from r2vpo_megatron.models.spec import ModelSpec

# Of Megatron's buffers with a distributed optimizer: every parameter begins at, and every bucket
# ends at, a multiple of so many elements
# (megatron/core/distributed/param_and_grad_buffer.py, `_ParamAndGradBuffer`).
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True)
class ChunkParameters:
    """One model chunk on one tensor parallel rank; they are the same size on all of them.

    Attributes:
        num_layers: decoder layers of the chunk.
        counts: elements of every parameter, the embedding first, the LM head last.
        shared: index of a tied embedding whose other copy another stage has, None without one;
            Megatron gives it a bucket of its own.
        has_embedding: takes token ids.
        has_head: ends in final norm and LM head.
    """

    num_layers: int
    counts: tuple[int, ...]
    shared: int | None
    has_embedding: bool
    has_head: bool

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.counts)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.counts, default=0)

    def buffer_elements(self, num_shards: int) -> int:
        """Elements of Megatron's gradient buffer.

        Args:
            num_shards: ranks that share a distributed optimizer; 1 where it is not distributed.
        """
        if num_shards == 1:
            return self.num_parameters
        bucket_multiple = math.lcm(num_shards, _BUCKET_ALIGNMENT)
        end, num_in_bucket = 0, 0
        for index, count in reversed([*enumerate(self.counts)]):
            is_shared = index == self.shared
            end = _round_up(end, _PARAMETER_ALIGNMENT)
            if is_shared and num_in_bucket:
                end = _round_up(end, bucket_multiple)
                num_in_bucket = 0
            end += count
            num_in_bucket += 1
            if is_shared:
                end = _round_up(end, bucket_multiple)
                num_in_bucket = 0
        return _round_up(end, bucket_multiple)


def stage_parameters(spec: ModelSpec, parallel: ParallelConfig) -> list[list[ChunkParameters]]:
    """The model chunks of every pipeline stage, bottom up.

    Args:
        spec: the model.
        parallel: sizes and layout of the grid.

    Raises:
        ValueError: layers that do not divide, see `models.pipeline.layers_of_chunks`.
    """
    sizes = _parameter_sizes(spec, parallel.tensor)
    chunks = layers_of_chunks(
        spec.num_layers, parallel.pipeline, parallel.interleaved_chunks, parallel.pipeline_layout
    )
    is_alone = parallel.pipeline == 1
    made = []
    for number, layers in enumerate(chunks):
        is_first, is_last = number == 0, number == len(chunks) - 1
        # A tied head on a stage without the embedding is a copy of it.
        head = sizes.embedding if spec.tied_embeddings and not is_alone else sizes.head
        counts = [
            *([sizes.embedding] if is_first else []),
            *(sizes.layer * len(layers)),
            *([sizes.final_norm] if is_last else []),
            *([head] if is_last and head else []),
        ]
        shared = None
        if spec.tied_embeddings and not is_alone and (is_first or is_last):
            shared = 0 if is_first else len(counts) - 1
        made.append(ChunkParameters(len(layers), tuple(counts), shared, is_first, is_last))
    return [made[stage :: parallel.pipeline] for stage in range(parallel.pipeline)]


@dataclass(frozen=True)
class _Sizes:
    embedding: int
    layer: tuple[int, ...]
    final_norm: int
    head: int  # 0 where it is tied


@functools.lru_cache(maxsize=64)
def _parameter_sizes(spec: ModelSpec, tensor: int) -> _Sizes:
    sizes: dict[str, int] = {}
    layer: list[int] = []
    for placement in (one for group in placements(spec) for one in group):
        count = math.prod(shard_shape(placement, spec, tensor))
        if placement.layer is None:
            sizes[placement.megatron_name] = count
        elif placement.layer == 0:
            layer.append(count)
    return _Sizes(
        embedding=sizes["embedding.word_embeddings.weight"],
        layer=tuple(layer),
        final_norm=sizes["decoder.final_layernorm.weight"],
        head=sizes.get("output_layer.weight", 0),
    )


def total_parameters(chunks: Sequence[ChunkParameters]) -> int:
    """Elements of all parameters of some chunks."""
    return sum(chunk.num_parameters for chunk in chunks)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
