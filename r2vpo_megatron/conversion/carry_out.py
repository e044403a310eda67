"""Carry a conversion plan out: both directions, one piece of a tensor in memory at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.companions import list_companions
from r2vpo_megatron.checkpoint.tensor_check import dtype_name
from r2vpo_megatron.conversion.folder_lock import check_free, journal_aside
from r2vpo_megatron.conversion.journal import Advance, JournaledFolder, Written
from r2vpo_megatron.conversion.plan import ConversionPlan, check_unchanged
from r2vpo_megatron.conversion.progress import ConversionProgress
from r2vpo_megatron.conversion.verify import Verification

MANIFEST = "conversion.json"


@dataclass(frozen=True)
class Conversion:
    """What carrying a plan out takes besides the plan."""

    plan: ConversionPlan
    # All that determines the bytes, in JSON's types. Fingerprints: "files" of the folder "source"
    # and, where there is a second folder, "reference_files" of "reference".
    job: Mapping[str, Any]
    # Writes all pieces and companions, telling of the bytes that are done.
    fill: Callable[[JournaledFolder, Advance], None]
    # Compares the finished folder with the source.
    verify: Callable[[Path, Advance], Verification] | None


def carry_out(conversion: Conversion, *, resume: bool, progress: ConversionProgress) -> str:
    """Write the output folder; it appears when all is written, and verified if that is asked for.

    Args:
        conversion: what to do.
        resume: go on with what a killed conversion left.
        progress: told of every piece.

    Returns:
        What the verification found, empty without one; or that the output is complete already.

    Raises:
        ValueError: the output is in use, the sides differ, or a file that was read has changed
            meanwhile; nothing that was there is touched.
        OSError: the disk is full or failed; says how to go on.
    """
    plan = conversion.plan
    if resume and _is_complete(conversion):
        return _of_complete(conversion, progress)
    journal = JournaledFolder(plan.output, conversion.job, resume=resume, stage=progress.stage)
    check_free(journal.output)
    check_space(journal.folder, plan.output_bytes + _companion_bytes(conversion.job))
    started = progress.now()
    found = ""
    with progress, journal as folder:
        for note in folder.notes:
            progress.message(note)
        advance = progress.stage("converting", plan.output_bytes)
        entries = {
            entry.name: {"shape": list(entry.shape), "dtype": dtype_name(entry.dtype)}
            for entry in plan.tensors
        }
        with folder.explaining():
            conversion.fill(folder, advance)
            _write_manifest(folder.folder, conversion, entries)
        folder.wait()
        seconds = progress.now() - started
        if conversion.verify is not None:
            compared = sum(entry.nbytes for entry in plan.tensors)
            verification = conversion.verify(folder.folder, progress.stage("verifying", compared))
            entries |= {tensor.name: tensor.manifest() for tensor in verification.tensors}
            with folder.explaining():
                _write_manifest(folder.folder, conversion, entries)
            found = verification.describe()
        check_unchanged(conversion.job, folder.folder)
        folder.finish()
    known = folder.num_known_bytes
    resumed = f" ({known:,} bytes were there)" if known else ""
    files = f"{len(plan.files)} {'file' if len(plan.files) == 1 else 'files'} of weights"
    progress.done(
        f"wrote {plan.output}: {files}{resumed}", max(0, plan.output_bytes - known), seconds
    )
    return found


def counting(advance: Advance, num_bytes: int) -> Callable[[Future[Written]], None]:
    """A callback of a submitted piece, which tells of its bytes once they are written."""

    def count(future: Future[Written]) -> None:
        if not future.cancelled() and future.exception() is None:
            advance(num_bytes)

    return count


def check_space(partial: Path, needed_bytes: int) -> None:
    """Check the free space of the disk where a folder is to be filled.

    Args:
        partial: where the files will be; what is there already counts.
        needed_bytes: of the files.

    Raises:
        OSError: too little is free.
    """
    if partial.is_dir():
        needed_bytes -= sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    place = next(folder for folder in partial.parents if folder.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if needed_bytes > free_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{place}: {free_bytes:,} bytes are free, {needed_bytes:,} are needed; "
            "free some or name another output folder",
        )


def _is_complete(conversion: Conversion) -> bool:
    """Whether the output is there, and by its manifest of this very job."""
    try:
        manifest = json.loads((conversion.plan.output / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("job_sha256") == _digest(conversion.job)


def _of_complete(conversion: Conversion, progress: ConversionProgress) -> str:
    """What there is to say of an output that is complete; it is verified if that is asked for."""
    plan = conversion.plan
    journal_aside(plan.output.absolute()).unlink(missing_ok=True)
    text = f"{plan.output}: already complete"
    if conversion.verify is None:
        return text
    with progress:
        compared = sum(entry.nbytes for entry in plan.tensors)
        verification = conversion.verify(plan.output, progress.stage("verifying", compared))
    return f"{text}; {verification.describe()}"


def _companion_bytes(job: Mapping[str, Any]) -> int:
    """Of the files that are copied beside the weights."""
    folder = Path(job.get("reference", job["source"]))
    return sum((folder / name).stat().st_size for name in list_companions(folder).copied)


def _digest(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _write_manifest(
    folder: Path, conversion: Conversion, tensors: Mapping[str, Mapping[str, Any]]
) -> None:
    """Record what was converted, and each tensor as Hugging Face names it."""
    plan = conversion.plan
    manifest: dict[str, Any] = {
        "source": str(plan.source.resolve()),
        "direction": plan.direction,
        "architecture": plan.spec.architecture,
        "parameters": plan.spec.num_parameters,
        "dtype": plan.dtype,
        "job_sha256": _digest(conversion.job),
    }
    if plan.layout:
        manifest |= {
            "tensor_parallel": plan.tensor_parallel,
            "pipeline_parallel": 1 + max(chunk.stage for chunk in plan.layout),
            "virtual_pipeline": 1 + max(chunk.virtual for chunk in plan.layout),
            "pipeline_layout": [len(chunk.layers) for chunk in plan.layout],
        }
    manifest["not_written"] = [entry.name for entry in plan.dropped]
    manifest["tensors"] = tensors
    text = json.dumps(manifest, indent=1) + "\n"  # in ASCII: a path need not be valid UTF-8
    (folder / MANIFEST).write_text(text, encoding="utf-8")
