"""Keys under which two spellings of a problem meet.

Three, because merging and dropping err in different directions. `layout_key` decides which problems
are the same one: it never lets an operator, digit or bracket go. `letters_key` and `ascii_key` let
everything go but letters and digits: they find more, and sometimes join what is different (x + 1
and x - 1), so they serve to suspect labels and evaluation overlap, never to merge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# Commands that change how a formula looks and not what it says.
_FONT_SIZE = (
    r"\\(?:left|right|displaystyle|textstyle|limits|qquad|quad|big|bigl|bigr|Big|Bigl|Bigr)"
    r"(?![a-zA-Z])"
)
_SPACING = r"\\[,;:!>]|\\ |~"
_MATH_MODE = r"\$|\\[()\[\]]"
_LAYOUT = re.compile(f"{_FONT_SIZE}|{_SPACING}|{_MATH_MODE}")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SINGLE_BRACES = re.compile(r"\{\s*([0-9A-Za-z])\s*\}")
# A digit on both sides keeps them: 1.5, (1,2), 2:1; a point keeps its place in .5 as well.
# Elsewhere they only part words.
_PUNCTUATION = re.compile(r"(?<!\d)(?:\.(?!\d)|[,;:])+|[.,;:]+(?!\s*\d)|[?。、\"]+|_{2,}")
_MARKDOWN = re.compile(r"\*\*|^\s*#+", re.MULTILINE)
# NFKC alone would make 10² and 102 one number, and 10₂.
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_LOWERED = re.compile("[₀-₉₊₋]+")
_QUOTES = str.maketrans("“”‘’`", "\"\"'''")
_SPACES = re.compile(r"\s+")
_LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])")
_NOT_ASCII = re.compile(r"[^a-z0-9]+")


def layout_key(problem: str) -> str:
    """Return the problem without its layout: spaces, `$`, sizes, ends of sentences.

    What is left tells x+1 from x-1, 1.5 from 15, 10² from 102 and a fraction 1/23 from 12/3.
    Capitals stay: A and a may be two points. Never used as text, only compared.
    """
    text = _LOWERED.sub(r"_{\g<0>}", _RAISED.sub(r"^{\g<0>}", problem))
    text = unicodedata.normalize("NFKC", text).translate(_QUOTES)
    text = _LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", _MARKDOWN.sub(" ", text)))
    text = _PUNCTUATION.sub(" ", text)
    text = _SINGLE_BRACES.sub(r"\1", text)
    return _LOOSE_SPACE.sub("", _SPACES.sub(" ", text).strip())


def letters_key(problem: str) -> str:
    """Return the letters and digits of every script, in lower case."""
    return "".join(character for character in problem.lower() if character.isalnum())


def ascii_key(problem: str) -> str:
    """Return a-z and 0-9 alone, in lower case.

    It meets reworded Chinese problems with the same formulas, and joins unlike ones with few
    formulas: published counts of DAPO-Math-17k use it.
    """
    return _NOT_ASCII.sub("", problem.lower())


# How labels are suspected, by name.
CONFLICT_KEYS: dict[str, Callable[[str], str]] = {"letters": letters_key, "ascii": ascii_key}
