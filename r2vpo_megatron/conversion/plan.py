"""What a conversion will read and write, checked and told before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from r2vpo_megatron.checkpoint.safetensors_header import TensorEntry
from r2vpo_megatron.checkpoint.tensor_check import abbreviated, dtype_name, expected_tensors
from r2vpo_megatron.conversion.folder_lock import check_free, partial_folder
from r2vpo_megatron.conversion.progress import human_bytes
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import ModelSpec

BLOCK_BYTES = 32 * 2**20  # of a tensor, read and written at once
ASSUMED_BYTES_PER_SECOND = 500e6

DTYPES = {"keep": None, "bfloat16": torch.bfloat16, "float32": torch.float32}
_COPIES_IN_MEMORY = 3  # a piece as read, as laid out, and the one before, being written

Direction = Literal["hf_to_megatron", "megatron_to_hf"]


@dataclass(frozen=True)
class PlannedFile:
    """A file of weights to write; bytes of tensors alone."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class PipelineChunk:
    """Layers of one chunk of one stage, 0-based."""

    stage: int
    virtual: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ConversionPlan:
    """What both directions share."""

    direction: Direction
    spec: ModelSpec
    source: Path
    output: Path
    dtype: str  # key of DTYPES
    tensors: tuple[TensorEntry, ...]  # Hugging Face's view of what is written, buffers left out
    source_bytes: int  # of all tensors of the source
    dropped: tuple[TensorEntry, ...]  # of the source, computed or tied, not written
    restored: tuple[TensorEntry, ...]  # written as the reference has them
    files: tuple[PlannedFile, ...]
    largest_piece_bytes: int
    tensors_checked: bool  # False: only config.json was there
    layout: tuple[PipelineChunk, ...] = ()
    tensor_parallel: int = 1
    padded_vocab_size: int = 0  # 0: not padded
    notes: tuple[str, ...] = ()
    source_item_bytes: int = 4  # of the widest element that is read; tells only with a cast

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors to write."""
        return sum(file.nbytes for file in self.files)

    @property
    def peak_memory_bytes(self) -> int:
        """Above what the interpreter and its libraries take; independent of the model's depth."""
        copies: float = _COPIES_IN_MEMORY
        if self.dtype != "keep":  # a piece as read is another copy beside the one that was cast
            copies += self.source_item_bytes / max(entry.dtype.itemsize for entry in self.tensors)
        return int(copies * self.largest_piece_bytes)

    @property
    def seconds(self) -> float:
        """At ASSUMED_BYTES_PER_SECOND."""
        return self.output_bytes / ASSUMED_BYTES_PER_SECOND


def describe(plan: ConversionPlan) -> str:
    """The plan for a person, as --dry-run prints it."""
    spec = plan.spec
    tying = "tied" if spec.tied_embeddings else "untied"
    formats = ["Hugging Face", "Megatron (torch_dist)"]
    if plan.direction == "megatron_to_hf":
        formats.reverse()
    lines = [
        f"{plan.source} ({formats[0]}) -> {plan.output} ({formats[1]})",
        f"architecture   {ARCHITECTURES[spec.architecture].model_type}, {spec.num_layers} layers, "
        f"hidden size {spec.hidden_size}, {spec.num_heads} heads, {spec.num_kv_heads} KV heads, "
        f"{tying} embeddings",
        f"parameters     {spec.num_parameters:,}",
        f"source         {plan.source_bytes:,} bytes of tensors",
        f"output         {plan.output_bytes:,} bytes of tensors ({_dtypes(plan)}) in "
        f"{len(plan.files)} {'file' if len(plan.files) == 1 else 'files'}",
        *(f"    {file.name}  {file.nbytes:,}" for file in plan.files),
    ]
    if plan.dropped:
        lines.append(f"not written    {_summary(plan.dropped)}")
    if plan.restored:
        lines.append(f"written back   {_summary(plan.restored)}")
    if plan.layout:
        lines.append(f"tensor parallel {plan.tensor_parallel}, pipeline:")
        lines += [f"    {_chunk_line(plan, chunk)}" for chunk in plan.layout]
        padded = f"{plan.padded_vocab_size:,}"
        lines.append(f"vocabulary     {spec.vocab_size:,} rows, padded to {padded}")
    lines += [
        f"peak memory    about {human_bytes(plan.peak_memory_bytes)} above the interpreter's own, "
        "while converting",
        f"time           about {_duration(plan.seconds)}, if the disk takes "
        f"{human_bytes(ASSUMED_BYTES_PER_SECOND)}/s",
    ]
    lines += [f"note: {note}" for note in plan.notes]
    if not plan.tensors_checked:
        lines.append("note: the source has only a config.json: its tensors were not checked")
    try:
        check_free(plan.output)
    except ValueError as error:
        lines.append(f"note: {error}")
    partial = partial_folder(plan.output.absolute())
    if partial.exists():
        lines.append(f"note: {partial} holds a conversion that stopped; --resume goes on with it")
    return "\n".join(lines)


