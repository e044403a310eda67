r"""The math_dapo verdict: +1 for a right final answer, -1 for all else.

`symbolic` judges what the answer means. The other modes compare strings. Published DAPO-style
results use `minerva`, so its verdicts are reproduced exactly, the known false ones too:
`**Answer:** 34`, `34.0`, `034`, `\(34\)` and `1/2` against `\frac{1}{2}` are rejected, and
`Answer: 5=34` is accepted for 34.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from r2vpo_megatron.records import Prompt
from r2vpo_megatron.rewards.equivalence import EquivalenceJudge, shared_judge
from r2vpo_megatron.rewards.extraction import (
    INVALID,
    canonical_answer,
    final_answer,
    last_answer_line,
    last_boxed,
)
from r2vpo_megatron.rewards.normalization import normalize_answer
from r2vpo_megatron.rewards.result import Equivalence, RewardResult

# Characters, not tokens. The answer must stand at the end of the response.
ANSWER_WINDOW_CHARACTERS = 300
BOX_WINDOW_CHARACTERS = 100
SYMBOLIC = "symbolic"


class Verdict(TypedDict):
    """`score` +1.0 or -1.0; `acc` its sign; `pred` the answer that was compared."""

    score: float
    acc: bool
    pred: str | None


def _minerva(response: str, ground_truth: str) -> tuple[bool, str | None]:
    prediction = normalize_answer(last_answer_line(response[-ANSWER_WINDOW_CHARACTERS:]))
    return prediction == normalize_answer(ground_truth), prediction


def _strict_box(response: str, ground_truth: str) -> tuple[bool, str | None]:
    prediction = last_boxed(response[-BOX_WINDOW_CHARACTERS:])
    return prediction == ground_truth, prediction


def _boxed_fallback(response: str, ground_truth: str) -> tuple[bool, str | None]:
    if last_answer_line(response[-ANSWER_WINDOW_CHARACTERS:]) == INVALID:
        correct, prediction = _strict_box(response, ground_truth)
        if prediction is not None:
            return correct, prediction
    return _minerva(response, ground_truth)


# Modes that compare strings: (response, ground truth) -> (right, prediction).
STRING_MODES: dict[str, Callable[[str, str], tuple[bool, str | None]]] = {
    "minerva": _minerva,
    "boxed_fallback": _boxed_fallback,
    "strict_box": _strict_box,
}
MODES = (SYMBOLIC, *STRING_MODES)
# The forms of an answer that a mode reads; `preflight` compares them with what prompts ask for.
ANSWER_FORMS: dict[str, tuple[str, ...]] = {
    SYMBOLIC: ("answer_line", "boxed"),
    "minerva": ("answer_line",),
    "boxed_fallback": ("answer_line", "boxed"),
    "strict_box": ("boxed",),
}


@dataclass(frozen=True)
class MathDapoReward:
    """The reward of one mode; callable like any reward, and for whole batches.

    Args:
        mode: See `compute_score`.
        judge: For `symbolic`; None is the one that all of this process share.
    """

    mode: str = SYMBOLIC
    judge: EquivalenceJudge | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"math_dapo mode {self.mode!r} is unknown; valid: {', '.join(MODES)}")

    @property
    def answer_forms(self) -> tuple[str, ...]:
        """Forms of an answer that this mode reads."""
        return ANSWER_FORMS[self.mode]

    def __call__(self, prompt: Prompt, response_text: str) -> RewardResult:
        """Judge one response."""
        return self.score_batch([prompt], [response_text])[0]

    def score_batch(
        self, prompts: Sequence[Prompt], response_texts: Sequence[str]
    ) -> list[RewardResult]:
        """Judge many responses, in their order; `symbolic` keeps all workers busy."""
        golds = [prompt.ground_truth for prompt in prompts]
        return self.judge_texts(response_texts, golds)

    def judge_texts(self, responses: Sequence[str], golds: Sequence[str]) -> list[RewardResult]:
        """As `score_batch`, of responses and their reference answers."""
        if self.mode == SYMBOLIC:
            return self._judge_symbolically(responses, golds)
        results = []
        for response, gold in zip(responses, golds, strict=True):
            correct, prediction = STRING_MODES[self.mode](response, gold)
            parsed = prediction not in (None, INVALID)
            results.append(RewardResult(_score(correct), correct, prediction, parsed))
        return results

    def _judge_symbolically(
        self, responses: Sequence[str], golds: Sequence[str]
    ) -> list[RewardResult]:
        answers = [final_answer(response) for response in responses]
        pairs = [
            (answer, gold)
            for answer, gold in zip(answers, golds, strict=True)
            if answer is not None
        ]
        verdicts = iter((self.judge or shared_judge()).judge(pairs))
        unparsed = RewardResult(_score(False), False, None, False)
        return [
            unparsed if answer is None else _to_result(answer, next(verdicts)) for answer in answers
        ]


def compute_score(response: str, ground_truth: str, mode: str = SYMBOLIC) -> Verdict:
    r"""Judge the final answer of a response.

    Args:
        response: Decoded response, special tokens already skipped.
        ground_truth: The reference answer.
        mode: `symbolic`: last "Answer:" line or \boxed{}, whichever is later, compared by what it
            means. `minerva`: last "Answer:" line, both sides normalised. `boxed_fallback`: the
            same, but a response without such a line may have a \boxed{}, compared raw.
            `strict_box`: the \boxed{} alone, compared raw.

    Raises:
        ValueError: `mode` is not one of these.
    """
    result = MathDapoReward(mode).judge_texts([response], [ground_truth])[0]
    return {"score": result.score, "acc": result.acc, "pred": result.pred}


def _score(correct: bool) -> float:
    return 1.0 if correct else -1.0


def _to_result(answer: str, verdict: Equivalence) -> RewardResult:
    return RewardResult(
        score=_score(verdict.equal),
        acc=verdict.equal,
        pred=canonical_answer(answer),
        parsed=True,
        failure=verdict.failure,
    )
