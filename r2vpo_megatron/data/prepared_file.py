"""Writes a prepared prompt file and its manifest, both whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r2vpo_megatron.data.prompts import load_prompts


def manifest_path(output: Path) -> Path:
    """Where the manifest of a prompt file lies."""
    return output.with_name(output.name + ".manifest.json")


def check_output(output: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Check where the result is to go, before minutes are spent on making it.

    Raises:
        ValueError: It is no .parquet file, taken, an input, or its folder cannot be one.
    """
    if output.suffix != ".parquet":
        raise ValueError(f"output {output}: type {output.suffix!r}; valid: .parquet")
    if output.is_dir():
        raise ValueError(f"output {output}: is a folder; valid: a file name")
    if any(output.resolve() == path.resolve() for path in inputs):
        raise ValueError(f"output {output}: is an input; valid: another file")
    for path in (output, manifest_path(output)):
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: exists; valid: another --output, or --overwrite")
    parent = next(folder for folder in output.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {output}: {parent} is no folder that can be written")


def write_prepared(
    output: Path, rows: Sequence[dict[str, Any]], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Write rows and manifest; the same rows give the same bytes.

    Args:
        output: The .parquet file.
        rows: With the fields of `load_prompts`.
        manifest: What is to be said of them; the output's own hash is added.

    Returns:
        The manifest as written.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    output.parent.mkdir(parents=True, exist_ok=True)
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    fields = [
        ("prompt_id", pyarrow.string()),
        ("prompt", pyarrow.list_(message)),
        ("ground_truth", pyarrow.string()),
        ("problem", pyarrow.string()),
        ("data_source", pyarrow.string()),
        ("language", pyarrow.string()),
    ]
    if "num_tokens" in rows[0]:
        fields.append(("num_tokens", pyarrow.int32()))
    table = pyarrow.Table.from_pylist(list(rows), schema=pyarrow.schema(fields))
    with _temporary(output) as new_file, _temporary(manifest_path(output)) as new_manifest:
        parquet.write_table(table, new_file, compression="zstd")
        # What trains must be what was counted.
        if len(load_prompts(new_file)) != len(rows):
            raise ValueError(f"output {output}: was not written whole")
        manifest = {
            **manifest,
            "output": {
                "file": output.name,
                "sha256": file_sha256(new_file),
                "num_rows": len(rows),
            },
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        new_manifest.write_text(text, encoding="utf-8")
        # Old manifest away first: at no moment does one lie beside rows that it does not describe.
        manifest_path(output).unlink(missing_ok=True)
        os.replace(new_file, output)
        os.replace(new_manifest, manifest_path(output))
    return manifest


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same type; nothing of that name is left behind."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        # mkstemp keeps others out; a data set is as readable as any new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
