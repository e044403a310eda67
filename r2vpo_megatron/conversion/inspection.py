"""What a checkpoint folder holds, of either format, whole or broken; nothing is changed."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2vpo_megatron.checkpoint.megatron_keys import MegatronCheckpoint, unwrapped
from r2vpo_megatron.checkpoint.safetensors_header import read_header
from r2vpo_megatron.checkpoint.safetensors_io import CheckpointReader
from r2vpo_megatron.checkpoint.tensor_check import (
    TensorReader,
    dtype_name,
    expected_tensors,
    tensor_faults,
)
from r2vpo_megatron.checkpoint.torch_dist import StoredTensor, TorchDistReader, is_torch_dist
from r2vpo_megatron.conversion.hf_export import checkpoint_folder
from r2vpo_megatron.conversion.verify import tensor_sha256
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.spec import ModelSpec, read_model_spec

HUGGING_FACE = "Hugging Face, safetensors"
TORCH_DIST = "Megatron-core, torch_dist"

_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "training_args.bin")
_LAYERS = "decoder.layers."
_CUT_BY_COLUMNS = "self_attention.linear_proj.weight"
_EMBEDDING_KEY = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor as Hugging Face names it, or, where that is not known, under its stored key."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    sha256: str | None = None  # of the bytes in row-major order; the same in both formats


@dataclass(frozen=True)
class InspectedFile:
    """A file with tensors."""

    name: str
    num_bytes: int
    holds: str  # for a person: "layers 0-12, embedding"


@dataclass
class Inspection:
    """A report; `problems` is empty for a checkpoint that can be loaded."""

    folder: str
    format: str
    spec: ModelSpec | None = None
    tensors: list[InspectedTensor] = field(default_factory=list)
    files: list[InspectedFile] = field(default_factory=list)
    manifest: dict[str, Any] | None = None  # conversion.json without its tensors
    tensor_parallel: int | None = None  # of the ranks that saved a torch_dist folder
    stored_vocabulary: int | None = None  # rows of the embedding, with padding
    optimizer_state: bool = False
    common: dict[str, str] | None = None  # common.pt's values, as text
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for machines."""
        return asdict(self) | {
            "num_parameters": None if self.spec is None else self.spec.num_parameters,
            "num_bytes": sum(tensor.num_bytes for tensor in self.tensors),
        }


def inspect_checkpoint(
    folder: str | Path, *, sha256: bool = False, trust_pickle: bool = False
) -> Inspection:
    """Report what `folder` holds; a broken checkpoint is reported, not refused.

    Args:
        folder: a Hugging Face folder, a torch_dist folder, or the parent that Megatron-LM makes
            around one (the iteration that its text file names is taken).
        sha256: read every tensor and digest it.
        trust_pickle: unpickle a foreign common.pt, which may run any code.

    Raises:
        ValueError: not a folder, or nothing in it is known.
    """
    given = Path(folder)
    path = checkpoint_folder(given)
    if is_torch_dist(path):
        report = _inspect_torch_dist(path, given, sha256, trust_pickle)
    elif (path / "config.json").is_file() or any(path.glob("*.safetensors*")):
        report = _inspect_hugging_face(path, sha256)
    else:
        raise ValueError(
            f"checkpoint {path}: holds neither a Hugging Face checkpoint (config.json, "
            "*.safetensors) nor a torch_dist one (metadata.json, .metadata, *.distcp)"
        )
    _read_manifest(report, path)
    return report


def _inspect_hugging_face(folder: Path, sha256: bool) -> Inspection:
    report = Inspection(str(folder), HUGGING_FACE)
    report.optimizer_state = any((folder / name).is_file() for name in _OPTIMIZER_FILES)
    try:
        report.spec = read_model_spec(folder)
    except ValueError as error:
        report.problems.append(str(error))
    try:
        reader = CheckpointReader(folder)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        _list_whole_files(report, folder)
        return report
    with reader:
        _list_tensors(report, reader, sha256)
        by_file = defaultdict(list)
        names = reader.names()
        for name in names:
            by_file[reader.file_of(name)].append(name)
        stated, held = reader.index_metadata.get("total_size"), sum(map(reader.nbytes, names))
        if stated not in (None, held):
            report.notes.append(f"the index states {stated} bytes; the tensors have {held}")
    for name, tensors in by_file.items():
        size = (folder / name).stat().st_size
        report.files.append(InspectedFile(name, size, f"{len(tensors)} tensors"))
    unlisted = sorted({path.name for path in folder.glob("*.safetensors")} - set(by_file))
    if unlisted:
        report.notes.append(f"files that the index does not name: {', '.join(unlisted)}")
    if report.spec is not None:
        _compare_with_config(report, report.spec)
    return report


