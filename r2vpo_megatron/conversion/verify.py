"""Prove that a conversion changed nothing: every tensor bit for bit, then the logits.

Both folders are read as Hugging Face tensors, the torch_dist one through the view that also
converts it. Bits that agree prove that nothing was lost or exchanged between the two views; the
logits, of two programs that share no code, prove that the view itself has the right layout.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.megatron_keys import MegatronCheckpoint, open_checkpoint
from r2vpo_megatron.checkpoint.safetensors_stream import tensor_bytes
from r2vpo_megatron.checkpoint.tensor_check import TensorReader, dtype_name
from r2vpo_megatron.conversion.plan import row_blocks
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec

BLOCK_BYTES = 128 * 2**20  # of one side, in memory at a time
LOGITS_TOLERANCE = 1e-4  # largest difference allowed, relative to the largest logit
LOGITS_LIMIT_BYTES = 2 * 2**30  # fp32 parameters up to which logits are compared unasked

_MAX_LISTED = 8
_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class VerifiedTensor:
    """A tensor that is the same on both sides, up to the cast that was asked for."""

    name: str
    shape: tuple[int, ...]
    source_dtype: torch.dtype
    dtype: torch.dtype  # of the target
    source_sha256: str  # of the bytes, little-endian, in row-major order
    sha256: str  # of the target's bytes

    def manifest(self) -> dict[str, Any]:
        """The entry of this tensor in conversion.json."""
        entry = {
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "sha256": self.sha256,
        }
        if self.dtype != self.source_dtype:
            entry["source_dtype"] = dtype_name(self.source_dtype)
            entry["source_sha256"] = self.source_sha256
        return entry


@dataclass(frozen=True)
class LogitsCheck:
    """Logits of transformers and of a live Megatron model, both in fp32."""

    num_tokens: int
    largest_logit: float
    largest_difference: float

    @property
    def relative_difference(self) -> float:
        """Largest difference over largest logit, both in absolute value."""
        return self.largest_difference / max(self.largest_logit, 1e-30)


@dataclass(frozen=True)
class Verification:
    """What verify_conversion found; it raises where the sides differ."""

    tensors: tuple[VerifiedTensor, ...]
    logits: LogitsCheck | None  # None: not compared

    def describe(self) -> str:
        """One line for a person."""
        num_bytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in self.tensors)
        text = f"verified: {len(self.tensors)} tensors, {num_bytes:,} bytes, equal to the bit"
        casts = sum(tensor.dtype != tensor.source_dtype for tensor in self.tensors)
        if casts:
            text += f" ({casts} after the cast)"
        if self.logits is None:
            return text + "; logits not compared"
        return text + (
            f"; logits of {self.logits.num_tokens} tokens within "
            f"{self.logits.relative_difference:.1e} of transformers' "
            f"({LOGITS_TOLERANCE:.0e} allowed)"
        )


def verify_conversion(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    logits: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Compare the two folders of a conversion, in either direction.

    Memory: two blocks of at most 128 MiB. Logits are made in a child process, which holds one
    fp32 model at a time; this process joins no process group.

    Args:
        source: the folder that was converted.
        target: the folder that was written.
        dtype: what floating-point tensors were cast to; None if they were kept.
        logits: compare logits with transformers; None where the fp32 parameters need less than
            2 GiB.
        progress: called with the target's bytes that were just compared.

    Returns:
        Digests of every tensor of both sides, and what the logits gave.

    Raises:
        ValueError: the sides differ (names the tensor, the first index and both values), a
            tensor is missing on one side, or logits are too far apart.
        ChildProcessError: logits could not be made.
    """
    with open_checkpoint(source) as first, open_checkpoint(target) as second:
        spec = _spec(first)
        verified = tuple(compare_tensors(first, second, spec, dtype=dtype, progress=progress))
        source_is_megatron = isinstance(first, MegatronCheckpoint)
        sides_alike = source_is_megatron == isinstance(second, MegatronCheckpoint)
    if logits is None:
        logits = not sides_alike and 4 * spec.num_parameters < LOGITS_LIMIT_BYTES
    if not logits:
        return Verification(verified, None)
    if sides_alike:
        raise ValueError(f"{source} and {target} have the same format: no logits to compare")
    folders = (target, source) if source_is_megatron else (source, target)
    return Verification(verified, verify_logits(*folders))


