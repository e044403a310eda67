"""The trajectories of one iteration as columns: numbers end to end in a few numpy arrays.

A Python tuple takes some 40 bytes a token; an iteration of 1,024 responses of 16,384 tokens would
hold 640 MiB of token ids alone. Here an id takes four bytes, a log-prob four, and a version, which
changes a few times in a response at most, a few bytes for each of its runs.

Shape legend: S samples, P different prompts, U runs of tokens with the same version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from r2vpo_megatron.records import FloatArray, IntArray, Trajectory

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class TrajectoryColumns:
    """S trajectories of one iteration, all values to the bit; the arrays are read-only.

    Attributes:
        iteration: of all of them.
        sample_ids, group_ids, finish_reasons: [S].
        rewards, advantages: [S] float64.
        prompt_indices: [S], which of the prompts is the sample's.
        prompt_ends: [P], where each prompt ends in `prompt_token_ids`.
        response_ends: [S], where each response ends in the arrays of response tokens.
        prompt_token_ids, response_token_ids: end to end.
        behavior_logprobs, rollout_logprobs: end to end; one array where they are the same.
        run_versions, run_ends: [U], the version of a run, and where it ends in the responses
            end to end. A run may go on over several responses.
    """

    iteration: int
    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    rewards: npt.NDArray[np.float64]
    advantages: npt.NDArray[np.float64]
    prompt_indices: IntArray
    prompt_ends: IntArray
    response_ends: IntArray
    prompt_token_ids: Int32Array
    response_token_ids: Int32Array
    behavior_logprobs: FloatArray
    rollout_logprobs: FloatArray
    run_versions: IntArray
    run_ends: IntArray

    @classmethod
    def of(cls, iteration: int, trajectories: Sequence[Trajectory]) -> TrajectoryColumns:
        """Copy the trajectories' values; what the caller does to its arrays changes nothing here.

        Raises:
            ValueError: an array of a sample has another length than its response.
        """
        for sample in trajectories:
            _check_lengths(sample)
        prompts: dict[tuple[int, ...], int] = {}
        indices = [prompts.setdefault(t.prompt_token_ids, len(prompts)) for t in trajectories]
        behavior = _end_to_end((t.behavior_logprobs for t in trajectories), np.float32)
        rollout = _end_to_end((t.rollout_logprobs for t in trajectories), np.float32)
        versions = _end_to_end((t.policy_versions for t in trajectories), np.int64)
        # The last token of each run: where the next one has another version.
        run_ends = np.flatnonzero(np.diff(versions, append=versions[-1:] + 1)) + 1
        responses = [t.response_token_ids for t in trajectories]
        columns = cls(
            iteration=iteration,
            sample_ids=_texts(t.sample_id for t in trajectories),
            group_ids=_texts(t.group_id for t in trajectories),
            finish_reasons=_texts(t.finish_reason for t in trajectories),
            rewards=np.array([t.reward for t in trajectories], dtype=np.float64),
            advantages=np.array([t.advantage for t in trajectories], dtype=np.float64),
            prompt_indices=np.array(indices, dtype=np.int64),
            prompt_ends=_ends(prompts),
            response_ends=_ends(responses),
            prompt_token_ids=_end_to_end(prompts, np.int32),
            response_token_ids=_end_to_end(responses, np.int32),
            behavior_logprobs=behavior,
            rollout_logprobs=behavior if _same_bits(behavior, rollout) else rollout,
            run_versions=versions[run_ends - 1],
            run_ends=run_ends.astype(np.int64),
        )
        return columns._read_only()

    def __len__(self) -> int:
        """S."""
        return len(self.sample_ids)

    def trajectory(self, index: int) -> Trajectory:
        """One sample as it was given; its log-probs are read-only views."""
        response = _span(self.response_ends, index)
        prompt = _span(self.prompt_ends, int(self.prompt_indices[index]))
        return Trajectory(
            sample_id=self.sample_ids[index],
            group_id=self.group_ids[index],
            prompt_token_ids=tuple(self.prompt_token_ids[prompt].tolist()),
            response_token_ids=tuple(self.response_token_ids[response].tolist()),
            behavior_logprobs=self.behavior_logprobs[response],
            rollout_logprobs=self.rollout_logprobs[response],
            reward=float(self.rewards[index]),
            advantage=float(self.advantages[index]),
            finish_reason=self.finish_reasons[index],
            policy_versions=self._versions(response),
            iteration=self.iteration,
        )

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        arrays = {id(array): array.nbytes for array in self._arrays().values()}
        texts = {id(text): sys.getsizeof(text) for text in (*self.sample_ids, *self.group_ids)}
        pointers = 3 * sys.getsizeof(self.sample_ids)
        return sum(arrays.values()) + sum(texts.values()) + pointers

    def state_dict(self) -> dict[str, Any]:
        """JSON values and numpy arrays, by field."""
        texts = ("sample_ids", "group_ids", "finish_reasons")
        lists = {name: list(getattr(self, name)) for name in texts}
        return {"iteration": self.iteration, **lists, **self._arrays()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrajectoryColumns:
        """Invert `state_dict`."""
        values: dict[str, Any] = {
            name: _texts(value) if isinstance(value, list) else value
            for name, value in state.items()
        }
        if _same_bits(values["behavior_logprobs"], values["rollout_logprobs"]):
            values["rollout_logprobs"] = values["behavior_logprobs"]
        return cls(**values)._read_only()

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def _read_only(self) -> TrajectoryColumns:
        for array in self._arrays().values():
            array.setflags(write=False)
        return self

    def _versions(self, response: slice) -> IntArray:
        """[R] of the tokens in `response`."""
        first, last = np.searchsorted(self.run_ends, [response.start, response.stop - 1], "right")
        if response.start == response.stop:
            return np.zeros(0, dtype=np.int64)
        ends = self.run_ends[first : last + 1].clip(max=response.stop)
        lengths = np.diff(ends, prepend=response.start)
        return np.repeat(self.run_versions[first : last + 1], lengths)


def _check_lengths(sample: Trajectory) -> None:
    expected = (len(sample.response_token_ids),)
    for name in ("behavior_logprobs", "rollout_logprobs", "policy_versions"):
        shape = getattr(sample, name).shape
        if shape != expected:
            raise ValueError(
                f"sample {sample.sample_id!r}: {name} has shape {shape}; valid: {expected}, "
                "one per response token"
            )


def _texts(texts: Iterable[str]) -> tuple[str, ...]:
    """Equal ones become one object: those of a group have come as many."""
    return tuple(sys.intern(text) for text in texts)


def _end_to_end(parts: Iterable[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A new array of all values; raises OverflowError for one that the type does not hold."""
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _ends(parts: Iterable[Sequence[int]]) -> IntArray:
    return np.cumsum([len(part) for part in parts], dtype=np.int64)


def _span(ends: IntArray, index: int) -> slice:
    return slice(int(ends[index - 1]) if index else 0, int(ends[index]))


def _same_bits(one: FloatArray, other: FloatArray) -> bool:
    return np.array_equal(one.view(np.int32), other.view(np.int32))