def _list_whole_files(report: Inspection, folder: Path) -> None:
    """What can be said of each file where the folder as a whole cannot be read."""
    for path in sorted(folder.glob("*.safetensors")):
        holds = "not a whole safetensors file"
        try:
            with path.open("rb") as file:
                _, entries = read_header(path, file.fileno())
            holds = f"{len(entries)} tensors"
            report.tensors += [
                InspectedTensor(entry.name, entry.shape, dtype_name(entry.dtype), entry.nbytes)
                for entry in entries
            ]
        except (ValueError, OSError) as error:
            if str(error) not in report.problems:
                report.problems.append(str(error))
        report.files.append(InspectedFile(path.name, path.stat().st_size, holds))
    if report.spec is not None:
        _compare_with_config(report, report.spec)


def _inspect_torch_dist(folder: Path, given: Path, sha256: bool, trust_pickle: bool) -> Inspection:
    """`given` is the folder itself or Megatron-LM's around it, which may hold hf/ for all."""
    report = Inspection(str(folder), TORCH_DIST)
    try:
        reader = TorchDistReader(folder, trust_pickle=trust_pickle)
    except (ValueError, OSError) as error:
        report.problems.append(str(error))
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
        report.files = [InspectedFile(name, size, "") for name, size in sorted(sizes.items())]
        return report
    with reader:
        stored = {unwrapped(key): tensor for key, tensor in reader.tensors.items()}
        report.optimizer_state = any(_part_of(key) == "optimizer" for key in stored)
        _check_chunks(report, reader)
        try:
            report.common = {name: str(value) for name, value in reader.common().items()}
        except (ValueError, OSError) as error:  # weights do not need it
            report.notes.append(str(error))
        report.files = _distcp_files(folder, stored)
        if _EMBEDDING_KEY in stored:
            report.stored_vocabulary = stored[_EMBEDDING_KEY].shape[0]
        report.tensor_parallel = _tensor_parallel(stored)
        companions = [place / "hf" for place in (folder, given)]
        if not _list_as_hugging_face(report, folder, companions, sha256):
            _list_tensors(report, _StoredKeys(reader), sha256)
    return report


def _list_as_hugging_face(
    report: Inspection, folder: Path, companions: Sequence[Path], sha256: bool
) -> bool:
    """Fill in spec and tensors by the view; False where there is none."""
    with_config = [place for place in companions if (place / "config.json").is_file()]
    if not with_config:
        report.notes.append(
            "no hf/config.json: what the model needs is not known; tensors under stored keys"
        )
        return False
    try:
        report.spec = read_model_spec(with_config[0])
        view = MegatronCheckpoint(folder, spec=report.spec)
    except (ValueError, OSError) as error:
        if not any(problem.startswith(_place_of(error)) for problem in report.problems):
            report.problems.append(str(error))
        return False
    with view:
        _list_tensors(report, view, sha256)
        if view.unmapped:
            report.problems.append(f"not used by this model: {', '.join(view.unmapped)}")
    return True


def _list_tensors(report: Inspection, reader: TensorReader, sha256: bool) -> None:
    for name in reader.names():
        shape, dtype = reader.shape(name), reader.dtype(name)
        num_bytes = math.prod(shape) * dtype.itemsize
        digest = None
        if sha256:
            try:
                digest = tensor_sha256(reader, name)
            except (ValueError, OSError) as error:
                report.problems.append(f"{name}: cannot be read ({error})")
        report.tensors.append(InspectedTensor(name, shape, dtype_name(dtype), num_bytes, digest))