def compare_tensors(
    source: TensorReader,
    target: TensorReader,
    spec: ModelSpec,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[VerifiedTensor]:
    """Compare two readers tensor by tensor, in the target's order; see verify_conversion.

    Buffers that are computed, and a tied LM head, may be on one side alone.
    """
    _check_names(source, target, spec)
    in_source = set(source.names())
    for name in target.names():
        if name in in_source:
            yield compare_tensor(name, source, target, dtype=dtype, progress=progress)


def tensor_blocks(
    shape: tuple[int, ...], item_bytes: int, block_bytes: int = BLOCK_BYTES
) -> list[tuple[int, int]]:
    """Ranges of rows (start, stop) that cover a tensor in blocks of at most `block_bytes`.

    Args:
        shape: of the tensor; a scalar is one block.
        item_bytes: of one element.
        block_bytes: one row may exceed it.
    """
    num_rows = shape[0] if shape else 1
    return row_blocks(num_rows, math.prod(shape[1:]) * item_bytes, block_bytes)


def tensor_sha256(reader: TensorReader, name: str) -> str:
    """Digest of a tensor's bytes in row-major order, read block by block."""
    digest = hashlib.sha256()
    for start, stop in tensor_blocks(reader.shape(name), reader.dtype(name).itemsize):
        digest.update(tensor_bytes(_read_rows(reader, name, start, stop)))
    return digest.hexdigest()


def verify_logits(
    hf_folder: str | Path, megatron_folder: str | Path, *, config_folder: str | Path | None = None
) -> LogitsCheck:
    """Compare logits of a few tokens: transformers' and a live Megatron model's, on the CPU.

    A child process loads one model after the other in fp32, so that the caller stays without
    process group and without Megatron. Where the conversion cast, transformers' weights are
    rounded as the Megatron folder's are.

    Args:
        hf_folder: Hugging Face checkpoint; its remote code is not run.
        megatron_folder: torch_dist checkpoint of the same model.
        config_folder: holds the model's config.json, for a torch_dist checkpoint without hf/.

    Raises:
        ValueError: the difference exceeds 1e-4 of the largest logit, or is not a number.
        ChildProcessError: the child failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="logits-") as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "r2vpo_megatron.conversion.logits_check"]
        command += [str(Path(hf_folder).resolve()), str(Path(megatron_folder).resolve())]
        command.append(str(result))
        if config_folder is not None:
            command += ["--config", str(Path(config_folder).resolve())]
        child = subprocess.run(
            command,
            env=_child_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if child.returncode != 0:
            last_lines = "\n".join(child.stderr.strip().splitlines()[-15:])
            raise ChildProcessError(
                f"logits could not be compared: the process ended with {child.returncode}\n"
                f"{last_lines}"
            )
        check = LogitsCheck(**json.loads(result.read_text(encoding="utf-8")))
    if not check.relative_difference <= LOGITS_TOLERANCE:
        raise ValueError(
            f"logits of {megatron_folder} differ from those of {hf_folder} by "
            f"{check.relative_difference:.1e} of the largest; {LOGITS_TOLERANCE:.0e} is allowed"
        )
    return check


def _child_environment() -> dict[str, str]:
    """This process's, with the package importable, no accelerator and no network."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # The CPU platform refuses to run beside a GPU that Megatron would take.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }


def _spec(reader: Any) -> ModelSpec:
    return reader.spec if isinstance(reader, MegatronCheckpoint) else read_model_spec(reader.folder)


def _check_names(source: TensorReader, target: TensorReader, spec: ModelSpec) -> None:
    names = ARCHITECTURES[spec.architecture].names
    in_source, in_target = set(source.names()), set(target.names())

    def learned(found: set[str]) -> list[str]:
        if spec.tied_embeddings:
            found = found - {names.lm_head}
        return sorted(name for name in found if not name.endswith(names.ignored_suffixes))

    problems = [
        f"{len(found)} not in {side.folder}: {', '.join(found[:_MAX_LISTED])}"
        + (", ..." if len(found) > _MAX_LISTED else "")
        for side, found in (
            (target, learned(in_source - in_target)),
            (source, learned(in_target - in_source)),
        )
        if found
    ]
    if problems:
        raise ValueError("the two checkpoints have different tensors: " + "; ".join(problems))


def compare_tensor(
    name: str,
    source: TensorReader,
    target: TensorReader,
    *,
    source_name: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifiedTensor:
    """Compare one tensor of two readers, bit for bit.

    Args:
        name: in the target.
        source: what was converted.
        target: what was written.
        source_name: in the source; None if it is the same.
        dtype: what floating-point tensors were cast to; None if they were kept.
        progress: called with the target's bytes that were just compared.

    Raises:
        ValueError: they differ.
    """
    source_name = name if source_name is None else source_name
    shape, source_dtype = source.shape(source_name), source.dtype(source_name)
    target_dtype = target.dtype(name)
    expected = dtype if dtype is not None and source_dtype.is_floating_point else source_dtype
    if target.shape(name) != shape:
        raise ValueError(
            f"{name} has shape {list(target.shape(name))} in {target.folder}, "
            f"{list(shape)} in {source.folder}"
        )
    if target_dtype != expected:
        raise ValueError(
            f"{name} has dtype {dtype_name(target_dtype)} in {target.folder}; "
            f"{dtype_name(expected)} was to be written"
        )
    of_source, of_target = hashlib.sha256(), hashlib.sha256()
    wider = max(source_dtype.itemsize, target_dtype.itemsize)
    for start, stop in tensor_blocks(shape, wider):
        first = _read_rows(source, source_name, start, stop)
        second = _read_rows(target, name, start, stop)
        cast = first.to(target_dtype)
        _check_equal(name, cast, second, start, source, target)
        of_target.update(tensor_bytes(second))
        if source_dtype != target_dtype:  # equal bytes have equal digests
            of_source.update(tensor_bytes(first))
        if progress is not None:
            progress(second.nbytes)
    digest = of_target.hexdigest()
    source_digest = digest if source_dtype == target_dtype else of_source.hexdigest()
    return VerifiedTensor(name, shape, source_dtype, target_dtype, source_digest, digest)


def _read_rows(reader: TensorReader, name: str, start: int, stop: int) -> Tensor:
    if not reader.shape(name):
        return reader.tensor(name)
    return reader.read_slice(name, 0, start, stop).contiguous()


def _check_equal(
    name: str, first: Tensor, second: Tensor, row: int, source: TensorReader, target: TensorReader
) -> None:
    """Bits, not values: NaN equals itself here, and -0 is not 0."""
    integer = _SAME_SIZE_INTEGER[first.dtype.itemsize]
    bits = [tensor.reshape(-1).view(integer) for tensor in (first, second)]
    if torch.equal(*bits):
        return
    position = int(torch.nonzero(bits[0] != bits[1])[0])
    index = [int(number) for number in torch.unravel_index(torch.tensor(position), first.shape)]
    if index:
        index[0] += row
    values = [
        f"{tensor.flatten()[position].item()!r} in {side.folder}"
        for tensor, side in ((first, source), (second, target))
    ]
    raise ValueError(f"{name} differs first at {index}: {values[0]}, {values[1]}")
