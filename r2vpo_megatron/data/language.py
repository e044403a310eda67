"""The language of a problem, by its script."""

from __future__ import annotations

import re
from typing import Literal

Language = Literal["en", "zh", "other"]
LANGUAGES: tuple[str, ...] = ("en", "zh", "all")

_FORMULA = re.compile(
    r"\$\$.*?\$\$|\$[^$]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\(?:begin|end)\{\w*\*?\}|\\[A-Za-z]+",
    re.DOTALL,
)
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
# Shorter ones are mostly names of points and what is left of formulas.
_LATIN_WORD = re.compile("[A-Za-z]{4,}")
_OTHER_LETTER = re.compile(r"[^\W\d_A-Za-z\u00c0-\u024f\u0370-\u03ff\u3400-\u4dbf\u4e00-\u9fff]")
# Low: "en" is to hold no sentence of another language.
_MIN_SHARE = 0.05


def detect_language(problem: str) -> Language:
    """Return the language of a problem: formulas do not count, a stray character does not decide.

    "zh" where Chinese characters make up a twentieth or more of the letters in words, "other" where
    letters of a third script do, else "en": with formulas alone, too.
    """
    words = _FORMULA.sub(" ", problem)
    num_chinese = len(_CHINESE.findall(words))
    # Circled digits and the like are word characters, too.
    num_other = sum(character.isalpha() for character in _OTHER_LETTER.findall(words))
    num_latin = sum(len(word) for word in _LATIN_WORD.findall(words))
    total = num_chinese + num_other + num_latin
    if total == 0:
        return "zh" if _CHINESE.search(problem) else "en"
    # Japanese has Chinese characters as well, but kana with them.
    if num_other and num_other / total >= _MIN_SHARE:
        return "other"
    return "zh" if num_chinese / total >= _MIN_SHARE else "en"


def has_chinese(problem: str) -> bool:
    """Say whether there is a Chinese character anywhere."""
    return _CHINESE.search(problem) is not None
