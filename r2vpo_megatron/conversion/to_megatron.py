"""Hugging Face -> torch_dist: what Megatron-core would save at this layout, without Megatron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.companions import copy_companions, not_copied
from r2vpo_megatron.checkpoint.megatron_keys import COMPANIONS, stored_key
from r2vpo_megatron.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.checkpoint.tensor_check import (
    check_tensors,
    dtype_name,
    entries_of,
    expected_tensors,
    is_dropped,
)
from r2vpo_megatron.checkpoint.torch_dist import (
    StoredChunk,
    StoredTensor,
    encode_extra_state,
    tensor_buffers,
    write_metadata,
)
from r2vpo_megatron.conversion.carry_out import Advance, Conversion, counting
from r2vpo_megatron.conversion.journal import Buffer, JournaledFolder, Written
from r2vpo_megatron.conversion.megatron_pieces import (
    ParallelLayout,
    Piece,
    Unit,
    global_shape,
    load_unit,
    plan_units,
)
from r2vpo_megatron.conversion.plan import (
    BLOCK_BYTES,
    DTYPES,
    ConversionPlan,
    PlannedFile,
    check_folders,
    fingerprint,
    published_tensors,
    row_blocks,
)
from r2vpo_megatron.conversion.verify import Verification, verify_conversion
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import (
    ModelSpec,
    padded_vocab_size,
    read_model_spec,
    validate_layout,
)

_EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def plan_to_megatron(
    hf_folder: str | Path, output: str | Path, layout: ParallelLayout, dtype: str = "keep"
) -> ConversionPlan:
    """Plan the conversion; nothing is written, and of the weights the headers alone are read.

    Args:
        hf_folder: Hugging Face checkpoint; with config.json alone the plan is marked unchecked.
        output: torch_dist folder to make.
        layout: of the ranks whose files are to be written; every other layout can read them.
        dtype: "keep", "bfloat16" or "float32".

    Raises:
        ValueError: config, layout or folders do not fit; or listing every tensor without target
            and every target without tensor.
    """
    source, target = Path(hf_folder), Path(output)
    spec = read_model_spec(source)
    validate_layout(
        spec, layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.pipeline_layout
    )
    check_folders(source, target)
    has_weights = (source / INDEX_FILE).is_file() or (source / SINGLE_FILE).is_file()
    entries = published_tensors(spec)
    if has_weights:
        with CheckpointReader(source) as reader:
            entries = entries_of(reader)
    check_tensors(entries, spec, source, keep_dtypes=dtype == "keep")
    written = tuple(
        replace(entries[name], dtype=DTYPES[dtype] or entries[name].dtype)
        for name in expected_tensors(spec)
    )
    dtypes = {entry.name: entry.dtype for entry in written}
    units = plan_units(spec, layout, dtypes)
    sizes: dict[str, int] = {}
    for unit in units:
        item_bytes = _dtype_of(unit, dtypes).itemsize
        for piece in unit.pieces:
            sizes[piece.file] = sizes.get(piece.file, 0) + math.prod(piece.sizes) * item_bytes
    return ConversionPlan(
        direction="hf_to_megatron",
        spec=spec,
        source=source,
        output=target,
        dtype=dtype,
        tensors=written,
        source_bytes=sum(entry.nbytes for entry in entries.values()),
        dropped=tuple(entry for name, entry in entries.items() if is_dropped(name, spec)),
        restored=(),
        files=tuple(PlannedFile(name, nbytes) for name, nbytes in sizes.items()),
        largest_piece_bytes=max(_unit_bytes(unit, dtypes) for unit in units),
        tensors_checked=has_weights,
        layout=layout.chunks(spec.num_layers),
        tensor_parallel=layout.tensor,
        padded_vocab_size=padded_vocab_size(spec.vocab_size, layout.tensor),
        notes=_notes(source),
        source_item_bytes=max(entries[entry.name].dtype.itemsize for entry in written),
    )


def conversion_to_megatron(
    plan: ConversionPlan, layout: ParallelLayout, *, verify: bool, logits: bool | None = None
) -> Conversion:
    """Make a plan ready to be carried out.

    Args:
        plan: from plan_to_megatron, with the same layout.
        layout: see there.
        verify: compare every tensor of the two folders before the output appears.
        logits: compare logits, too; None where the model is small.

    Raises:
        ValueError: the source has no weights, or broken ones.
    """
    with CheckpointReader(plan.source) as reader:
        sources = [plan.source / name for name in reader.files()]
        sources += [path for path in [plan.source / INDEX_FILE] if path.is_file()]
        _check_tied_head(reader, plan.spec)
    job = {
        "direction": plan.direction,
        "source": str(plan.source.resolve()),
        "files": fingerprint([*sources, plan.source / "config.json"], plan.source),
        "dtype": plan.dtype,
        "tensor_parallel": layout.tensor,
        "pipeline": [[chunk.stage, chunk.virtual, len(chunk.layers)] for chunk in plan.layout],
        "block_bytes": BLOCK_BYTES,
    }
    check: Callable[[Path, Advance], Verification] | None = None
    if verify:

        def check(folder: Path, advance: Advance) -> Verification:
            return verify_conversion(
                plan.source, folder, dtype=DTYPES[plan.dtype], logits=logits, progress=advance
            )

    return Conversion(plan, job, partial(_fill, plan, layout), check)


def _notes(source: Path) -> tuple[str, ...]:
    left_out = not_copied(source)
    return (f"not copied: {', '.join(left_out)}",) if left_out else ()


def _check_tied_head(reader: CheckpointReader, spec: ModelSpec) -> None:
    """A tied LM head that is stored none the less must be the embedding: it will be dropped."""
    names = ARCHITECTURES[spec.architecture].names
    if not spec.tied_embeddings or names.lm_head not in reader.names():
        return
    dtypes = [reader.dtype(name) for name in (names.lm_head, names.embedding)]
    different = dtypes[0] != dtypes[1]
    row_bytes = reader.nbytes(names.lm_head) // spec.vocab_size
    for start, stop in row_blocks(spec.vocab_size, row_bytes):
        if not different:
            head, embedding = (
                reader.read_slice(name, 0, start, stop).contiguous().view(torch.uint8)
                for name in (names.lm_head, names.embedding)
            )
            different = not torch.equal(head, embedding)  # bits, not values: of NaN, too
        if different:
            raise ValueError(
                f"checkpoint {reader.folder}: config.json ties the embeddings, but "
                f"{names.lm_head} ({dtype_name(dtypes[0])}) differs from {names.embedding} "
                f"({dtype_name(dtypes[1])}); correct tie_word_embeddings"
            )


def _fill(
    plan: ConversionPlan, layout: ParallelLayout, folder: JournaledFolder, advance: Advance
) -> None:
    dtypes = {entry.name: entry.dtype for entry in plan.tensors}
    shapes: dict[str, tuple[int, ...]] = {}
    stored_dtypes: dict[str, torch.dtype] = {}
    chunks: dict[str, list[tuple[Piece, tuple[int, ...], tuple[int, ...], Future[Written]]]] = {}
    with CheckpointReader(plan.source) as reader:
        for unit in plan_units(plan.spec, layout, dtypes):
            placement, dtype = unit.placement, _dtype_of(unit, dtypes)
            key, leading = stored_key(placement), placement.layer is not None
            shape = global_shape(placement, plan.spec, layout.tensor)
            shapes[key] = (plan.spec.num_layers, *shape) if leading else shape
            stored_dtypes[key] = dtype
            load = cache(partial(load_unit, unit, plan.spec, reader, dtype))
            for piece in unit.pieces:
                offsets, sizes = piece.starts, piece.sizes
                if placement.layer is not None:
                    offsets, sizes = (placement.layer, *offsets), (1, *sizes)
                written = folder.submit(
                    f"{key}{list(offsets)}", piece.file, partial(_encode, load, unit, piece, sizes)
                )
                nbytes = math.prod(sizes) * dtype.itemsize
                written.add_done_callback(counting(advance, nbytes))
                chunks.setdefault(key, []).append((piece, offsets, sizes, written))
    objects = _write_extra_states(plan, layout, folder)
    tensors = [
        StoredTensor(
            key,
            shapes[key],
            stored_dtypes[key],
            tuple(
                StoredChunk(
                    offsets, sizes, piece.file, written.result().position, written.result().length
                )
                for piece, offsets, sizes, written in chunks[key]
            ),
        )
        for key in shapes
    ]
    write_metadata(folder.folder, tensors, objects)
    copy_companions(plan.source, folder.folder / COMPANIONS)


def _encode(
    load: Callable[[], Tensor], unit: Unit, piece: Piece, sizes: tuple[int, ...]
) -> Sequence[Buffer]:
    part = load()
    for dimension, (start, size) in enumerate(zip(piece.starts, piece.sizes, strict=True)):
        part = part.narrow(dimension, start - (unit.start if dimension == 0 else 0), size)
    return tensor_buffers(part.contiguous().reshape(sizes))


def _write_extra_states(
    plan: ConversionPlan, layout: ParallelLayout, folder: JournaledFolder
) -> list[tuple[str, str, int, int]]:
    """One empty object a linear module, as Megatron's layers save for Transformer Engine."""
    num_layers = plan.spec.num_layers
    objects = []
    for chunk in plan.layout:
        file = f"__{chunk.stage * layout.tensor}_{chunk.virtual}.distcp"
        for layer in chunk.layers:
            for module in _EXTRA_STATE_MODULES:
                key = f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
                written = folder.write(key, file, lambda: [encode_extra_state()])
                objects.append((key, file, written.position, written.length))
    return objects


def _dtype_of(unit: Unit, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    return dtypes[next(iter(unit.placement.hf_shapes))]


def _unit_bytes(unit: Unit, dtypes: dict[str, torch.dtype]) -> int:
    return sum(math.prod(piece.sizes) for piece in unit.pieces) * _dtype_of(unit, dtypes).itemsize
