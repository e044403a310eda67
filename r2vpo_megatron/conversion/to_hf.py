"""torch_dist -> Hugging Face: one piece of a tensor at a time, in the order of the files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from r2vpo_megatron.checkpoint.companions import (
    copy_companions,
    llama_config,
    not_copied,
    state_dtype,
)
from r2vpo_megatron.checkpoint.safetensors_header import INDEX_FILE, TensorEntry
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.checkpoint.safetensors_stream import (
    SafetensorsFile,
    index_json,
    tensor_bytes,
)
from r2vpo_megatron.checkpoint.tensor_check import dtype_name
from r2vpo_megatron.conversion.carry_out import Advance, Conversion, counting
from r2vpo_megatron.conversion.hf_export import HfExport, OpenedExport, opened_export
from r2vpo_megatron.conversion.journal import Buffer, JournaledFolder
from r2vpo_megatron.conversion.plan import (
    BLOCK_BYTES,
    DTYPES,
    ConversionPlan,
    PlannedFile,
    check_folders,
    fingerprint,
    row_blocks,
)
from r2vpo_megatron.conversion.verify import (
    LOGITS_LIMIT_BYTES,
    Verification,
    VerifiedTensor,
    compare_tensor,
    compare_tensors,
    verify_logits,
)
from r2vpo_megatron.models import ARCHITECTURES


def plan_to_hf(export: HfExport) -> ConversionPlan:
    """Plan an export; nothing is written, and of the weights the headers alone are read.

    Raises:
        ValueError: folders do not fit, there is no config, or listing what does not map.
    """
    folders = [export.megatron_folder, export.companions]
    check_folders(export.checkpoint, export.output, folders)
    with opened_export(export) as opened:
        pieces = [piece for file in opened.files for piece in _pieces(file)]
        return ConversionPlan(
            direction="megatron_to_hf",
            spec=opened.spec,
            source=export.checkpoint,
            output=export.output,
            dtype=export.dtype,
            tensors=opened.learned,
            source_bytes=sum(
                math.prod(opened.view.shape(name)) * opened.view.dtype(name).itemsize
                for name in opened.view.names()
            ),
            dropped=(),
            restored=opened.restored,
            files=tuple(PlannedFile(file.name, file.nbytes) for file in opened.files),
            largest_piece_bytes=max(piece.nbytes for piece in pieces),
            tensors_checked=True,
            notes=_notes(export, opened),
            source_item_bytes=max(opened.view.dtype(name).itemsize for name in opened.view.names()),
        )


def conversion_to_hf(
    export: HfExport, plan: ConversionPlan, *, verify: bool, logits: bool | None = None
) -> Conversion:
    """Make a plan ready to be carried out.

    Args:
        export: what plan_to_hf was given.
        plan: from it.
        verify: compare every tensor of the two folders before the output appears.
        logits: compare logits, too; None where the model is small and was not cast.
    """
    checkpoint, companions = export.checkpoint, export.companions
    weights = [*checkpoint.glob("*.distcp"), checkpoint / ".metadata"]
    reference = [
        path for path in companions.iterdir() if path.is_file() and not path.name.startswith(".")
    ]
    job = {
        "direction": plan.direction,
        "source": str(checkpoint.resolve()),
        "files": fingerprint(weights, checkpoint),
        "reference": str(companions.resolve()),
        "reference_files": fingerprint(reference, companions),
        "dtype": export.dtype,
        "as_llama": export.as_llama,
        "output_files": {file.name: file.nbytes for file in plan.files},
        "block_bytes": BLOCK_BYTES,
    }
    check = partial(_verify, export, plan, logits) if verify else None
    return Conversion(plan, job, partial(_fill, export), check)


def _fill(export: HfExport, folder: JournaledFolder, advance: Advance) -> None:
    with opened_export(export) as opened:
        for file in opened.files:
            for piece in _pieces(file):
                written = folder.submit(piece.name, file.name, partial(piece.produce, opened))
                written.add_done_callback(counting(advance, piece.nbytes))
        _write_companions(export, opened, folder.folder)


def _pieces(file: SafetensorsFile) -> list[_Piece]:
    """The bytes of a file, from its first to its last."""
    pieces = [_Piece(f"{file.name}:header", len(file.header), None, 0, 0, file.header)]
    for entry in file.entries:
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        for start, stop in row_blocks(entry.shape[0], row_bytes) if entry.shape else [(0, 1)]:
            name = f"{file.name}:{entry.name}:{start}"
            pieces.append(_Piece(name, (stop - start) * row_bytes, entry, start, stop))
    return pieces


def _write_companions(export: HfExport, opened: OpenedExport, folder: Path) -> None:
    """Config, tokenizer and the rest, and an index; config.json states the dtype of the weights."""
    copy_companions(export.companions, folder)
    config = folder / "config.json"
    if export.as_llama:
        values = json.loads(config.read_text(encoding="utf-8"))
        text = json.dumps(llama_config(values, opened.spec), indent=2, ensure_ascii=False) + "\n"
        config.write_text(text, encoding="utf-8")
    dtypes = {entry.dtype for entry in opened.learned}
    if len(dtypes) == 1:
        state_dtype(config, dtype_name(dtypes.pop()))
    index = index_json(opened.files, opened.reference)
    if index is not None:
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")


def _verify(
    export: HfExport, plan: ConversionPlan, logits: bool | None, folder: Path, advance: Advance
) -> Verification:
    dtype = DTYPES[export.dtype]
    with opened_export(export) as opened, CheckpointReader(folder) as written:
        tensors = tuple(
            compare_tensors(opened.view, written, opened.spec, dtype=dtype, progress=advance)
        ) + tuple(_compare_restored(opened, written, dtype))
    if logits is None:
        logits = 4 * plan.spec.num_parameters < LOGITS_LIMIT_BYTES and dtype is None
    if not logits:
        return Verification(tensors, None)
    check = verify_logits(folder, export.checkpoint, config_folder=export.companions)
    return Verification(tensors, check)


def _compare_restored(
    opened: OpenedExport, written: CheckpointReader, dtype: torch.dtype | None
) -> Iterator[VerifiedTensor]:
    """What Megatron does not hold: a tied head with the embedding, the rest with the reference."""
    names = ARCHITECTURES[opened.spec.architecture].names
    for entry in opened.restored:
        if entry.name == names.lm_head:
            yield compare_tensor(
                entry.name, opened.view, written, source_name=names.embedding, dtype=dtype
            )
        else:
            assert opened.reference is not None
            yield compare_tensor(entry.name, opened.reference, written)


def _notes(export: HfExport, opened: OpenedExport) -> tuple[str, ...]:
    """What a user may not expect."""
    notes = []
    if export.as_llama:
        notes.append("config.json will be a Llama's; the weights are the same")
        config = (export.companions / "config.json").read_text(encoding="utf-8")
        llama_config(json.loads(config), opened.spec)
    if ARCHITECTURES[opened.spec.architecture].stores_inverse_frequencies and not opened.restored:
        notes.append(
            "published checkpoints of this architecture also hold RoPE's inverse frequencies; they "
            "are computed on loading, and written back only with --hf-reference"
        )
    if left_out := not_copied(export.companions):
        notes.append(f"not copied: {', '.join(left_out)}")
    return tuple(notes)


@dataclass(frozen=True)
class _Piece:
    """A header, or rows of a tensor."""

    name: str
    nbytes: int
    entry: TensorEntry | None  # None: the header
    start: int
    stop: int
    header: bytes = b""

    def produce(self, opened: OpenedExport) -> list[Buffer]:
        if self.entry is None:
            return [self.header]
        return [tensor_bytes(opened.rows(self.entry, self.start, self.stop))]
