"""A torch_dist checkpoint of Megatron-core, seen as the Hugging Face tensors it was made of.

Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [layers, rows, columns]. Norms have
the keys of Transformer Engine, which fuses them with the linear layer that follows, as in
Megatron's own layer specs (megatron/core/models/gpt/gpt_layer_specs.py). Read are also keys
without Transformer Engine, layers that are not stacked (`decoder.layers.3.mlp...`), keys of a
model wrapped in DistributedDataParallel (`module.decoder...`) and any padding of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.closing import Closing
from r2vpo_megatron.checkpoint.layout import Placement, Shape, placements
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.checkpoint.tensor_check import abbreviated
from r2vpo_megatron.checkpoint.torch_dist import TorchDistReader, is_torch_dist
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec

COMPANIONS = "hf"  # folder of the Hugging Face model's config and tokenizer, in the checkpoint

_LAYERS = "decoder.layers."
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_WEIGHT_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_WRAPPER = "module."


def stored_key(placement: Placement) -> str:
    """Key of a parameter in a torch_dist checkpoint; that of a layer is shared by all layers."""
    if placement.layer is None:
        return placement.megatron_name
    return _LAYERS + _fused(_name_in_layer(placement))


def stored_rows(
    placement: Placement, spec: ModelSpec, name: str, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Where rows of a Hugging Face tensor lie among the rows of its Megatron tensor.

    Args:
        placement: of the Megatron tensor.
        spec: the model.
        name: one of the placement's Hugging Face tensors.
        start: first row of the slice.
        stop: row after the last.

    Yields:
        (start, stop) in the Megatron tensor over all TP ranks; together, in this order, the slice.
    """
    names = list(placement.hf_shapes)
    if placement.kind != "qkv":
        before = sum(placement.hf_shapes[other][0] for other in names[: names.index(name)])
        yield before + start, before + stop
        return
    # Of each KV head: rows of its query heads, of its key head, of its value head.
    sizes = [spec.heads_per_kv_head * spec.head_dim, spec.head_dim, spec.head_dim]
    part = names.index(name)
    size = sizes[part]
    for head in range(start // size, -(-stop // size)):
        base = head * sum(sizes) + sum(sizes[:part]) - head * size
        yield base + max(start, head * size), base + min(stop, (head + 1) * size)


@dataclass(frozen=True)
class _Source:
    """Where a placement lies: a whole tensor, or one layer of a stack."""

    placement: Placement
    key: str
    layer: int | None  # None: not stacked


class MegatronCheckpoint(Closing):
    """Hugging Face tensors of a torch_dist folder by name; the interface is CheckpointReader's.

    Attributes:
        folder: as given.
        spec: of the model.
        unmapped: keys that look like weights of a model but have no place in this one.
    """

    def __init__(self, folder: str | Path, *, spec: ModelSpec | None = None) -> None:
        """Find every tensor and check that it is there in its shape.

        Args:
            folder: holds .metadata.
            spec: of the model; None reads `folder`/hf/config.json.

        Raises:
            ValueError: the folder is broken, or listing what is missing or of the wrong shape.
        """
        self.folder = Path(folder)
        self._reader = TorchDistReader(folder)
        self.spec = spec if spec is not None else _companion_spec(self.folder)
        self._sources: dict[str, _Source] = {}
        used = self._map()
        self.unmapped = [
            key
            for key in self._reader.tensors
            if key not in used
            and unwrapped(key).startswith(_WEIGHT_PREFIXES)
            and "._extra_state" not in key
        ]
        for key in used:
            self._reader.check(key)

    def _map(self) -> set[str]:
        """Fill in the sources, in the order of a Hugging Face checkpoint; the keys they use."""
        keys = {unwrapped(key): key for key in self._reader.tensors}
        missing: dict[str, None] = {}  # in order, each once
        misshapen: dict[str, None] = {}
        used = set()
        for group in placements(self.spec):
            sources = [self._source(placement, keys) for placement in group]
            for placement, source in zip(group, sources, strict=True):
                if source is None:
                    missing[stored_key(placement)] = None
                    continue
                used.add(source.key)
                fault = self._fault(source)
                if fault:
                    misshapen[fault] = None
            # Weight and bias alternate: q weight, q bias, k weight, ...
            for names in zip(*(placement.hf_shapes for placement in group), strict=True):
                for name, source in zip(names, sources, strict=True):
                    if source is not None:
                        self._sources[name] = source
        problems = [
            f"{title}: {abbreviated(list(found))}"
            for title, found in (("missing", missing), ("wrong shape", misshapen))
            if found
        ]
        if problems:
            raise ValueError(
                f"checkpoint {self.folder} does not fit its config.json "
                f"({self.spec.architecture}): {'; '.join(problems)}"
            )
        return used

    def _source(self, placement: Placement, keys: dict[str, str]) -> _Source | None:
        if placement.layer is None:
            key = keys.get(placement.megatron_name)
            return None if key is None else _Source(placement, key, None)
        name = _name_in_layer(placement)
        for candidate in (_fused(name), name):
            if (key := keys.get(f"{_LAYERS}{candidate}")) is not None:
                return _Source(placement, key, placement.layer)
            if (key := keys.get(f"{_LAYERS}{placement.layer}.{candidate}")) is not None:
                return _Source(placement, key, None)
        return None

    def _fault(self, source: _Source) -> str:
        """What is wrong with a stored shape; empty where nothing is."""
        placement, shape = source.placement, self._reader.tensors[source.key].shape
        hf_shapes = list(placement.hf_shapes.values())
        expected: Shape = (sum(shape[0] for shape in hf_shapes), *hf_shapes[0][1:])
        if source.layer is not None:
            expected = (self.spec.num_layers, *expected)
        padded = placement.kind == "vocab" and shape[:1] >= expected[:1]
        if shape == expected or (padded and shape[1:] == expected[1:]):
            return ""
        at_least = "at least " if placement.kind == "vocab" else ""
        return f"{source.key} {list(shape)}, expected {at_least}{list(expected)}"

    def close(self) -> None:
        """Nothing can be asked any more."""
        self._sources.clear()
        self._reader.close()

    def names(self) -> list[str]:
        """All tensor names, in the order of a Hugging Face checkpoint."""
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, the vocabulary not padded."""
        return self._sources[name].placement.hf_shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, as it is stored."""
        return self._reader.tensors[self._sources[name].key].dtype

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        return self.read_slice(name, 0, 0, self.shape(name)[0])

    def read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along dimension 0 or 1, on the CPU, contiguous.

        Raises:
            ValueError: the tensor has no such slice, or what it is stored in is broken.
        """
        source, shape = self._sources[name], self.shape(name)
        if dimension not in (0, 1) or dimension >= len(shape):
            raise ValueError(f"tensor {name!r} {list(shape)}: cannot be cut along {dimension}")
        if not 0 <= start <= stop <= shape[dimension]:
            raise ValueError(
                f"tensor {name!r} {list(shape)}: has no slice {start}:{stop} along {dimension}"
            )
        ranges = [(0, size) for size in shape]
        ranges[dimension] = (start, stop)
        part = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype(name))
        filled = 0
        for rows in stored_rows(source.placement, self.spec, name, *ranges[0]):
            out = part[filled : filled + rows[1] - rows[0]]
            box = [rows, *ranges[1:]]
            if source.layer is not None:
                out, box = out.unsqueeze(0), [(source.layer, source.layer + 1), *box]
            self._reader.read(source.key, box, out)
            filled += rows[1] - rows[0]
        return part


def open_checkpoint(
    folder: str | Path, spec: ModelSpec | None = None
) -> CheckpointReader | MegatronCheckpoint:
    """Hugging Face tensors of a folder of either format.

    Args:
        folder: of the checkpoint.
        spec: of a torch_dist folder that has no hf/config.json, as that of a training run.

    Raises:
        ValueError: neither format, or broken.
    """
    if not is_torch_dist(folder):
        return CheckpointReader(folder)
    has_config = (Path(folder) / COMPANIONS / "config.json").is_file()
    return MegatronCheckpoint(folder, spec=None if has_config else spec)


def _companion_spec(folder: Path) -> ModelSpec:
    if not (folder / COMPANIONS / "config.json").is_file():
        raise ValueError(
            f"checkpoint {folder}: has no {COMPANIONS}/config.json, as a training checkpoint; "
            "copy the model's config.json there"
        )
    return read_model_spec(folder / COMPANIONS)


def _name_in_layer(placement: Placement) -> str:
    return placement.megatron_name.removeprefix(f"{_LAYERS}{placement.layer}.")


def _fused(name: str) -> str:
    for prefix, fused in _FUSED_NORMS.items():
        if name.startswith(prefix):
            return fused + name.removeprefix(prefix)
    return name


def unwrapped(key: str) -> str:
    """A key without what a wrapper such as DistributedDataParallel puts before it."""
    while key.startswith(_WRAPPER):
        key = key.removeprefix(_WRAPPER)
    return key
