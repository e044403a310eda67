"""What the training loop asks of an inference engine. Needs neither vLLM nor torch.

An engine is driven by its caller: it samples only inside `advance`, a slice of time after which it
gives back what was finished meanwhile. So weights are replaced between its steps, and a process
that does not come back from a slice is known to hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from r2vpo_megatron.records import FloatArray, Generation, GenerationRequest, IntArray
from r2vpo_megatron.rollout.sampling import SamplingSettings


class NonFiniteLogprob(ValueError):
    """A sampled token's log-prob is not a number: no other engine would do better."""


@dataclass(frozen=True)
class EngineReport:
    """What an engine did in one slice of time."""

    finished: list[Generation]
    num_unfinished: int  # requests that it still has, running or waiting in it
    num_tokens: int  # sampled in the slice
    busy_seconds: float  # of the slice, spent in steps
    memory_bytes: int  # resident memory of the engine's process


class VersionSpans:
    """Which version of the weights sampled which tokens of one response."""

    def __init__(self) -> None:
        self._ends: list[tuple[int, int]] = []  # (tokens before the end of the span, its version)

    def close(self, num_tokens: int, version: int) -> None:
        """Another version takes over after `num_tokens`, the last of which are `version`'s."""
        if num_tokens > (self._ends[-1][0] if self._ends else 0):
            self._ends.append((num_tokens, version))

    def stamp(self, num_tokens: int, version: int) -> IntArray:
        """The version of each of `num_tokens` tokens [R]; `version`'s are those after all spans."""
        versions = np.full(num_tokens, version, dtype=np.int64)
        start = 0
        for end, of_span in self._ends:
            versions[start:end] = of_span
            start = end
        return versions


def continuation_seed(seed: int, num_partial_tokens: int) -> int:
    """Seed with which a response goes on after tokens that it has; 32 bits, or `seed` itself.

    With the same seed a continuation would draw the random numbers of its beginning again.
    """
    if num_partial_tokens == 0:
        return seed
    sequence = np.random.SeedSequence([seed % 2**64, num_partial_tokens])
    return int(sequence.generate_state(1)[0])


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Refuse ids that the model has no embedding for; an engine may end by them, or not notice.

    Raises:
        ValueError: an id is negative or not below `vocab_size`.
    """
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name}: token id {token_id}: must be below {vocab_size}, from 0")


def check_request(
    request: GenerationRequest, sampling: SamplingSettings, max_model_len: int, vocab_size: int
) -> None:
    """Refuse what an engine cannot sample.

    Args:
        request: prompt and, of a continuation, the tokens that it has.
        sampling: its limit on the response counts those tokens.
        max_model_len: longest prompt plus response of the engine, in tokens.
        vocab_size: of the model.

    Raises:
        ValueError: the prompt is empty or leaves too little room for the response, the response
            has already ended, or a token id is not the model's.
    """
    name, num_prompt_tokens = f"request {request.sample_id}", len(request.prompt_token_ids)
    limit = sampling.max_response_tokens
    if num_prompt_tokens == 0:
        raise ValueError(f"{name}: the prompt is empty")
    if num_prompt_tokens + limit > max_model_len:
        raise ValueError(
            f"{name}: {num_prompt_tokens} prompt tokens + max_response_tokens={limit} "
            f"exceed max_model_len={max_model_len}"
        )
    if len(request.partial_token_ids) >= limit:
        raise ValueError(
            f"{name}: has {len(request.partial_token_ids)} partial tokens: must be fewer than "
            f"max_response_tokens={limit}"
        )
    if stops := set(sampling.stop_token_ids).intersection(request.partial_token_ids):
        raise ValueError(f"{name}: its partial tokens hold the stop token {min(stops)}")
    check_token_ids(name, (*request.prompt_token_ids, *request.partial_token_ids), vocab_size)


class RolloutEngine(Protocol):
    """An inference engine that serves one policy at a time."""

    @property
    def policy_version(self) -> int:
        """Version of the last complete set of weights."""
        ...

    def add_requests(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> None:
        """Queue requests, one response each, behind those that are there.

        Where none are there, the prefix cache is emptied first: then the responses are a function
        of the weights and the requests alone.

        Args:
            requests: prompts with a seed each; the same seed and prompt give the same response
                up to the rounding differences of another batch. Sample ids must not be queued yet.
            sampling: the distribution to draw from.

        Raises:
            ValueError: a prompt is empty, leaves too little room for the response or has an id
                outside the vocabulary, a partial response has already ended, or a sample id is
                queued already. No request of the call is queued then.
        """
        ...

    def advance(self, seconds: float) -> EngineReport:
        """Sample for about so long, or until no request is left.

        Each finished generation has the sampled tokens (without a request's partial ones),
        the log-prob of each under the distribution it was drawn from, and the version that drew it.
        Requests that a weight push found under way go on with the new weights.

        Args:
            seconds: length of the slice; the step under way at its end is finished, and there is
                at least one.

        Raises:
            WeightUpdateError: a weight push is incomplete.
            RuntimeError: a log-prob is not finite.
        """
        ...

    def abort_requests(self) -> list[Generation]:
        """Take all requests back; what was sampled of each, `finish_reason` "abort".

        A request that was not begun comes back without tokens. One that was finished since the
        last report (during `score`) comes along with its own reason.

        Raises:
            RuntimeError: a log-prob is not finite.
        """
        ...

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingSettings
    ) -> list[Generation]:
        """Sample one response per request, to the end, in the order of the requests.

        Raises:
            WeightUpdateError: a weight push is incomplete.
            ValueError: as `add_requests`; or other requests are queued.
            RuntimeError: a log-prob is not finite. No request is left queued.
        """
        ...

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probs of given sequences at temperature 1; queued requests go on meanwhile.

        Those that are finished meanwhile come with the next report.

        Returns:
            One array [len - 1] per sequence: the log-probs of its tokens but the first.

        Raises:
            WeightUpdateError: a weight push is incomplete.
            ValueError: a sequence is empty or too long, or has an id outside the vocabulary.
            RuntimeError: a log-prob is not finite.
        """
        ...

    def shutdown(self) -> None:
        """Free the engine's processes and memory. The engine cannot be used afterwards."""
        ...
