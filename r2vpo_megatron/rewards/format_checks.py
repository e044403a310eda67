r"""Checks of a response's form, apart from whether its answer is right. Each takes linear time.

A recipe names them; a response that is not in order may be punished and is always counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from r2vpo_megatron.rewards.extraction import END_OF_THOUGHT_MARKS, behind_thoughts
from r2vpo_megatron.rewards.spelling import closing_brace

# A response that ends in so many characters which only repeat a shorter piece is in a loop.
LOOP_CHARACTERS = 400
MIN_LOOP_REPEATS = 4

_ANSWER_LINE = re.compile(r"^[ \t>#*_]{0,8}(?:Final )?Answer[*_]{0,3}[ \t]?[:：](.*)$", re.I | re.M)
_BOX = re.compile(r"\\boxed[ \t]?\{")


def has_one_answer_line(response: str) -> bool:
    """The part behind the thoughts has one line "Answer: ..." and it is the last line."""
    lines = behind_thoughts(response).rstrip().split("\n")
    is_answer = [_ANSWER_LINE.match(line) for line in lines]
    match = is_answer[-1]
    num_lines = sum(found is not None for found in is_answer)
    return match is not None and num_lines == 1 and bool(match[1].strip("*_ \t"))


def has_one_box(response: str) -> bool:
    r"""The part behind the thoughts has one \boxed{}, closed and not empty."""
    part = behind_thoughts(response)
    boxes = list(_BOX.finditer(part))
    if len(boxes) != 1:
        return False
    start = boxes[0].end()
    end = closing_brace(part, start)
    return end >= 0 and bool(part[start:end].strip())


def has_closed_thought(response: str) -> bool:
    """The thoughts are closed once, and an answer to the user follows."""
    ends = [mark for mark in END_OF_THOUGHT_MARKS if mark in response]
    if len(ends) != 1 or response.count(ends[0]) != 1:
        return False
    return bool(response.partition(ends[0])[2].strip())


def has_no_loop(response: str) -> bool:
    """The end does not repeat one piece of text again and again, as a degenerate policy does."""
    tail = response.rstrip()[-LOOP_CHARACTERS:]
    if len(tail) < LOOP_CHARACTERS:
        return True
    # The shortest period of the reversed tail, by its longest border (Knuth, Morris, Pratt).
    borders = [0] * len(tail)
    border = 0
    for index in range(1, len(tail)):
        while border and tail[index] != tail[border]:
            border = borders[border - 1]
        border += tail[index] == tail[border]
        borders[index] = border
    return (len(tail) - borders[-1]) * MIN_LOOP_REPEATS > len(tail)


# By name; True says that the response is in order.
FORMAT_CHECKS: dict[str, Callable[[str], bool]] = {
    "answer_line": has_one_answer_line,
    "boxed": has_one_box,
    "think_closed": has_closed_thought,
    "no_repetition": has_no_loop,
}
