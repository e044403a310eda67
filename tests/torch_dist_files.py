"""Write torch_dist folders for tests, with the layout of Megatron spelt out once more.

Nothing of layout.py is used: what is written here and read back through the view would otherwise
agree even where both are wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.torch_dist import (
    StoredChunk,
    StoredTensor,
    TorchDistReader,
    encode_extra_state,
    tensor_buffers,
    write_metadata,
)
from r2vpo_megatron.models.spec import ModelSpec

Box = tuple[tuple[int, int], ...]  # (start, stop) by dimension

EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class Form:
    """Of a Megatron checkpoint that a reader must accept."""

    tensor: int = 1
    pipeline: int = 1
    stacked: bool = True
    fused_norms: bool = True
    padded_vocab: int = 256
    prefix: str = ""


class FolderWriter:
    """Collects chunks of tensors in files; `finish` writes .metadata."""

    def __init__(self, folder: Path, left_out: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._left_out = left_out
        self._tensors: dict[str, tuple[Tensor, list[StoredChunk]]] = {}
        self._objects: list[tuple[str, str, int, int]] = []

    def add(self, key: str, tensor: Tensor, boxes: Iterable[tuple[Box, str]]) -> None:
        """Store a tensor, each box of it in the file named beside it."""
        if key != self._left_out:
            self.store(key, tensor, boxes)

    def store(self, key: str, tensor: Tensor, boxes: Iterable[tuple[Box, str]]) -> None:
        """As `add`, of whatever key."""
        chunks = []
        for box, file in boxes:
            part = tensor[tuple(slice(*range_) for range_ in box)].contiguous()
            position, length = self._append(file, b"".join(tensor_buffers(part)))
            offsets = tuple(start for start, _ in box)
            chunks.append(StoredChunk(offsets, tuple(part.shape), file, position, length))
        self._tensors[key] = (tensor, chunks)

    def add_extra_state(self, key: str, file: str) -> None:
        position, length = self._append(file, encode_extra_state())
        self._objects.append((key, file, position, length))

    def finish(self) -> None:
        stored = [
            StoredTensor(key, tuple(tensor.shape), tensor.dtype, tuple(chunks))
            for key, (tensor, chunks) in self._tensors.items()
        ]
        write_metadata(self.folder, stored, self._objects)

    def _append(self, file: str, data: bytes) -> tuple[int, int]:
        with open(self.folder / file, "ab") as stream:
            position = stream.tell()
            stream.write(data)
        return position, len(data)


def grid(shape: Sequence[int], parts: Sequence[int]) -> list[Box]:
    """Boxes of a regular grid, `parts` along each dimension."""
    edges = [
        [(i * size // count, (i + 1) * size // count) for i in range(count)]
        for size, count in zip(shape, parts, strict=True)
    ]
    return list(itertools.product(*edges))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values times 100, the same for the same shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def save_one(folder: Path, tensor: Tensor, boxes: list[Box], num_files: int = 1) -> TorchDistReader:
    """A folder with one tensor, in these boxes."""
    writer = FolderWriter(folder)
    files = [f"__{number % num_files}_0.distcp" for number in range(len(boxes))]
    writer.add("a.weight", tensor, zip(boxes, files, strict=True))
    writer.add_extra_state("a._extra_state/shard_0_1", "__0_0.distcp")
    writer.finish()
    return TorchDistReader(folder)


def replace_blob(folder: Path, reader: TorchDistReader, data: bytes) -> TorchDistReader:
    """Let other bytes stand where the only chunk of the tensor is."""
    tensor = reader.tensors["a.weight"]
    (folder / "other.distcp").write_bytes(b"before" + data + b"after")
    chunk = replace(tensor.chunks[0], file="other.distcp", position=6, length=len(data))
    write_metadata(folder, [replace(tensor, chunks=(chunk,))], [])
    return TorchDistReader(folder)


def write_megatron(
    folder: Path,
    hf: Mapping[str, Tensor],
    spec: ModelSpec,
    form: Form | None = None,
    *,
    left_out: str = "",
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the tensors of a Hugging Face checkpoint as Megatron-core would.

    Args:
        folder: to write.
        hf: all tensors of the checkpoint.
        spec: of the same checkpoint.
        form: of the folder.
        left_out: a key that is not written.
        extra: further tensors, by key.
    """
    form = form or Form()
    writer = FolderWriter(folder, left_out)
    layers = [_layer_tensors(hf, spec, layer, form.fused_norms) for layer in range(spec.num_layers)]
    for name, first in layers[0].items():
        whole = torch.stack([layer[name] for layer in layers])
        boxes = [
            (((layer, layer + 1), *box), _file(form, layer, rank, spec))
            for layer in range(spec.num_layers)
            for box, rank in _boxes(name, first, form.tensor)
        ]
        if form.stacked:
            writer.add(f"{form.prefix}decoder.layers.{name}", whole, boxes)
            continue
        for layer in range(spec.num_layers):
            own = [(box[1:], file) for box, file in boxes if box[0][0] == layer]
            writer.add(f"{form.prefix}decoder.layers.{layer}.{name}", whole[layer], own)
    for module in EXTRA_STATES:
        for layer in range(spec.num_layers):
            key = f"decoder.layers.{module}._extra_state/shard_{layer}_{spec.num_layers}"
            writer.add_extra_state(key, _file(form, layer, 0, spec))
    _add_outer(writer, hf, spec, form)
    for key, tensor in (extra or {}).items():
        writer.store(key, tensor, [(grid(tensor.shape, [1] * tensor.dim())[0], "__0_0.distcp")])
    writer.finish()


