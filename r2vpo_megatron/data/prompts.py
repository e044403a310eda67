"""Prompt files and the resumable stream of prompts that feeds the rollouts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from r2vpo_megatron.records import IntArray

Message = dict[str, str]  # {"role": ..., "content": ...}

ROLES = ("system", "user", "assistant")
_KNOWN_FIELDS = frozenset({"prompt_id", "messages", "prompt", "ground_truth"})


@dataclass(frozen=True)
class RawPrompt:
    """One problem as its file has it, before the chat template."""

    prompt_id: str
    messages: tuple[Message, ...]
    ground_truth: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the user says: the content of the last message."""
        return self.messages[-1]["content"]


class HasPromptId(Protocol):
    """Anything the stream can serve: a RawPrompt or a tokenised Prompt."""

    @property
    def prompt_id(self) -> str:
        """Identity of the problem, unique in its file."""


PromptT = TypeVar("PromptT", bound=HasPromptId)


def load_prompts(path: str | Path) -> list[RawPrompt]:
    """Read a prompt file.

    A line of a `.jsonl` file, and a row of a `.parquet` file, has the fields
    `messages` (list of {"role", "content"}, the last one the user's) or `prompt` (a string, or
    such a list), `ground_truth` (or `reward_model.ground_truth`, as DAPO-Math-17k has it) and
    optionally `prompt_id`. Other fields are kept in `extra`. Empty lines are skipped.

    Args:
        path: The file. Without a `prompt_id`, the id is the file's stem and the row number.

    Raises:
        ValueError: The file is missing, empty, of another type, holds a broken line or the same
            id twice; the message starts with "file:line:".
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"prompt file {path}: type {path.suffix!r}; valid: {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"prompt file {path}: no such file")
    prompts: list[RawPrompt] = []
    first_seen: dict[str, int] = {}
    for number, row in readers[path.suffix](path):
        where = f"{path}:{number}"
        prompt = _parse_row(row, where, default_id=f"{path.stem}-{number:07d}")
        if prompt.prompt_id in first_seen:
            raise ValueError(
                f"{where}: field prompt_id: {prompt.prompt_id!r} is taken by line "
                f"{first_seen[prompt.prompt_id]}; valid: an id that occurs once in the file"
            )
        first_seen[prompt.prompt_id] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"prompt file {path}: empty; valid: at least one prompt")
    return prompts


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, decoded object)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8 (byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: not a JSON object: {error.msg} at column {error.colno}"
                ) from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, row as a dict)."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"prompt file {path}: reading .parquet needs the package pyarrow; "
            "install it or convert the file to .jsonl"
        ) from error
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _parse_row(row: Any, where: str, default_id: str) -> RawPrompt:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {_describe(row)}; valid: a JSON object")
    prompt_id = row.get("prompt_id", default_id)
    if isinstance(prompt_id, int) and not isinstance(prompt_id, bool):
        prompt_id = str(prompt_id)
    if not isinstance(prompt_id, str) or not prompt_id:
        raise _bad_field(where, "prompt_id", prompt_id, "a non-empty string or an integer")
    extra = {key: value for key, value in row.items() if key not in _KNOWN_FIELDS}
    return RawPrompt(prompt_id, _parse_messages(row, where), _parse_ground_truth(row, where), extra)


def _parse_messages(row: dict[str, Any], where: str) -> tuple[Message, ...]:
    if ("messages" in row) == ("prompt" in row):
        given = "both" if "messages" in row else "neither"
        raise ValueError(f"{where}: field messages, prompt: got {given}; valid: exactly one")
    name = "messages" if "messages" in row else "prompt"
    value = row[name]
    if name == "prompt" and isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise _bad_field(where, name, value, "a non-empty list of {role, content}")
    messages = []
    for index, message in enumerate(value):
        inner = f"{name}[{index}]"
        if not isinstance(message, dict):
            raise _bad_field(where, inner, message, "an object {role, content}")
        if message.get("role") not in ROLES:
            raise _bad_field(where, f"{inner}.role", message.get("role"), " | ".join(ROLES))
        if not isinstance(message.get("content"), str):
            raise _bad_field(where, f"{inner}.content", message.get("content"), "a string")
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise _bad_field(where, name, messages[-1], "the last message is the user's and not empty")
    return tuple(messages)


def _parse_ground_truth(row: dict[str, Any], where: str) -> str:
    name, value = "ground_truth", row.get("ground_truth")
    if "ground_truth" not in row and isinstance(row.get("reward_model"), dict):
        name, value = "reward_model.ground_truth", row["reward_model"].get("ground_truth")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise _bad_field(where, name, value, "a non-empty string or an integer")
    return value


def _bad_field(where: str, name: str, value: Any, valid: str) -> ValueError:
    return ValueError(f"{where}: field {name}: got {_describe(value)}; valid: {valid}")


def _describe(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


class PromptStream(Generic[PromptT]):
    """Endless, shuffled, resumable batches of prompts.

    Every epoch serves each prompt once, in an order that (seed, epoch) alone decides. A batch may
    end one epoch and begin the next; only such a batch can hold a prompt twice, so whoever names
    groups should use the position in the batch as well as the prompt's id.
    """

    def __init__(self, prompts: Sequence[PromptT], seed: int, prompts_per_iteration: int) -> None:
        """Start at the first prompt of epoch 0.

        Args:
            prompts: What to serve; ids are unique.
            seed: Decides every epoch's order; not negative.
            prompts_per_iteration: Size of a batch.

        Raises:
            ValueError: An argument is out of range or an id occurs twice.
        """
        if not prompts:
            raise ValueError("prompts: empty; valid: at least one prompt")
        if prompts_per_iteration < 1:
            raise ValueError(f"prompts_per_iteration: {prompts_per_iteration}; valid: 1 or more")
        if seed < 0:
            raise ValueError(f"seed: {seed}; valid: 0 or more")
        if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
            raise ValueError("prompts: an id occurs twice; valid: unique prompt ids")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._batch_size = prompts_per_iteration
        self._epoch = 0
        self._position = 0
        self._order = self._shuffled(0)

    def next_batch(self) -> list[PromptT]:
        """Return the next `prompts_per_iteration` prompts."""
        batch: list[PromptT] = []
        while len(batch) < self._batch_size:
            if self._position == len(self._prompts):
                self._epoch += 1
                self._position = 0
                self._order = self._shuffled(self._epoch)
            end = min(self._position + self._batch_size - len(batch), len(self._prompts))
            batch += [self._prompts[index] for index in self._order[self._position : end]]
            self._position = end
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, in JSON types, and what it is only valid for."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "prompts_sha256": self._fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: It was taken with another seed or other prompts.
        """
        for name, own in (("seed", self._seed), ("prompts_sha256", self._fingerprint())):
            if state[name] != own:
                raise ValueError(
                    f"prompt stream: {name} is {own}, the saved run had {state[name]}; "
                    "valid: resume with the same prompts and the same seed"
                )
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._order = self._shuffled(self._epoch)

    def _shuffled(self, epoch: int) -> IntArray:
        # A sequence as the seed: seed + epoch would give seed 1 the epochs of seed 0, shifted.
        generator = np.random.default_rng([self._seed, epoch])
        return generator.permutation(len(self._prompts)).astype(np.int64)

    def _fingerprint(self) -> str:
        ids = json.dumps([prompt.prompt_id for prompt in self._prompts])
        return hashlib.sha256(ids.encode("utf-8")).hexdigest()
