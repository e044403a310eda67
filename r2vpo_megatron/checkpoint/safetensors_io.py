"""Read slices of, and write, Hugging Face checkpoint folders; safetensors only, no pickle."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2vpo_megatron.models.architecture import HfNames

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_COMPANION_PATTERNS = ("tokenization_*.py", "configuration_*.py", "modeling_*.py", "LICENSE*")


class CheckpointReader:
    """Tensors of a checkpoint folder by name, whole or in slices, mapped rather than loaded."""

    def __init__(self, model_dir: str | Path) -> None:
        """Find every tensor.

        Raises:
            ValueError: no safetensors file, or an index that names a missing file.
        """
        self.folder = Path(model_dir)
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        try:
            for path in _tensor_files(self.folder):
                self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        try:
            file = self._stack.enter_context(safe_open(str(path), framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            self._file_of[name] = file

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self._file_of.clear()
        self._stack.close()

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def read_slice(self, name: str, dimension: int, start: int, stop: int) -> Tensor:
        """tensor[start:stop] along dimension 0 or 1, on the CPU."""
        view = self._file_of[name].get_slice(name)
        part: Tensor = view[start:stop] if dimension == 0 else view[:, start:stop]
        return part


def _tensor_files(folder: Path) -> list[Path]:
    index = folder / _INDEX_FILE
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ValueError(f"{index}: is not a safetensors index ({error!r})") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{index}: names files that are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / _SINGLE_FILE).is_file():
        return [folder / _SINGLE_FILE]
    raise ValueError(
        f"model folder {folder}: has neither {_SINGLE_FILE} nor {_INDEX_FILE}; "
        "only safetensors checkpoints are read"
    )


def save_hf_checkpoint(
    tensors: Iterable[tuple[str, Tensor | None]],
    output_dir: str | Path,
    reference_dir: str | Path,
    max_shard_bytes: int = 5 * 1024**3,
    ignored_suffixes: tuple[str, ...] = HfNames.ignored_suffixes,
) -> None:
    """Write a Hugging Face checkpoint folder; it appears whole or not at all.

    config.json, tokenizer, generation config and chat template are the reference's, unchanged,
    except that config.json states the dtype of `tensors` if their floating-point ones share one.
    Tensors of the reference with an ignored suffix, which the stream lacks since they are not
    learned, are copied, so that the folder has exactly the reference's tensors.

    Args:
        tensors: (name, tensor) pairs; one shard of them is held in memory at a time.
        output_dir: must not exist or be empty.
        reference_dir: the checkpoint from which training started.
        max_shard_bytes: a file ends before it would exceed this (one tensor may).
        ignored_suffixes: see above.

    Raises:
        ValueError: output_dir is in use, reference_dir has no config.json, or a tensor is None.
    """
    output, reference = Path(output_dir), Path(reference_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output folder {output}: exists and is not empty; name a new one")
    if not (reference / "config.json").is_file():
        raise ValueError(f"reference folder {reference}: has no config.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        dtypes: set[torch.dtype] = set()
        stream = _with_ignored(_noting_dtypes(tensors, dtypes), reference, ignored_suffixes)
        _write_shards(stream, temporary, max_shard_bytes)
        _copy_companions(reference, temporary)
        if len(dtypes) == 1:
            _state_dtype(temporary / "config.json", str(dtypes.pop()).removeprefix("torch."))
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        if output.exists():
            output.rmdir()
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _noting_dtypes(
    tensors: Iterable[tuple[str, Tensor | None]], dtypes: set[torch.dtype]
) -> Iterator[tuple[str, Tensor | None]]:
    """Pass the stream on and add the dtypes of its floating-point tensors to `dtypes`."""
    for name, tensor in tensors:
        if tensor is not None and tensor.is_floating_point():
            dtypes.add(tensor.dtype)
        yield name, tensor


def _with_ignored(
    tensors: Iterable[tuple[str, Tensor | None]], reference: Path, suffixes: tuple[str, ...]
) -> Iterator[tuple[str, Tensor | None]]:
    written = set()
    for name, tensor in tensors:
        written.add(name)
        yield name, tensor
    if not ((reference / _SINGLE_FILE).is_file() or (reference / _INDEX_FILE).is_file()):
        return
    with CheckpointReader(reference) as reader:
        for name in reader.names():
            if name.endswith(suffixes) and name not in written:
                yield name, reader.tensor(name)


def _write_shards(
    tensors: Iterable[tuple[str, Tensor | None]], folder: Path, max_shard_bytes: int
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, str(folder / f"{len(shards)}.part"), metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if tensor is None:
            raise ValueError(f"tensor {name} is None: only the writing rank may save a checkpoint")
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = _owned_on_cpu(tensor)
        pending_bytes += size
        total_bytes += size
    flush()
    _name_shards(folder, shards, total_bytes)


def _owned_on_cpu(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with storage of its own size, detached from the model.

    A view would keep alive, and safetensors refuse, storage that other tensors share; and the
    parameters may change before the shard is written.
    """
    detached = tensor.detach()
    return detached.cpu() if detached.device.type != "cpu" else detached.clone()


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        os.replace(folder / "0.part", folder / _SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{number}.part", folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / _INDEX_FILE).write_text(text, encoding="utf-8")


def _copy_companions(reference: Path, folder: Path) -> None:
    paths = [reference / name for name in _COMPANION_FILES]
    paths += [path for pattern in _COMPANION_PATTERNS for path in sorted(reference.glob(pattern))]
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _state_dtype(config_path: Path, dtype: str) -> None:
    """Correct config.json's dtype: loaders that follow it would cast the weights."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == dtype for key in keys):
        return
    config.update(dict.fromkeys(keys, dtype))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    config_path.write_text(text, encoding="utf-8")
