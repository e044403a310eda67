"""One sampled and judged response of an evaluation, as it is kept and counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResponseRecord:
    """A response to one problem of a benchmark.

    Attributes:
        problem_id: unique within the benchmark.
        sample_index: 0 to samples - 1.
        seed: of its sampling.
        num_tokens: length of the response, its stop token included.
        finish_reason: "stop", or "length" where the limit cut it off.
        acc: judged right.
        pred: the answer that was judged; None where there was none.
        parsed: an answer was found at all.
        failure: why the grader gave up ("timeout", "memory", "crash", "too_long"), else "".
        text: the decoded response.
    """

    problem_id: str
    sample_index: int
    seed: int
    num_tokens: int
    finish_reason: str
    acc: bool
    pred: str | None
    parsed: bool
    failure: str
    text: str