def _add_outer(writer: FolderWriter, hf: Mapping[str, Tensor], spec: ModelSpec, form: Form) -> None:
    outer = {"embedding.word_embeddings.weight": ("model.embed_tokens.weight", 0)}
    if not spec.tied_embeddings:
        outer["output_layer.weight"] = ("lm_head.weight", spec.num_layers - 1)
    for key, (name, layer) in outer.items():
        padding = hf[name].new_zeros(form.padded_vocab - spec.vocab_size, spec.hidden_size)
        whole = torch.cat([hf[name], padding])
        boxes = grid(whole.shape, (form.tensor, 1))
        files = [(box, _file(form, layer, rank, spec)) for rank, box in enumerate(boxes)]
        writer.add(form.prefix + key, whole, files)
    norm, last = hf["model.norm.weight"], _file(form, spec.num_layers - 1, 0, spec)
    writer.add(f"{form.prefix}decoder.final_layernorm.weight", norm, [(((0, len(norm)),), last)])


def _file(form: Form, layer: int, rank: int, spec: ModelSpec) -> str:
    stage = layer * form.pipeline // spec.num_layers
    return f"__{stage * form.tensor + rank}_0.distcp"


def _boxes(name: str, tensor: Tensor, tensor_size: int) -> list[tuple[Box, int]]:
    """Boxes of one layer's tensor with the tensor rank that stores each."""
    whole = [1] * (tensor.dim() - 1)
    if "layer_norm" in name or "layernorm" in name or name == "self_attention.linear_proj.bias":
        return [(grid(tensor.shape, (1,))[0], 0)]
    if "linear_qkv" in name:
        return [(box, rank) for rank, box in enumerate(grid(tensor.shape, [tensor_size, *whole]))]
    if "linear_fc1" in name:
        boxes = grid(tensor.shape, [2 * tensor_size, *whole])
        return [(box, number % tensor_size) for number, box in enumerate(boxes)]
    return [(box, rank) for rank, box in enumerate(grid(tensor.shape, [1, tensor_size]))]


def _layer_tensors(
    hf: Mapping[str, Tensor], spec: ModelSpec, layer: int, fused_norms: bool
) -> dict[str, Tensor]:
    own = {
        name.removeprefix(f"model.layers.{layer}."): tensor
        for name, tensor in hf.items()
        if name.startswith(f"model.layers.{layer}.")
    }
    tensors = {}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" not in own:
            continue
        q, k, v = (own[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
        rows = []
        for head in range(spec.num_kv_heads):
            per_group = spec.num_heads // spec.num_kv_heads * spec.head_dim
            rows += list(q[head * per_group : (head + 1) * per_group])
            rows += list(k[head * spec.head_dim : (head + 1) * spec.head_dim])
            rows += list(v[head * spec.head_dim : (head + 1) * spec.head_dim])
        tensors[f"self_attention.linear_qkv.{kind}"] = torch.stack(rows)
    tensors["self_attention.linear_proj.weight"] = own["self_attn.o_proj.weight"]
    if "self_attn.o_proj.bias" in own:
        tensors["self_attention.linear_proj.bias"] = own["self_attn.o_proj.bias"]
    gate, up = own["mlp.gate_proj.weight"], own["mlp.up_proj.weight"]
    tensors["mlp.linear_fc1.weight"] = torch.cat([gate, up])
    tensors["mlp.linear_fc2.weight"] = own["mlp.down_proj.weight"]
    norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    if fused_norms:
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    tensors[norms[0]] = own["input_layernorm.weight"]
    tensors[norms[1]] = own["post_attention_layernorm.weight"]
    return tensors
