r"""Find the final answer in a response: the last "Answer:" line or the last \boxed{}."""

from __future__ import annotations

import re

from r2vpo_megatron.rewards.spelling import canonical_answer, closing_brace

__all__ = ["INVALID", "canonical_answer", "final_answer", "last_answer_line", "last_boxed"]

INVALID = "[INVALID]"  # the prediction of a response without an answer line
# Characters from the end of the response that `final_answer` looks at. An answer that is followed
# by more than this was not meant to be the end.
FINAL_WINDOW_CHARACTERS = 1000
# What ends the thoughts of a reasoning model; the second one is openPangu's.
END_OF_THOUGHT_MARKS = ("</think>", "[unused17]")

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
_BOX_OPENING = "\\boxed{"

_ANSWER_MARK = re.compile(
    r"(?:answer|答案)[ \t*_]{0,8}[:：][ \t*_}]{0,8}"
    r"|answer[ \t]{1,4}is[ \t]{0,4}[:：]|final[ \t]{1,4}answer[ \t]{1,4}is[ \t]{0,4}[:：]?"
    r"|答案[是为][ \t]{0,4}[:：]?",
    re.IGNORECASE,
)
_BOX_MARK = re.compile(r"\\boxed[ \t]{0,4}(\{|-?[0-9A-Za-z]{1,40}(?:[./][0-9]{1,40})?)")
# How examples of the Minerva prompt end, which base models repeat.
_MINERVA_ENDING = re.compile(r"\.?[ \t]{1,4}I hope it is correct\.?[ \t]{0,8}$", re.MULTILINE)
_DISPLAY = {"$$": "$$", "\\[": "\\]"}
_SPECIAL_TOKENS_AT_END = re.compile(
    r"(?:[ \n]{0,8}(?:<[|｜][^<>|｜\n]{1,40}[|｜]>|</s>|\[unused\d{1,3}\])){1,8}[ \n]{0,8}$"
)


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
    end = closing_brace(text, start)
    return text[start:end] if end >= 0 else None


def final_answer(response: str) -> str | None:
    r"""The answer that a response ends in, as written: that of `symbolic` mode.

    Looks at the last `FINAL_WINDOW_CHARACTERS` behind the thoughts and takes the last answer
    line or \boxed{} there, whichever comes later. A box on the answer line is the answer. Several
    boxes on one line are one answer of several parts, so no guess among them is right.

    Returns:
        None where there is no answer.
    """
    window = behind_thoughts(response)[-FINAL_WINDOW_CHARACTERS:]
    window = _SPECIAL_TOKENS_AT_END.sub("", window)
    boxes = _find_boxes(window)
    marks = list(_ANSWER_MARK.finditer(window))
    line_start, line_text = (
        (marks[-1].start(), _read_answer(window, marks[-1].end())) if marks else (-1, "")
    )
    if boxes and (boxes[-1][0] >= line_start or not line_text):
        parts = _boxes_of_last_line(window, boxes)
        return ", ".join(dict.fromkeys(parts)) or None
    return line_text or None


def behind_thoughts(response: str) -> str:
    """What follows the end of thought; the thoughts where nothing follows or none have an end."""
    for mark in END_OF_THOUGHT_MARKS:
        thoughts, found, final = response.rpartition(mark)
        if found:
            response = final if final.strip() else thoughts
    return response


def _find_boxes(window: str) -> list[tuple[int, int, str]]:
    """Start, end and inside of the outermost closed boxes; empty where the last is not closed."""
    boxes: list[tuple[int, int, str]] = []
    position = 0
    while match := _BOX_MARK.search(window, position):
        if match[1] != "{":  # \boxed 5
            boxes.append((match.start(), match.end(), match[1]))
            position = match.end()
            continue
        end = closing_brace(window, match.end())
        if end < 0:
            return []
        boxes.append((match.start(), end + 1, window[match.end() : end].strip()))
        position = end + 1
    return boxes


def _boxes_of_last_line(window: str, boxes: list[tuple[int, int, str]]) -> list[str]:
    """The insides of the last box and of those before it on the same line."""
    parts = [boxes[-1][2]]
    for earlier, later in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        if "\n" in window[earlier[1] : later[0]]:
            break
        parts.insert(0, earlier[2])
    return [part for part in parts if part]


def _read_answer(window: str, start: int) -> str:
    """The rest of the line behind an answer mark, or the next line where that is empty."""
    rest = window[start:].lstrip()
    opening = rest.lstrip("*_ ")[:2]
    if opening in _DISPLAY:
        inside, end, _ = rest.lstrip("*_ ")[2:].partition(_DISPLAY[opening])
        if end:
            return inside.strip()
    line = _MINERVA_ENDING.sub("", rest.partition("\n")[0]).strip()
    # \text{Answer: 34}
    return line[:-1] if line.endswith("}") and line.count("}") > line.count("{") else line
