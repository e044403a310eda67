"""Say what a checkpoint folder holds: Hugging Face, torch_dist, or Megatron-LM's parent folder.

python tools/inspect_checkpoint.py DIR [--sha256] [--json]

Exit code 0: it can be loaded; 1: it is broken, and the report says where; 2: not a checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.conversion.inspection import InspectedTensor, Inspection, inspect_checkpoint

_MANIFEST_KEYS = ("source", "dtype", "tensor_parallel", "pipeline_parallel", "pipeline_layout")
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, inspect, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path, help="folder")
    parser.add_argument(
        "--sha256", action="store_true", help="read and digest every tensor; lists each layer's"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle the common.pt of a foreign checkpoint to show it: that can run any program "
        "as you; only for files whose author you trust",
    )
    options = parser.parse_args(arguments)
    try:
        report = inspect_checkpoint(
            options.checkpoint, sha256=options.sha256, trust_pickle=options.trust_pickle
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(report.as_json(), indent=2) if options.json else "\n".join(describe(report))
    try:
        # Paths in conversion.json may be no Unicode.
        print(text.encode(errors="backslashreplace").decode(), flush=True)
    except BrokenPipeError:  # `| head` has read enough; what is buffered must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if report.problems else 0


def describe(report: Inspection) -> list[str]:
    """The report as lines of text."""
    lines = [f"{report.folder}: {report.format}", *_model_lines(report)]
    num_bytes = sum(tensor.num_bytes for tensor in report.tensors)
    lines.append(f"tensors          {len(report.tensors):,}, {num_bytes:,} bytes")
    lines.append(f"optimizer state  {'present' if report.optimizer_state else 'none'}")
    if report.manifest is not None:
        known = [key for key in _MANIFEST_KEYS if key in report.manifest]
        facts = (f"{key.replace('_', ' ')} {report.manifest[key]}" for key in known)
        lines.append(f"conversion.json  {', '.join(facts)}")
    if report.common is not None:
        values = (f"{name} {_shortened(value)}" for name, value in report.common.items())
        lines.append(f"common.pt        {', '.join(values)}")
    lines.append("files")
    width = max((len(file.name) for file in report.files), default=0)
    lines += [f"  {f.name:<{width}}  {f.num_bytes:>15,} bytes  {f.holds}" for f in report.files]
    lines += _tensor_lines(report.tensors)
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"broken: {problem}" for problem in report.problems]
    return lines


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _model_lines(report: Inspection) -> list[str]:
    spec = report.spec
    lines = []
    if spec is not None:
        biases = [name for name, has in (("qkv", spec.qkv_bias), ("o", spec.o_bias)) if has]
        lines.append(
            f"architecture     {spec.architecture}: {spec.num_layers} layers, hidden "
            f"{spec.hidden_size}, {spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} "
            f"KV heads, ffn {spec.ffn_size}, bias on {' and '.join(biases) or 'none'}, "
            f"embeddings {'tied' if spec.tied_embeddings else 'untied'}"
        )
        lines.append(f"parameters       {spec.num_parameters:,}")
    rows = report.stored_vocabulary
    if spec is not None:
        padding = f", stored as {rows:,} rows" if rows not in (None, spec.vocab_size) else ""
        lines.append(f"vocabulary       {spec.vocab_size:,}{padding}")
    elif rows is not None:
        lines.append(f"vocabulary       {rows:,} rows with padding")
    if report.tensor_parallel is not None:
        lines.append(f"tensor parallel  {report.tensor_parallel}")
    return lines


def _tensor_lines(tensors: Sequence[InspectedTensor]) -> list[str]:
    """One line a tensor; layers that are alike share theirs unless there are digests."""
    groups: dict[tuple[object, ...], list[InspectedTensor]] = {}
    for tensor in tensors:
        pattern = tensor.name if tensor.sha256 else _LAYER.sub("*", tensor.name)
        groups.setdefault((pattern, tensor.shape, tensor.dtype, tensor.sha256), []).append(tensor)
    rows = []
    for fields, alike in groups.items():
        first = alike[0]
        name = str(fields[0])
        if len(alike) > 1:
            numbers = [int(_LAYER.findall(tensor.name)[0]) for tensor in alike]
            name = name.replace("*", f"{{{_runs(numbers)}}}")
        elif _LAYER.search(first.name):
            name = first.name
        rows.append((name, str(list(first.shape)), first.dtype, first.sha256 or ""))
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    cells = (
        "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=False)) for row in rows
    )
    lines = (f"  {text}  {row[3]}".rstrip() for text, row in zip(cells, rows, strict=True))
    return ["names", *lines]


def _runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        parts.append(f"{members[0]}-{members[-1]}" if len(members) > 1 else str(members[0]))
    return ",".join(parts)


if __name__ == "__main__":
    sys.exit(main())