class _StoredKeys:
    """A torch_dist folder's global tensors as they are, for want of a config.json."""

    def __init__(self, reader: TorchDistReader) -> None:
        self.folder = reader.folder
        self._reader = reader

    def names(self) -> list[str]:
        return list(self._reader.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._reader.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self._reader.read(name, [(0, size) for size in self.shape(name)])

    def read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        ranges = [(0, size) for size in self.shape(name)]
        ranges[dimension] = (start, stop)
        return self._reader.read(name, ranges)


def _read_manifest(report: Inspection, folder: Path) -> None:
    """Keep what conversion.json says of the whole, and compare digests that are known."""
    path = folder / "conversion.json"
    if not path.is_file():
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        entries = manifest.pop("tensors", {})
        stated = {name: entry.get("sha256") for name, entry in entries.items()}
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        report.problems.append(f"{path}: is not a manifest ({error})")
        return
    report.manifest = manifest
    compared = [t for t in report.tensors if t.sha256 and stated.get(t.name)]
    changed = [tensor.name for tensor in compared if tensor.sha256 != stated[tensor.name]]
    if changed:
        report.problems.append(f"{path}: states other digests for {', '.join(changed)}")
    elif compared:
        report.notes.append(f"{len(compared)} digests are those of {path.name}")


def _compare_with_config(report: Inspection, spec: ModelSpec) -> None:
    """State what the model that config.json describes lacks, or has no use for."""
    names = ARCHITECTURES[spec.architecture].names
    expected = expected_tensors(spec)
    present = {tensor.name: tensor for tensor in report.tensors}
    extra = [name for name in present if name not in expected]
    computed = [name for name in extra if name.endswith(names.ignored_suffixes)]
    tied = [name for name in extra if spec.tied_embeddings and name == names.lm_head]
    faults = tensor_faults({name: tensor.shape for name, tensor in present.items()}, spec)
    for title, found in (
        ("missing", faults.unfilled),
        ("not used by this model", faults.unmapped),
        ("wrong shape", faults.misshapen),
    ):
        if found:
            report.problems.append(f"{title}: {', '.join(found)}")
    if computed:
        report.notes.append(f"{len(computed)} tensors are computed, not learned ({computed[0]})")
    if tied:
        report.notes.append(f"{tied[0]} is stored although the embeddings are tied")
    dtypes = {tensor.dtype for name, tensor in present.items() if name in expected}
    if dtypes and dtypes != {spec.dtype}:
        report.notes.append(f"config.json says {spec.dtype}; tensors are {', '.join(dtypes)}")


def _distcp_files(folder: Path, stored: Mapping[str, StoredTensor]) -> list[InspectedFile]:
    layers: dict[str, set[int]] = defaultdict(set)
    others: dict[str, dict[str, None]] = defaultdict(dict)  # in order, each once
    for key, tensor in stored.items():
        for chunk in tensor.chunks:
            held = _layers_of(key, chunk.offsets, chunk.sizes)
            layers[chunk.file].update(held)
            if not held:
                others[chunk.file][_part_of(key)] = None
    files = []
    for path in sorted(folder.glob("*.distcp")):
        parts = [_ranges(layers[path.name])] if layers[path.name] else []
        parts += others[path.name]
        files.append(InspectedFile(path.name, path.stat().st_size, ", ".join(parts) or "nothing"))
    return files


def _tensor_parallel(stored: Mapping[str, StoredTensor]) -> int | None:
    """Parts into which columns are cut; rows may be in more parts than there are ranks."""
    for key, tensor in stored.items():
        if key.startswith(_LAYERS) and key.endswith(_CUT_BY_COLUMNS):
            return len({chunk.offsets[-1] for chunk in tensor.chunks})
    return None


def _check_chunks(report: Inspection, reader: TorchDistReader) -> None:
    """Every tensor, so that every broken file is told of, not the first alone."""
    faults: dict[str, list[str]] = defaultdict(list)
    for key in reader.tensors:
        try:
            reader.check(key)
        except ValueError as error:
            faults[_place_of(error)].append(str(error))
    for found in faults.values():
        more = f" (and {len(found) - 1} more tensors of it)" if len(found) > 1 else ""
        report.problems.append(found[0] + more)


def _place_of(error: Exception) -> str:
    """The file that a message begins with."""
    return str(error).split(": ")[0] + ": "


def _layers_of(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[int]:
    """Layers in one chunk: stacked along the first dimension, or numbered in the key."""
    if not key.startswith(_LAYERS):
        return []
    number = key.removeprefix(_LAYERS).split(".")[0]
    if number.isdecimal():
        return [int(number)]
    return list(range(offsets[0], offsets[0] + sizes[0]))


def _part_of(key: str) -> str:
    if key.startswith(("optimizer.", "chained_")):
        return "optimizer"
    names = {_EMBEDDING_KEY: "embedding", "output_layer.weight": "LM head"}
    names["decoder.final_layernorm.weight"] = "final norm"
    return names.get(key, key)


def _ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return "layers " + ", ".join(texts)
