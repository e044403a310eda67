"""Save and load what one rank of the learner knows: model, optimizer, generators, counters.

A folder is a torch_dist checkpoint, which Megatron-core reads as well, with learner.json beside
the tensors. What it holds depends neither on the layout nor on whether the optimizer is
distributed (state_pieces.py), so it loads at any other:

    <key>                               parameters, in the model's dtype
    optimizer.state.fp32_param.<key>    the copy that the optimizer steps, of a 16-bit model
    optimizer.state.exp_avg.<key>       Adam's moments, fp32; none before the first step
    optimizer.state.exp_avg_sq.<key>
    learner.json                        counters, number of Adam's steps, generators by rank

Every rank writes a file of what it alone holds, from a copy in host memory, by a thread that
takes part in no collective: a rank that dies keeps no other from ending. Nothing is unpickled:
.metadata and the tensors are read as data (checkpoint/restricted_pickle.py), and common.pt, which
is there for Megatron, is not read.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r2vpo_megatron.checkpoint.durable import synchronize, write_all
from r2vpo_megatron.checkpoint.torch_dist import (
    StoredChunk,
    StoredTensor,
    TorchDistReader,
    encode_extra_state,
    tensor_buffers,
    write_metadata,
)
from r2vpo_megatron.device.base import Platform
from r2vpo_megatron.learner.optimizer import TrainableModel
from r2vpo_megatron.learner.random_state import random_state, restore_random_state
from r2vpo_megatron.learner.state_pieces import (
    MOMENTS,
    Piece,
    all_pieces,
    extra_states,
    single_optimizers,
)
from r2vpo_megatron.parallel.state import ParallelState

_LEARNER_FILE = "learner.json"
_FORMAT = 1


@dataclass(frozen=True)
class _Written:
    """What lies in the file of one rank."""

    tensors: list[StoredTensor]  # each with one chunk
    objects: list[tuple[str, str, int, int]]


@dataclass(frozen=True)
class _Save:
    """A save between begin and finish."""

    folder: Path
    counters: dict[str, int]
    num_steps: int
    random_state: dict[str, Any]
    written: Future[_Written]


class LearnerState:
    """Checkpoints of one rank of the learner."""

    def __init__(self, model: TrainableModel, state: ParallelState, platform: Platform) -> None:
        """Nothing is copied or read yet.

        Args:
            model: what is saved and loaded in place; it may have been trained already.
            state: where this rank stands.
            platform: the device layer.
        """
        self._model = model
        self._state = state
        self._platform = platform
        self._save: _Save | None = None

    def begin_save(self, folder: Path, counters: Mapping[str, int]) -> None:
        """Copy everything to host memory, and start to write it in the background.

        Collective: every rank must call; after the return, training may go on.

        Args:
            folder: exists, and is seen by all ranks. It is a checkpoint after finish_save alone.
            counters: what else `load` is to return; rank 0's count.

        Raises:
            FloatingPointError: on every rank, where a value is not finite; nothing is written.
        """
        assert self._save is None, "finish_save comes first"
        pieces = [
            piece for piece in self._pieces(_adam_moments(self._optimizers)) if piece.is_written
        ]
        self._raise_alike(_not_finite(pieces))
        copies = deque(replace(p, values=p.values.to("cpu", copy=True)) for p in pieces)
        path = folder / f"__{self._state.rank}_0.distcp"
        pool = ThreadPoolExecutor(1, thread_name_prefix="learner-state")
        written = pool.submit(_write, path, copies, extra_states(self._model.chunks))
        pool.shutdown(wait=False)  # its thread ends with the file
        self._save = _Save(
            folder,
            dict(counters),
            _num_steps(self._optimizers),
            random_state(self._platform),
            written,
        )

    def is_saved(self) -> bool:
        """Whether this rank has nothing left to write, or failed: finish_save will not wait for it.

        True, too, where no save was begun. No collective.
        """
        return self._save is None or self._save.written.done()

    def finish_save(self) -> None:
        """Wait for all ranks' files, and make the folder a checkpoint, all of it on the disk.

        Collective: every rank must call, once for each begin_save.

        Raises:
            OSError: on every rank, the first one's that could not write. The folder is of no use
                then; another save may begin.
        """
        assert self._save is not None, "begin_save comes first"
        save, self._save = self._save, None
        error = save.written.exception()
        self._raise_alike(error)
        own = (save.written.result(), save.num_steps, save.random_state)
        by_rank: list[Any] | None = [None] * self._state.world_size
        dist.gather_object(own, by_rank if self._state.is_writer else None, dst=0)
        if self._state.is_writer:
            assert by_rank is not None
            try:
                _complete(save.folder, save.counters, by_rank)
            except OSError as failure:
                error = failure
        self._raise_alike(error)

    def load(self, folder: Path) -> dict[str, int]:
        """Go on from a checkpoint, of whatever layout.

        The next update is bit for bit that of the run which saved it if the layout is the same.
        Generators are set only if the number of ranks is; else they stay as they were seeded.

        Collective: every rank must call. Where the bytes inside a tensor's file are wrong, weights
        may be a mixture after the error; whatever else is wrong is found before one changes.

        Returns:
            The counters that were saved.

        Raises:
            ValueError: on every rank: the folder is not whole, is damaged, or is of another model
                or dtype; names the file or the tensor.
            OSError: on every rank: a file cannot be read.
        """
        error: Exception | None = None
        counters: dict[str, int] = {}
        try:
            counters = self._load(folder)
        except (ValueError, OSError) as failure:
            error = failure
        self._raise_alike(error)
        return counters

    def _load(self, folder: Path) -> dict[str, int]:
        counters, num_steps, random_states = _read_learner_file(folder / _LEARNER_FILE)
        moments: dict[Tensor, dict[str, Tensor]] = {}
        if num_steps > 0:
            stepped = [t for o in self._optimizers for g in o.param_groups for t in g["params"]]
            moments = {t: {name: torch.zeros_like(t) for name in MOMENTS} for t in stepped}
        pieces = self._pieces(moments)
        with TorchDistReader(folder) as reader, torch.no_grad():
            for piece in pieces:  # all of them before the first value changes
                _check_piece(reader, piece, self._model.chunks[0].module.spec.vocab_size)
            if len(random_states) == self._state.world_size:
                restore_random_state(random_states[self._state.rank], self._platform)
            for piece in pieces:
                _read_piece(reader, piece)
        for optimizer in self._optimizers:
            _set_adam(optimizer, moments, num_steps)
        return counters

    @property
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that Megatron's wrap: torch's AdamW, or Apex's or Transformer Engine's Adam."""
        return [single.optimizer for single in single_optimizers(self._model.optimizer)]

    def _pieces(self, moments: Mapping[Tensor, Mapping[str, Tensor]]) -> list[Piece]:
        return all_pieces(self._model.chunks, self._model.optimizer, moments)

    def _raise_alike(self, error: BaseException | None) -> None:
        """Raise, on every rank, the error of the first rank that has one. Collective."""
        errors: list[BaseException | None] = [None] * self._state.world_size
        dist.all_gather_object(errors, error)
        for first in errors:
            if first is not None:
                raise first


