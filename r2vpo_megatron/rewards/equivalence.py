"""Whether two answers are the same: by spelling where that decides, else by isolated workers."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from fractions import Fraction

from r2vpo_megatron.rewards.result import Equivalence
from r2vpo_megatron.rewards.spelling import (
    MAX_ANSWER_CHARACTERS,
    is_integer,
    is_word,
    number_in_base,
    plain_value,
    remove_name,
    spell_answer,
)
from r2vpo_megatron.rewards.verdict_cache import VerdictCache
from r2vpo_megatron.rewards.worker_pool import WorkerPool

_MAX_SIDES = 4  # of "a = b = c", each of which has to be right
_UNKNOWN = re.compile(r"(?<![A-Za-z\\])[A-Za-z]+")
_ARTICLES = ("a ", "an ", "the ")


class EquivalenceJudge:
    """Verdicts on (prediction, gold) pairs, with a cache in front of a pool of workers.

    Usable from several threads. Starts no process before a pair needs one.

    Args:
        pool: Of its own where none is given.
        cache: Likewise.
    """

    def __init__(self, pool: WorkerPool | None = None, cache: VerdictCache | None = None) -> None:
        self.pool = WorkerPool() if pool is None else pool
        self.cache = VerdictCache() if cache is None else cache

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Equivalence]:
        """One verdict a pair, in order; keeps all workers busy.

        Args:
            pairs: (prediction, gold) as written, a prediction being an extracted answer.
        """
        plans = [_plan(prediction, gold) for prediction, gold in pairs]
        asked = {
            question: self.cache.get(question)
            for plan in plans
            if isinstance(plan, list)
            for question in plan
        }
        unknown = [question for question, verdict in asked.items() if verdict is None]
        found = {question: verdict for question, verdict in asked.items() if verdict is not None}
        for question, verdict in zip(unknown, self.pool.judge(unknown), strict=True):
            self.cache.put(question, verdict)
            found[question] = verdict
        return [
            plan if isinstance(plan, Equivalence) else _all_equal([found[each] for each in plan])
            for plan in plans
        ]


def are_equivalent(prediction: str, gold: str) -> Equivalence:
    r"""Whether an extracted answer denotes the same as the gold answer.

    >>> are_equivalent(r"\\frac{2}{4}", "0.5").equal
    True
    """
    return shared_judge().judge([(prediction, gold)])[0]


def shared_judge() -> EquivalenceJudge:
    """The judge of this process; a fork gets one of its own."""
    return _judge_of_process(os.getpid())


@functools.cache
def _judge_of_process(process_id: int) -> EquivalenceJudge:
    return EquivalenceJudge()


def decide_by_spelling(prediction: str, gold: str) -> bool | None:
    """The verdict where canonical spellings alone give it; None where they do not."""
    if not prediction or not gold:
        return False
    if prediction == gold:
        return True
    if is_integer(prediction) and is_integer(gold):
        return False
    if number_in_base(prediction) is not None:
        return False  # 40_9 is neither 40 nor 41_9
    based = number_in_base(gold)
    if based is not None:
        return prediction == based[0]  # where the question names the base, 4210 stands for 4210_5
    if "," in prediction and "," in gold and ("dots" in prediction) != ("dots" in gold):
        return False  # the grammar leaves the dots out of a list
    if is_word(prediction) or is_word(gold):
        return _word(prediction) == _word(gold)
    found, expected = plain_value(prediction), plain_value(gold)
    if found is None or expected is None:
        return None
    return _same_value(*found, *expected)


def _plan(prediction: str, gold: str) -> Equivalence | list[tuple[str, str]]:
    """A verdict, or the questions to the workers that have to be answered with yes."""
    if max(len(prediction), len(gold)) > MAX_ANSWER_CHARACTERS:
        return Equivalence(False, "too_long")
    named_prediction, named_gold = spell_answer(prediction), spell_answer(gold)
    found, expected = remove_name(named_prediction), remove_name(named_gold)
    decided = decide_by_spelling(found, expected)
    if decided is not None:
        return Equivalence(decided)
    if "=" in found and "=" in named_gold:
        return [(named_prediction, named_gold)]  # two equations
    if "=" in found and not any(sign in found for sign in "<>,;"):
        return _plan_sides(found, expected)
    return [(found, expected)]


def _plan_sides(prediction: str, gold: str) -> Equivalence | list[tuple[str, str]]:
    """A chain "m+n = 2+3 = 5" is right where each side but the name is: "5 = 34" is not for 34.

    What is asked for may stand first, as an expression in unknowns, where the gold answer has none.
    """
    first, *others = (side.strip() for side in prediction.split("="))
    is_named = remove_name(f"{first}={others[0]}") != f"{first}={others[0]}" or (
        _UNKNOWN.search(first) is not None and not _UNKNOWN.search(gold)
    )
    sides = others if is_named else [first, *others]
    if len(sides) > _MAX_SIDES:
        return Equivalence(False)
    questions = []
    for side in sides:
        decided = decide_by_spelling(side, gold)
        if decided is False:
            return Equivalence(False)
        if decided is None:
            questions.append((side, gold))
    return questions or Equivalence(True)


def _all_equal(verdicts: Sequence[Equivalence]) -> Equivalence:
    return next((verdict for verdict in verdicts if not verdict.equal), Equivalence(True))


def _word(answer: str) -> str:
    answer = answer.casefold()
    for article in _ARTICLES:
        answer = answer.removeprefix(article)
    return answer.replace(" ", "")


def _same_value(
    found: Fraction, found_percent: bool, expected: Fraction, expected_percent: bool
) -> bool:
    """50% is right for 50 and for 1/2: which one is meant is the question's to say."""
    if found_percent == expected_percent:
        return found == expected
    if found_percent:
        return expected in (found, found / 100)
    return found in (expected, expected / 100)
