"""Whether the tensors of a Hugging Face checkpoint, or of a view as one, are those of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.layout import Placement, placements
from r2vpo_megatron.checkpoint.safetensors_header import TensorEntry
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import ModelSpec

_VALID_SOURCES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_LISTED = 8


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every learned tensor of a Hugging Face checkpoint, in its order, with its shape."""
    return {
        name: shape
        for group in placements(spec)
        for placement in group
        for name, shape in placement.hf_shapes.items()
    }


class TensorReader(Protocol):
    """A checkpoint folder, of either format, as Hugging Face tensors."""

    folder: Path

    def names(self) -> list[str]:
        """All tensor names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""

    def read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along a dimension."""


def entries_of(source: TensorReader) -> dict[str, TensorEntry]:
    """All its tensors, in its order."""
    return {
        name: TensorEntry(name, source.dtype(name), source.shape(name)) for name in source.names()
    }


def is_dropped(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor of a Hugging Face checkpoint is computed, or is a tied LM head."""
    names = ARCHITECTURES[spec.architecture].names
    if spec.tied_embeddings and name == names.lm_head:
        return True
    return name.endswith(names.ignored_suffixes)


@dataclass(frozen=True)
class TensorFaults:
    """Where a checkpoint's tensors are not those of the model; each for a person to read."""

    unmapped: tuple[str, ...]  # no place in the model
    unfilled: tuple[str, ...]  # not in the checkpoint
    misshapen: tuple[str, ...]


def tensor_faults(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> TensorFaults:
    """Compare the names and shapes of a checkpoint with what the model has."""
    expected = expected_tensors(spec)
    tied = {ARCHITECTURES[spec.architecture].names.lm_head: (spec.vocab_size, spec.hidden_size)}
    known = expected | (tied if spec.tied_embeddings else {})
    return TensorFaults(
        tuple(name for name in shapes if name not in expected and not is_dropped(name, spec)),
        tuple(name for name in expected if name not in shapes),
        tuple(
            f"{name} {list(shapes[name])}, expected {list(shape)}"
            for name, shape in known.items()
            if name in shapes and shapes[name] != shape
        ),
    )


def check_tensors(
    source: Mapping[str, TensorEntry], spec: ModelSpec, folder: Path, *, keep_dtypes: bool = False
) -> None:
    """Check that every tensor of the source has a target and every target is filled.

    Args:
        source: all tensors, as of `entries_of`.
        spec: the model.
        folder: where they lie, for messages.
        keep_dtypes: whether values stay in their dtype: then parts of one Megatron tensor must
            have the same.

    Raises:
        ValueError: listing the unmapped, the unfilled, those of a wrong shape or a dtype that is
            not floating, and parts of one Megatron tensor whose dtypes differ.
    """
    faults = tensor_faults({name: entry.shape for name, entry in source.items()}, spec)
    expected = expected_tensors(spec)
    kept = {name: entry for name, entry in source.items() if name in expected}
    wrong_dtypes = [
        f"{name} {dtype_name(entry.dtype)}"
        for name, entry in kept.items()
        if entry.dtype not in _VALID_SOURCES
    ]
    if keep_dtypes and not wrong_dtypes:
        wrong_dtypes = _mixed_dtypes(kept, spec)
    problems: dict[str, Sequence[str]] = {
        "unmapped (not used by this model)": sorted(faults.unmapped),
        "unfilled (missing in the checkpoint)": faults.unfilled,
        "wrong shape": faults.misshapen,
        "wrong dtype (valid: float32, bfloat16, float16; for parts of one Megatron tensor the "
        "same, or --dtype)": wrong_dtypes,
    }
    found = [f"{title}: {abbreviated(names)}" for title, names in problems.items() if names]
    if found:
        raise ValueError(
            f"checkpoint {folder} does not fit its config.json ({spec.architecture}): "
            + "; ".join(found)
        )


def abbreviated(items: Sequence[str]) -> str:
    """The first eight, and how many more."""
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json writes it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _mixed_dtypes(kept: Mapping[str, TensorEntry], spec: ModelSpec) -> list[str]:
    """Tensors that end in one stacked Megatron tensor, but with several dtypes."""
    first: dict[str, TensorEntry] = {}
    mixed = []
    for placement in (placement for group in placements(spec) for placement in group):
        for name in placement.hf_shapes:
            if name not in kept:
                continue
            before = first.setdefault(_stack_of(placement), kept[name])
            if before.dtype != kept[name].dtype:
                mixed.append(
                    f"{name} {dtype_name(kept[name].dtype)}, "
                    f"where {before.name} has {dtype_name(before.dtype)}"
                )
    return mixed


def _stack_of(placement: Placement) -> str:
    """The Megatron name without the layer's number: what all layers share on disk."""
    if placement.layer is None:
        return placement.megatron_name
    return placement.megatron_name.replace(f".{placement.layer}.", ".", 1)