def _adam_moments(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, dict[str, Tensor]]:
    return {
        stepped: state
        for optimizer in optimizers
        for stepped, state in optimizer.state.items()
        if all(name in state for name in MOMENTS)
    }


def _num_steps(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Of Adam, by which it corrects its bias; 0 where this rank steps nothing.

    torch's AdamW counts for each parameter; Apex's and Transformer Engine's for a group.
    """
    counts = {
        int(holder["step"])
        for optimizer in optimizers
        for holder in (*optimizer.state.values(), *optimizer.param_groups)
        if "step" in holder
    }
    assert len(counts) <= 1, f"all parameters take part in every step, but not so far: {counts}"
    return max(counts, default=0)


def _set_adam(
    optimizer: torch.optim.Optimizer, moments: Mapping[Tensor, dict[str, Tensor]], num_steps: int
) -> None:
    """Give an optimizer these moments and steps, as its own load_state_dict does."""
    saved = optimizer.state_dict()
    stepped = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    saved["state"] = {number: moments[t] for number, t in enumerate(stepped) if t in moments}
    if isinstance(optimizer, torch.optim.Adam):
        for state in saved["state"].values():
            state["step"] = torch.tensor(float(num_steps))
    else:
        for group in saved["param_groups"]:
            group["step"] = num_steps
    optimizer.load_state_dict(saved)


def _not_finite(pieces: Sequence[Piece]) -> FloatingPointError | None:
    """Names the first piece with a NaN or an infinity; one look at the device for all pieces."""
    if not pieces:
        return None
    largest = torch.stack(
        [torch.linalg.vector_norm(piece.values, ord=float("inf")).float() for piece in pieces]
    )
    for piece, finite in zip(pieces, torch.isfinite(largest).tolist(), strict=True):
        if not finite:
            return FloatingPointError(
                f"{piece.name} has values that are not finite; no checkpoint is written"
            )
    return None


def _write(path: Path, pieces: deque[Piece], objects: Sequence[str]) -> _Written:
    """Write a rank's file and bring it to the disk; a copy's memory is free once it is written."""
    written = _Written([], [])
    with open(path, "wb", buffering=0) as stream:
        while pieces:
            piece = pieces.popleft()
            position = stream.tell()
            for buffer in tensor_buffers(piece.values):
                write_all(stream, memoryview(buffer))
            sizes, length = tuple(piece.values.shape), stream.tell() - position
            chunk = StoredChunk(piece.offsets, sizes, path.name, position, length)
            written.tensors.append(
                StoredTensor(piece.key, piece.shape, piece.values.dtype, (chunk,))
            )
        for key in objects:
            position = stream.tell()
            write_all(stream, memoryview(encode_extra_state()))
            written.objects.append((key, path.name, position, stream.tell() - position))
        os.fsync(stream.fileno())
    return written


def _complete(
    folder: Path, counters: dict[str, int], by_rank: Sequence[tuple[_Written, int, dict[str, Any]]]
) -> None:
    """Write what is about all ranks' files, .metadata last."""
    tensors: dict[str, StoredTensor] = {}
    for written, _, _ in by_rank:
        for part in written.tensors:
            known = tensors.setdefault(part.key, replace(part, chunks=()))
            assert (known.shape, known.dtype) == (part.shape, part.dtype), part.key
            tensors[part.key] = replace(known, chunks=(*known.chunks, *part.chunks))
    learner = {
        "format": _FORMAT,
        "counters": counters,
        "num_steps": max(num_steps for _, num_steps, _ in by_rank),
        "random_states": [random_state for _, _, random_state in by_rank],
    }
    (folder / _LEARNER_FILE).write_text(json.dumps(learner), encoding="utf-8")
    objects = [entry for written, _, _ in by_rank for entry in written.objects]
    write_metadata(folder, tensors.values(), objects)
    synchronize(folder)


def _read_learner_file(path: Path) -> tuple[dict[str, int], int, list[Any]]:
    """Counters, number of Adam's steps, generators by rank."""
    try:
        learner = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    match learner:
        case {
            "format": int(version),
            "counters": dict(counters),
            "num_steps": int(num_steps),
            "random_states": list(random_states),
        } if all(type(count) is int for count in counters.values()):
            if version != _FORMAT:
                raise ValueError(f"{path}: format = {version}: must be {_FORMAT}")
            return counters, num_steps, random_states
    raise ValueError(f"{path}: is not what a learner writes")


def _check_piece(reader: TorchDistReader, piece: Piece, vocab_size: int) -> None:
    """Check that the checkpoint has the tensor of a piece, and all of it."""
    stored = reader.tensors.get(piece.key)
    if stored is None:
        raise ValueError(f"{reader.folder}: has no tensor {piece.key!r}")
    fits = stored.shape == piece.shape or (
        piece.has_padded_rows
        and stored.shape[1:] == piece.shape[1:]
        and stored.shape[0] >= vocab_size
    )
    if stored.dtype != piece.values.dtype or not fits:
        raise ValueError(
            f"{reader.folder}: tensor {piece.key!r} is {stored.dtype} {list(stored.shape)}, "
            f"not {piece.values.dtype} {list(piece.shape)}; it is of another model or dtype"
        )
    reader.check(piece.key)


def _read_piece(reader: TorchDistReader, piece: Piece) -> None:
    """Fill a piece from the checkpoint; rows of padding that it lacks with 0."""
    box = [(o, o + size) for o, size in zip(piece.offsets, piece.values.shape, strict=True)]
    stored_rows = reader.tensors[piece.key].shape[0]
    rows = max(0, min(box[0][1], stored_rows) - box[0][0])
    if rows > 0:
        box[0] = (box[0][0], box[0][0] + rows)
        piece.values[:rows].copy_(reader.read(piece.key, box))
    piece.values[rows:].zero_()
