r"""Find the final answer in a response: the last "Answer:" line or the last \boxed{}."""

from __future__ import annotations

import re

INVALID = "[INVALID]"  # the prediction of a response without an answer line

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_BOX_OPENING = "\\boxed{"


def last_answer_line(text: str) -> str:
    r"""Return what follows the last "Answer:", or `INVALID`.

    The line break after the colon may come first: "Answer:\n34" gives "34".
    """
    answers: list[str] = _ANSWER_LINE.findall(text)
    return answers[-1] if answers else INVALID


def last_boxed(text: str) -> str | None:
    r"""Return the inside of the last \boxed{} of `text`, braces balanced.

    None where there is none, and where the last one is not closed: an earlier box does not count.
    """
    start = text.rfind(_BOX_OPENING)
    if start < 0:
        return None
    start += len(_BOX_OPENING)
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return text[start:index]
    return None
