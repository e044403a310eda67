r"""The math_dapo verdict: +1 for a right final answer, -1 for all else.

Published DAPO-style results use the `minerva` mode, so its verdicts are reproduced exactly, the
known false ones too: `**Answer:** 34`, `34.0`, `034`, `\(34\)` and `1/2` against `\frac{1}{2}`
are rejected, and `Answer: 5=34` is accepted for 34.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from r2vpo_megatron.rewards.extraction import INVALID, last_answer_line, last_boxed
from r2vpo_megatron.rewards.normalization import normalize_answer

# Characters, not tokens. The answer must stand at the end of the response.
ANSWER_WINDOW_CHARACTERS = 300
BOX_WINDOW_CHARACTERS = 100


class Verdict(TypedDict):
    """`score` +1.0 or -1.0; `acc` its sign; `pred` the answer that was compared."""

    score: float
    acc: bool
    pred: str | None


def _minerva(tail: str, ground_truth: str) -> tuple[bool, str | None]:
    prediction = normalize_answer(last_answer_line(tail))
    return prediction == normalize_answer(ground_truth), prediction


def _strict_box(tail: str, ground_truth: str) -> tuple[bool, str | None]:
    prediction = last_boxed(tail[-BOX_WINDOW_CHARACTERS:])
    return prediction == ground_truth, prediction


def _boxed_fallback(tail: str, ground_truth: str) -> tuple[bool, str | None]:
    if last_answer_line(tail) == INVALID:
        correct, prediction = _strict_box(tail, ground_truth)
        if prediction is not None:
            return correct, prediction
    return _minerva(tail, ground_truth)


MODES: dict[str, Callable[[str, str], tuple[bool, str | None]]] = {
    "minerva": _minerva,
    "boxed_fallback": _boxed_fallback,
    "strict_box": _strict_box,
}


def compute_score(response: str, ground_truth: str, mode: str = "minerva") -> Verdict:
    r"""Judge the final answer of a response.

    Args:
        response: Decoded response, special tokens already skipped.
        ground_truth: The reference answer.
        mode: `minerva`: last "Answer:" line, both sides normalised. `boxed_fallback`: the same,
            but a response without such a line may have a \boxed{}, compared raw. `strict_box`:
            the \boxed{} alone, compared raw.

    Raises:
        ValueError: `mode` is not one of these.
    """
    judge = MODES.get(mode)
    if judge is None:
        raise ValueError(f"math_dapo mode {mode!r} is unknown; valid: {', '.join(MODES)}")
    correct, prediction = judge(response[-ANSWER_WINDOW_CHARACTERS:], ground_truth)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": prediction}
