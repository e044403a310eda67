"""How Megatron lays out a Hugging Face checkpoint, as pure functions on tensors.

replicated  norms and the o bias: equal on every TP rank
vocab       embedding and LM head: rows, padded with zeros to a multiple of 128 x TP
qkv         for each KV head: its query heads, its key head, its value head; then rows
gate_up     on each TP rank: its rows of gate, then its rows of up
row         o and down projections: columns
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from r2vpo_megatron.device.process_memory import RemoteTensor
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size

Kind = Literal["replicated", "vocab", "qkv", "gate_up", "row"]
Shape = tuple[int, ...]
Shard = Tensor | RemoteTensor  # of this process, or of another one

# (name, dimension, start, stop) -> that slice of a tensor of the checkpoint
ReadSlice = Callable[[str, int, int, int], Tensor]


@dataclass(frozen=True)
class Placement:
    """One Megatron parameter and the Hugging Face tensors that it is made of."""

    megatron_name: str  # with the layer's number in the whole model, not in the stage
    hf_shapes: dict[str, Shape]  # in the order in which they are fused
    kind: Kind
    layer: int | None  # None: outside the layers


def interleave_qkv(query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """Fuse rows of q, k and v per KV head.

    Args:
        query: [kv_heads * heads_per_kv_head * head_dim, ...].
        key: [kv_heads * head_dim, ...].
        value: [kv_heads * head_dim, ...].
        head_dim: rows of one head.

    Returns:
        [kv_heads * (heads_per_kv_head + 2) * head_dim, ...].
    """
    num_groups, rest = key.shape[0] // head_dim, key.shape[1:]
    parts = [part.reshape(num_groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, *rest)


def split_qkv(fused: Shard, head_dim: int, heads_per_kv_head: int) -> tuple[Shard, ...]:
    """Undo interleave_qkv, as views: query, key and value, [kv_heads, rows of one, ...]."""
    rest = fused.shape[1:]
    groups = fused.reshape(-1, (heads_per_kv_head + 2) * head_dim, *rest)
    sizes = [heads_per_kv_head * head_dim, head_dim, head_dim]
    return groups.split(sizes, dim=1)


def placements(spec: ModelSpec) -> list[tuple[Placement, ...]]:
    """Every parameter, in the order of a Hugging Face checkpoint.

    Parameters whose tensors alternate there (q weight, q bias, k weight, ...) are in one tuple.
    A tied LM head is not listed.
    """
    names = ARCHITECTURES[spec.architecture].names
    hidden = spec.hidden_size
    vocab_shape = (spec.vocab_size, hidden)
    embedding = Placement(
        "embedding.word_embeddings.weight", {names.embedding: vocab_shape}, "vocab", None
    )
    norm = Placement(
        "decoder.final_layernorm.weight", {names.final_norm: (hidden,)}, "replicated", None
    )
    head = Placement("output_layer.weight", {names.lm_head: vocab_shape}, "vocab", None)
    layers = [group for layer in range(spec.num_layers) for group in _layer(spec, layer)]
    return [(embedding,), *layers, (norm,), *([] if spec.tied_embeddings else [(head,)])]


def _layer(spec: ModelSpec, layer: int) -> list[tuple[Placement, ...]]:
    names = ARCHITECTURES[spec.architecture].names
    prefix = names.layer_prefix.format(layer=layer)
    hidden, ffn = spec.hidden_size, spec.ffn_size
    query_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv_rows = {names.query: query_rows, names.key: kv_rows, names.value: kv_rows}

    def place(megatron: str, kind: Kind, suffix: str, shapes: Mapping[str, Shape]) -> Placement:
        hf_shapes = {f"{prefix}{name}.{suffix}": shape for name, shape in shapes.items()}
        return Placement(f"decoder.layers.{layer}.{megatron}.{suffix}", hf_shapes, kind, layer)

    qkv_weight = {name: (rows, hidden) for name, rows in qkv_rows.items()}
    qkv = [place("self_attention.linear_qkv", "qkv", "weight", qkv_weight)]
    if spec.qkv_bias:
        qkv_bias = {name: (rows,) for name, rows in qkv_rows.items()}
        qkv.append(place("self_attention.linear_qkv", "qkv", "bias", qkv_bias))
    output = [
        place("self_attention.linear_proj", "row", "weight", {names.output: (hidden, query_rows)})
    ]
    if spec.o_bias:
        output.append(
            place("self_attention.linear_proj", "replicated", "bias", {names.output: (hidden,)})
        )
    gate_up = {names.gate: (ffn, hidden), names.up: (ffn, hidden)}
    return [
        tuple(qkv),
        tuple(output),
        (place("mlp.linear_fc1", "gate_up", "weight", gate_up),),
        (place("mlp.linear_fc2", "row", "weight", {names.down: (hidden, ffn)}),),
        (place("input_layernorm", "replicated", "weight", {names.attention_norm: (hidden,)}),),
        (place("pre_mlp_layernorm", "replicated", "weight", {names.mlp_norm: (hidden,)}),),
    ]


def shard_shape(placement: Placement, spec: ModelSpec, tensor_size: int) -> Shape:
    """Shape of the parameter on each TP rank."""
    shapes = list(placement.hf_shapes.values())
    rows, rest = sum(shape[0] for shape in shapes), shapes[0][1:]
    if placement.kind == "replicated":
        return shapes[0]
    if placement.kind == "row":
        return (rows, rest[0] // tensor_size)
    if placement.kind == "vocab":
        rows = padded_vocab_size(spec.vocab_size, tensor_size)
    return (rows // tensor_size, *rest)


def read_rows(
    placement: Placement, spec: ModelSpec, start: int, stop: int, read: ReadSlice
) -> Tensor:
    """Rows of the parameter as it would be on one TP rank, reading no more than they need.

    Args:
        placement: of the parameter.
        spec: the model.
        start, stop: of the rows; of whole KV heads for "qkv", of one half for "gate_up"; beyond
            the vocabulary rows are zero.
        read: the checkpoint.
    """
    names = list(placement.hf_shapes)
    if placement.kind == "qkv":
        group_rows = (spec.heads_per_kv_head + 2) * spec.head_dim
        first, last = start // group_rows * spec.head_dim, stop // group_rows * spec.head_dim
        query, key, value = (
            read(name, 0, first * times, last * times)
            for name, times in zip(names, (spec.heads_per_kv_head, 1, 1), strict=True)
        )
        return interleave_qkv(query, key, value, spec.head_dim)
    if placement.kind == "gate_up":
        half, first = divmod(start, spec.ffn_size)
        return read(names[half], 0, first, first + stop - start)
    num_rows = placement.hf_shapes[names[0]][0]
    rows = read(names[0], 0, min(start, num_rows), min(stop, num_rows))
    if stop <= num_rows:
        return rows
    assert placement.kind == "vocab"
    return torch.cat([rows, rows.new_zeros(stop - start - len(rows), rows.shape[1])])


def read_shard(
    placement: Placement, spec: ModelSpec, tensor_rank: int, tensor_size: int, read: ReadSlice
) -> Tensor:
    """Make one TP rank's parameter, reading no more of the checkpoint than it needs."""
    shape = shard_shape(placement, spec, tensor_size)
    if placement.kind == "replicated":
        return read_rows(placement, spec, 0, shape[0], read)
    if placement.kind == "row":
        (name,) = placement.hf_shapes
        return read(name, 1, tensor_rank * shape[1], (tensor_rank + 1) * shape[1])
    if placement.kind == "gate_up":
        half = shape[0] // 2
        starts = (tensor_rank * half, spec.ffn_size + tensor_rank * half)
        return torch.cat(
            [read_rows(placement, spec, start, start + half, read) for start in starts]
        )
    start = tensor_rank * shape[0]
    return read_rows(placement, spec, start, start + shape[0], read)


