"""Which box of which tensor of a checkpoint the memory of this rank holds.

A checkpoint has the same tensors whatever the layout: a rank's piece of one is given by the
tensor's key, the whole shape, and the box. Megatron's `sharded_state_dict` says it of parameters.
What the optimizer steps is a parameter, or its fp32 copy; of the distributed optimizer a range of
its elements, which is at most a few boxes. So each rank can write and read just what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

# Before a parameter's key, as Megatron names them.
_OPTIMIZER_PREFIX = "optimizer.state"
MAIN_PARAMETER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor of the checkpoint, and the values of this rank that belong there."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    values: Tensor  # of the box's shape, contiguous; a view of what is trained
    is_written: bool  # here, not by another rank that has the same values
    has_padded_rows: bool  # the first dimension is padded, differently in another layout

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.key} (box at {list(self.offsets)} of sizes {list(self.values.shape)})"


@dataclass(frozen=True)
class _Region:
    """Part of a parameter that is one box: all of it, or half of a gated layer's."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int  # of the parameter's elements, the first one
    replica: tuple[int, ...]  # pipeline, tensor and data rank among those with the same values
    has_padded_rows: bool

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.sizes)

    def piece(
        self,
        prefix: str,
        values: Tensor,
        box: tuple[Sequence[int], Sequence[int]],
        is_written: bool,
    ) -> Piece:
        """The piece at a box of this region, of elements that lie in a row."""
        starts, sizes = box
        return Piece(
            prefix + self.key,
            self.shape,
            tuple(offset + start for offset, start in zip(self.offsets, starts, strict=True)),
            values.view(tuple(sizes)),
            is_written,
            self.has_padded_rows,
        )


def all_pieces(
    chunks: Sequence[Any], optimizer: Any, moments: Mapping[Tensor, Mapping[str, Tensor]]
) -> list[Piece]:
    """Pieces of parameters and optimizer that this rank holds, replicas included.

    Args:
        chunks: this rank's model chunks, in DistributedDataParallel.
        optimizer: Megatron's, of these chunks.
        moments: of each tensor that the optimizer steps, by name; without those before a step.
    """
    regions = _regions_by_parameter(chunks)
    pieces = []
    for parameter, parts in regions.items():
        elements = parameter.detach().view(-1)
        for region in parts:
            values = elements[region.start : region.stop]
            whole = ([0] * len(region.sizes), region.sizes)
            pieces.append(region.piece("", values, whole, not any(region.replica)))
    for single in single_optimizers(optimizer):
        is_sharded = isinstance(single, DistributedOptimizer)
        for parameter, stepped, start in _stepped_tensors(single):
            named = {name: moments[stepped][name] for name in MOMENTS if stepped in moments}
            if stepped.dtype != parameter.dtype:
                named[MAIN_PARAMETER] = stepped
            for region in regions[parameter]:
                # Data parallel ranks of the distributed optimizer hold ranges, not replicas.
                replica = region.replica[:-1] if is_sharded else region.replica
                for name, tensor in named.items():
                    prefix = f"{_OPTIMIZER_PREFIX}.{name}."
                    pieces += _range_pieces(region, prefix, tensor, start, not any(replica))
    return pieces


def extra_states(chunks: Sequence[Any]) -> list[str]:
    """Keys of the empty objects that Megatron's loader expects and this rank is to write."""
    return [
        entry.unique_key
        for chunk in chunks
        for entry in chunk.module.sharded_state_dict().values()
        if isinstance(entry, ShardedObject) and not any(entry.replica_id)
    ]


def single_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that a ChainedOptimizer holds, without those of no parameters."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [single for single in chained if not single.is_stub_optimizer]


def boxes_of_range(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a range of a tensor's elements, in the order of memory, into boxes.

    Args:
        shape: of the tensor, at least one dimension.
        start: the first element.
        stop: one past the last one; after `start`.

    Yields:
        (offsets, sizes) of the fewest boxes in the range's order: at most 2 x dimensions - 1.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row_numel = math.prod(shape[1:])
    first, last = -(-start // row_numel), stop // row_numel  # the whole rows
    if first > last:
        yield from _boxes_of_row(shape, last, start - last * row_numel, stop - last * row_numel)
        return
    if start < first * row_numel:
        yield from _boxes_of_row(shape, first - 1, start - (first - 1) * row_numel, row_numel)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row_numel < stop:
        yield from _boxes_of_row(shape, last, 0, stop - last * row_numel)


def _boxes_of_row(
    shape: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes_of_range(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


def _range_pieces(
    region: _Region, prefix: str, tensor: Tensor, start: int, is_written: bool
) -> Iterator[Piece]:
    """Pieces of what `tensor`, beginning at element `start` of the parameter, has of a region."""
    elements = tensor.detach().view(-1)
    first, last = max(region.start, start), min(region.stop, start + elements.numel())
    if first >= last:
        return
    position = first - start
    for box in boxes_of_range(region.sizes, first - region.start, last - region.start):
        numel = math.prod(box[1])
        yield region.piece(prefix, elements[position : position + numel], box, is_written)
        position += numel


def _regions_by_parameter(chunks: Sequence[Any]) -> dict[Tensor, list[_Region]]:
    regions: dict[Tensor, list[_Region]] = {}
    for chunk in chunks:
        for entry in chunk.module.sharded_state_dict().values():
            if isinstance(entry, ShardedObject):
                continue
            # A gated layer's factory makes two views of the parameter: gate and up projection.
            is_factory = isinstance(entry, ShardedTensorFactory)
            parts: Iterable[ShardedTensor] = entry.build() if is_factory else [entry]
            regions[entry.data] = [_region(entry.data, part) for part in parts]
    return regions


def _region(parameter: Tensor, part: ShardedTensor) -> _Region:
    assert part.data is not None and part.data.is_contiguous()
    assert isinstance(part.replica_id, tuple)
    return _Region(
        key=part.key,
        shape=tuple(part.global_shape),
        offsets=tuple(part.global_offset),
        sizes=(*[1] * part.prepend_axis_num, *part.local_shape),
        start=part.data.storage_offset() - parameter.storage_offset(),
        replica=part.replica_id,
        has_padded_rows=part.allow_shape_mismatch,
    )


def _stepped_tensors(optimizer: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(parameter, what the optimizer steps in its place, first element of it in the parameter).

    The groups are those of megatron/core/optimizer/{distrib_optimizer,optimizer}.py (0.16).
    """
    is_sharded = isinstance(optimizer, DistributedOptimizer)
    if is_sharded:
        parameters = [*optimizer.model_float16_groups, *optimizer.model_fp32_groups]
        stepped = [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        parameters = [*optimizer.float16_groups, *optimizer.fp32_from_fp32_groups]
        stepped = [*optimizer.fp32_from_float16_groups, *optimizer.fp32_from_fp32_groups]
    else:
        parameters = stepped = [group["params"] for group in optimizer.param_groups]
    for parameter, tensor in zip(chain(*parameters), chain(*stepped), strict=True):
        held = optimizer._get_model_param_range_map(parameter)["param"] if is_sharded else None
        yield parameter, tensor, held.start if held else 0
