"""A torch_dist folder to be exported: where it lies, what it holds, how it becomes files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from r2vpo_megatron.checkpoint.megatron_keys import MegatronCheckpoint
from r2vpo_megatron.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE, TensorEntry
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.checkpoint.safetensors_stream import (
    SafetensorsFile,
    plan_files,
    plan_like,
)
from r2vpo_megatron.checkpoint.tensor_check import abbreviated, is_dropped
from r2vpo_megatron.conversion.plan import DTYPES
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec

_LATEST = "latest_checkpointed_iteration.txt"
_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class HfExport:
    """How a torch_dist folder becomes a Hugging Face one.

    Attributes:
        megatron_folder: as given; the checkpoint may lie in a subfolder that Megatron-LM names in
            latest_checkpointed_iteration.txt, which is read once: a run may go on and save while
            an earlier iteration is exported.
        output: folder to make.
        hf_reference: checkpoint (or its config alone) whose config, companions, sharding and
            computed buffers are taken; None for the companions in the Megatron folder.
        as_llama: write a config that serves the same weights as LlamaForCausalLM.
        max_shard_bytes: of tensors in a file, where no reference says otherwise.
        dtype: "keep", "bfloat16" or "float32".
    """

    megatron_folder: Path
    output: Path
    hf_reference: Path | None = None
    as_llama: bool = False
    max_shard_bytes: int = _MAX_SHARD_BYTES
    dtype: str = "keep"

    @cached_property
    def checkpoint(self) -> Path:
        """The folder that holds .metadata, as it was found at first.

        Raises:
            ValueError: there is none.
        """
        return checkpoint_folder(self.megatron_folder)

    @cached_property
    def companions(self) -> Path:
        """The folder that holds config.json and tokenizer.

        Raises:
            ValueError: there is none.
        """
        if self.hf_reference is not None:
            return self.hf_reference
        for folder in (self.checkpoint, self.megatron_folder):
            if (folder / "hf" / "config.json").is_file():
                return folder / "hf"
        raise ValueError(
            f"{self.checkpoint}: has no hf/config.json, as a training checkpoint; "
            "name the model it began from with --hf-reference"
        )


def checkpoint_folder(folder: Path) -> Path:
    """The torch_dist folder itself, or the one that Megatron-LM's text file in it names.

    Raises:
        ValueError: neither is there.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: does not exist or is not a folder")
    latest = folder / _LATEST
    if (folder / ".metadata").is_file() or not latest.is_file():
        return folder
    text = latest.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{latest}: says {text[:40]!r}; it must hold a number or 'release'")
    named = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not named.is_dir():
        raise ValueError(f"{latest}: names {named.name}, which {folder} does not have")
    return named


@dataclass(frozen=True)
class OpenedExport:
    """The readers of an export, and what it writes."""

    spec: ModelSpec
    view: MegatronCheckpoint
    reference: CheckpointReader | None  # None: no reference, or one without weights
    learned: tuple[TensorEntry, ...]
    restored: tuple[TensorEntry, ...]
    files: tuple[SafetensorsFile, ...]

    def rows(self, entry: TensorEntry, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor to write (a scalar whole), in its dtype."""
        name = entry.name
        names = ARCHITECTURES[self.spec.architecture].names
        reader: MegatronCheckpoint | CheckpointReader = self.view
        if entry in self.restored and name != names.lm_head:
            assert self.reference is not None
            reader = self.reference
        elif entry in self.restored:
            name = names.embedding  # tied
        if not entry.shape:
            return reader.tensor(name).to(entry.dtype)
        return reader.read_slice(name, 0, start, stop).to(entry.dtype)


@contextmanager
def opened_export(export: HfExport) -> Iterator[OpenedExport]:
    """Open both folders and lay the output out; a context manager.

    Raises:
        ValueError: a folder is broken, or they do not fit each other.
    """
    companions = export.companions
    spec = read_model_spec(companions)
    _check_same_model(export, spec)
    with ExitStack() as stack:
        view = stack.enter_context(MegatronCheckpoint(export.checkpoint, spec=spec))
        if view.unmapped:
            raise ValueError(
                f"checkpoint {export.checkpoint} does not fit {companions / 'config.json'}: "
                f"unmapped (no place in the model): {abbreviated(view.unmapped)}"
            )
        reference = None
        if export.hf_reference is not None and _has_weights(export.hf_reference):
            reference = stack.enter_context(CheckpointReader(export.hf_reference))
        dtype = DTYPES[export.dtype]
        learned = tuple(
            TensorEntry(name, dtype or view.dtype(name), view.shape(name)) for name in view.names()
        )
        restored = _restored(reference, spec, learned)
        entries = [*learned, *restored]
        if reference is not None:
            files = plan_like(reference, entries)
        else:
            files = plan_files(entries, export.max_shard_bytes)
        yield OpenedExport(spec, view, reference, learned, restored, tuple(files))


def _restored(
    reference: CheckpointReader | None, spec: ModelSpec, learned: tuple[TensorEntry, ...]
) -> tuple[TensorEntry, ...]:
    """Tensors of the reference that are computed or tied: Megatron does not hold them."""
    if reference is None:
        return ()
    names = ARCHITECTURES[spec.architecture].names
    dtypes = {entry.name: entry.dtype for entry in learned}
    restored = []
    for name in reference.names():
        if is_dropped(name, spec) and name not in dtypes:
            dtype = dtypes[names.embedding] if name == names.lm_head else reference.dtype(name)
            restored.append(TensorEntry(name, dtype, reference.shape(name)))
    return tuple(restored)


def _check_same_model(export: HfExport, spec: ModelSpec) -> None:
    """Where the Megatron folder has a config of its own, the reference must agree with it."""
    for folder in (export.checkpoint / "hf", export.megatron_folder / "hf"):
        if not (folder / "config.json").is_file() or folder == export.companions:
            continue
        own = replace(read_model_spec(folder), dtype=spec.dtype)
        different = [
            f"{field.name} is {getattr(own, field.name)!r} in {folder} and "
            f"{getattr(spec, field.name)!r} in {export.companions}"
            for field in fields(spec)
            if getattr(own, field.name) != getattr(spec, field.name)
        ]
        if different:
            raise ValueError(
                f"--hf-reference {export.companions} is another model: {abbreviated(different)}"
            )


def _has_weights(folder: Path) -> bool:
    """Whether there is a file of weights; an index alone, beside a config, is none."""
    if (folder / SINGLE_FILE).is_file():
        return True
    index = folder / INDEX_FILE
    if not index.is_file():
        return False
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return any((folder / name).is_file() for name in set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True  # a broken index: its reader says how