class TensorPieces:
    """A tensor that has not been put together yet.

    Args:
        pieces: follow each other along one dimension; the first dimension may be split into two.
            The first is of this process, others may be another's.
        dim: that dimension, of the pieces.
        shape: of the whole.
    """

    def __init__(self, pieces: Sequence[Shard], dim: int, shape: Shape) -> None:
        self._pieces = pieces
        self._dim = dim
        self.shape = shape
        self.dtype = pieces[0].dtype

    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def copy_into(self, whole: Tensor) -> None:
        """Put the pieces together in one pass.

        Args:
            whole: contiguous, of the whole's shape, on any device.
        """
        dims = list(self._pieces[0].shape)
        dims[self._dim] = -1
        places = whole.view(dims).split(
            [piece.shape[self._dim] for piece in self._pieces], self._dim
        )
        for place, piece in zip(places, self._pieces, strict=True):
            if isinstance(piece, Tensor):
                place.copy_(piece)
            else:
                piece.copy_into(place)

    def whole(self) -> Tensor:
        """The tensor, contiguous; one piece that is so already is not copied."""
        first = self._pieces[0]
        if not isinstance(first, Tensor):
            raise TypeError("the first piece lies in another process")
        if len(self._pieces) == 1 and first.is_contiguous():
            return first.view(self.shape)
        whole = first.new_empty(self.shape)
        self.copy_into(whole)
        return whole


def merge_shards(
    placement: Placement, spec: ModelSpec, shards: Sequence[Shard]
) -> dict[str, TensorPieces]:
    """Undo read_shard over all TP ranks: the whole Hugging Face tensors, as views of the shards.

    Args:
        placement: of the parameter.
        spec: the model.
        shards: one a TP rank, in order; for a replicated parameter the first is enough.
    """
    pieces: list[Sequence[Shard]]
    if placement.kind == "replicated":
        pieces = [shards[:1]]
    elif placement.kind == "vocab":
        starts = range(0, spec.vocab_size, len(shards[0]))
        pieces = [[s[: spec.vocab_size - at] for at, s in zip(starts, shards, strict=False)]]
    elif placement.kind == "gate_up":
        pieces = list(zip(*(shard.chunk(2) for shard in shards), strict=True))
    elif placement.kind == "qkv":
        split = (split_qkv(shard, spec.head_dim, spec.heads_per_kv_head) for shard in shards)
        pieces = list(zip(*split, strict=True))
    else:
        pieces = [shards]
    dim = 1 if placement.kind == "row" else 0
    return {
        name: TensorPieces(parts, dim, shape)
        for (name, shape), parts in zip(placement.hf_shapes.items(), pieces, strict=True)
    }