def published_tensors(spec: ModelSpec) -> dict[str, TensorEntry]:
    """What a published checkpoint of this config should hold, computed buffers included."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    entries = {
        name: TensorEntry(name, dtype, shape) for name, shape in expected_tensors(spec).items()
    }
    architecture = ARCHITECTURES[spec.architecture]
    if architecture.stores_inverse_frequencies:
        for layer in range(spec.num_layers):
            prefix = architecture.names.layer_prefix.format(layer=layer)
            name = prefix + architecture.names.inverse_frequencies
            entries[name] = TensorEntry(name, torch.float32, (spec.head_dim // 2,))
    return entries


def check_folders(source: Path, output: Path, others: Iterable[Path] = ()) -> None:
    """Check that the output is neither a folder that is read, nor inside one, nor around one.

    Raises:
        ValueError: naming both.
    """
    target = Path(os.path.realpath(output))
    for folder in (source, *others):
        read = Path(os.path.realpath(folder))
        relation = ""
        if target == read:
            relation = "is"
        elif target.is_relative_to(read):
            relation = "lies inside"
        elif read.is_relative_to(target):
            relation = "contains"
        if relation:
            raise ValueError(
                f"output folder {output}: {relation} the folder {folder}, which is read; "
                "name one outside"
            )


def row_blocks(
    num_rows: int, row_bytes: int, block_bytes: int | None = None
) -> list[tuple[int, int]]:
    """Ranges of rows (start, stop) of at most `block_bytes`, or of one row that exceeds it.

    Args:
        num_rows: to cover.
        row_bytes: of a row.
        block_bytes: by default BLOCK_BYTES.
    """
    rows = max(1, (BLOCK_BYTES if block_bytes is None else block_bytes) // max(1, row_bytes))
    return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def fingerprint(paths: Iterable[Path], folder: Path) -> dict[str, Any]:
    """Size and time of change of each file: what resuming compares."""
    stats = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(paths)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def check_unchanged(job: Mapping[str, Any], partial: Path) -> None:
    """Check that the files of a job's fingerprints are still as they were when it began.

    Args:
        job: of a conversion.
        partial: folder that holds what was made of them.

    Raises:
        ValueError: naming a file that changed or went.
    """
    for folder_key, files_key in (("source", "files"), ("reference", "reference_files")):
        for name, before in job.get(files_key, {}).items():
            path = Path(job[folder_key]) / name
            if not path.exists() or fingerprint([path], path.parent)[path.name] != before:
                raise ValueError(
                    f"{path}: changed while it was being converted; delete {partial} and convert "
                    "once more when nothing writes to the source"
                )


def _dtypes(plan: ConversionPlan) -> str:
    names = sorted({dtype_name(entry.dtype) for entry in plan.tensors})
    kept = ", as in the source" if plan.dtype == "keep" else ""
    return " and ".join(names) + kept


def _summary(entries: Sequence[TensorEntry]) -> str:
    num_bytes = sum(entry.nbytes for entry in entries)
    names = abbreviated([entry.name for entry in entries])
    title = "tensor" if len(entries) == 1 else "tensors"
    return f"{len(entries)} {title}, {num_bytes:,} bytes, computed or tied: {names}"


def _chunk_line(plan: ConversionPlan, chunk: PipelineChunk) -> str:
    virtual = f", chunk {chunk.virtual}" if any(other.virtual for other in plan.layout) else ""
    layers = chunk.layers
    parts = [f"layers {layers[0]}-{layers[-1]} ({len(layers)})" if layers else "no layers"]
    if chunk == plan.layout[0]:
        parts.insert(0, "embedding")
    if chunk == plan.layout[-1]:
        parts.append("final norm" if plan.spec.tied_embeddings else "final norm, LM head")
    return f"stage {chunk.stage}{virtual}: {', '.join(parts)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min"
