r"""One spelling for the many ways to write an answer, and the exact value of plain numbers.

Runs in the trainer's process on text that a model wrote, so nothing here evaluates anything and
every pattern is linear: no nested or adjacent repetition of the same characters. Longer texts than
`MAX_ANSWER_CHARACTERS` are not touched at all.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

MAX_ANSWER_CHARACTERS = 500  # the longest gold answer of MATH-500 has 159
_MAX_UNWRAPS = 16

_LOOKALIKES = str.maketrans(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    | dict.fromkeys([*range(0x20), 0x7F, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF], None)
    | dict.fromkeys(map(ord, "\t\n\r\u00a0\u2002\u2003\u2009\u202f\u3000"), " ")
    | {ord(sign): "-" for sign in "\u2010\u2011\u2012\u2013\u2014\u2212"}
    | {
        ord(sign): text
        for sign, text in {
            "。": ".",
            "、": ",",
            "×": "\\times ",
            "·": "\\cdot ",
            "÷": "/",
            "⁄": "/",
            "°": "^\\circ ",
            "π": "\\pi ",
            "∞": "\\infty ",
            "√": "\\sqrt ",
            "±": "\\pm ",
            "≤": "\\leq ",
            "≥": "\\geq ",
            "≠": "\\neq ",
            "∪": "\\cup ",
            "∩": "\\cap ",
            "∈": "\\in ",
            "½": "\\frac{1}{2}",
            "⅓": "\\frac{1}{3}",
            "⅔": "\\frac{2}{3}",
            "¼": "\\frac{1}{4}",
            "¾": "\\frac{3}{4}",
        }.items()
    }
)

_SUPERSCRIPT = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]{1,60}")
_SUPERSCRIPT_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
# (pattern, replacement) in this order. `_` stands for a space that has to stay.
_TEX_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\\$|\$|€|£|¥", ""),
        (r"(?<!\\)\\[()\[\]]", " "),
        (r"\\(?:left|right|[bB]ig[lrg]?|[bB]igg[lr]?)(?![A-Za-z])\.?", ""),
        (r"\\(?:displaystyle|textstyle|limits|mathstrut)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (
            r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|operatorname|bold"
            r"symbol)\*?(?![A-Za-z])",
            r"\\text",
        ),
        (r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!|\{\\,\}) {0,4}(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[,;:!> ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\^ ?\{ ?\\circ ?\}|\^ ?\\circ(?![A-Za-z])|\\degree(?![A-Za-z])", " "),
        (r"\\%", "%"),
        (r"\\times(?![A-Za-z])|\\ast(?![A-Za-z])", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\\le(?![A-Za-z])|\\leqslant(?![A-Za-z])|<=", r"\\leq "),
        (r"\\ge(?![A-Za-z])|\\geqslant(?![A-Za-z])|>=", r"\\geq "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (
            r"(?<![A-Za-z\\])((?:arc)?(?:sin|cos|tan)|cot|sec|csc|ln|log|exp)"
            r"(?=[ (_^]{1,2}[0-9A-Za-z\\({])",
            r"\\\1",
        ),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r" (?:or|and) (?=[A-Za-z] ?=)|\\text ?\{ ?(?:or|and) ?\}(?= ?[A-Za-z] ?=)", ","),
        (r"(?<![A-Za-z\\])(?:inf|infinity|oo)(?![A-Za-z])", r"\\infty "),
        (r"\+ ?\\infty", r"\\infty"),
        (r"(?<![A-Za-z\\])sqrt ?\(([^()]{1,100})\)", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"\\sqrt ?\(([^()]{1,100})\)", r"\\sqrt{\1}"),
        (r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}"),
        (r"\\frac ?([0-9A-Za-z]) ?([0-9A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9A-Za-z]) ?\{", r"\\frac{\1}{"),
        (r"(\\frac ?\{[^{}]{1,100}\}) ?([0-9A-Za-z])", r"\1{\2}"),
        (r"\^ ?\(([^()]{1,100})\)", r"^{\1}"),
        (r"\^ ?(-?[0-9]{2,})(?![0-9])", r"^{\1}"),
        (r"\^ ?(-[0-9A-Za-z])", r"^{\1}"),
        (r"([\^_]) ?\{ ?([0-9A-Za-z]) ?\}", r"\1\2"),
    )
)
_POWER = r"(?: ?\^ ?\{?\d\}?)?$"
_ENDS_OF_QUANTITIES = frozenset("0123456789}.)]%!")
_UNIT_IN_TEXT = re.compile(r" {0,4}\\text ?\{([^{}0-9,;]{0,100})\}" + _POWER)
_UNIT_IN_WORDS = re.compile(r" {1,4}([A-Za-z][A-Za-z./ ]{0,60})" + _POWER)
_UNIT_AT_NUMBER = re.compile(r"(?<=\d)([a-z]{2,7}|[个人元种度天次米厘克]{1,2})" + _POWER)
_MAX_UNITS = 3  # "15 cm^2 (approx.)" has one, a careless gold answer two
# Behind a number or bracket every word is a unit, but for these, which are a part of the answer.
_MEANINGFUL_WORDS = frozenset(
    """or and not if mod to in base more less least most about is plus minus times over squared
    cubed factorial dozen hundred thousand million billion trillion
    pi sin cos tan cot sec csc log ln exp sqrt e i n x y z
    """.split()  # noqa: SIM905
)
# Behind a letter, and grown together with a number, only these are.
_UNIT_WORDS = frozenset(
    """mm cm m km inch inches ft foot feet yard yards mile miles unit units square sq cubic cu
    degree degrees deg dollar dollars cent cents second seconds sec minute minutes min hour hours
    day days week weeks month months year years mg g gram grams kg lb lbs pound pounds ml l liter
    liters mph kph meter meters metre metres per percent 个 人 元 种 度 天 次 米 厘米 克 千克
    """.split()  # noqa: SIM905
)
_TEXT = re.compile(r"\\text ?\{([^{}]{0,200})\}")
# "(12,102)" is a point or an interval, not a number.
_THOUSANDS = re.compile(r"(?<![\d.,(\[])(?<!\\\{)\d{1,3}(?:,\d{3}){1,12}(?![\d,)\]])(?!\\\})")
_LIST_COMMA = re.compile(r"(?<=\d) ?, {1,8}(?=\d{3}(?!\d))")
_NUMBER = re.compile(r"(?<![\d.])(\d*)(\.\d*)?(?![\d.])")
_SPACE = re.compile(r" {1,}")
_NAME = re.compile(
    r"^(?:\\?[A-Za-z]{1,12}|\\angle ?[A-Z]{1,3}|\\text ?\{[^{}=]{1,40}\}|[A-Za-z ]{1,40})"
    r"(?:_(?:\w|\{[^{}]{1,10}\})){0,2}(?:\([A-Za-z, ]{1,20}\))?'? ?"
    r"(?:=|\\in(?![A-Za-z])|\\approx) ?(?=[^=<>])"
)
_CHOICE = re.compile(r"^\(([A-Za-z])\)$")
_WRAPPERS = tuple(
    (start, end)
    for start, end in (
        ("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'"),
        ("“", "”"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"),
    )
)  # fmt: skip
_WRAPPING_COMMANDS = ("\\boxed", "\\fbox", "\\text", "\\mathbf", "\\textbf", "\\mathrm", "\\bf", "")


def canonical_answer(text: str) -> str:
    r"""One spelling for answers that differ in the way of writing alone.

    Removes mark-up, units, degrees, currency, thousands commas, leading and trailing zeros and the
    name in "x = 5"; unifies minus signs, digits, fractions, roots and spaces. Evaluates nothing:
    "1/2" and "0.5" stay different.

    Args:
        text: An answer as written. Longer than `MAX_ANSWER_CHARACTERS` it comes back as it is.
    """
    return text if len(text) > MAX_ANSWER_CHARACTERS else remove_name(spell_answer(text))


@functools.lru_cache(maxsize=1 << 14)
def spell_answer(text: str) -> str:
    """As `canonical_answer`, but the name in "x = 5" stays. Only for texts within the limit."""
    if text.isascii() and text.isdigit():
        return text.lstrip("0") or "0"
    answer = _unwrap(_SUPERSCRIPT.sub(_raise, text).translate(_LOOKALIKES))
    answer = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer)
    for pattern, replacement in _TEX_REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = _remove_unit(answer.strip())
    answer = _TEXT.sub(r" \1 ", answer)
    answer = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), answer)
    answer = _NUMBER.sub(_plain_number, answer)
    answer = _remove_spaces(answer)
    answer = _CHOICE.sub(r"\1", _unwrap(answer))
    return answer[1:] if answer.startswith("+") else answer


def _raise(match: re.Match[str]) -> str:
    return "^{" + match[0].translate(_SUPERSCRIPT_DIGITS) + "}"


def _unwrap(answer: str) -> str:
    """Remove what stands around the whole answer: mark-up, boxes, quotes, the full stop."""
    for _ in range(_MAX_UNWRAPS):
        before = answer
        answer = answer.strip(" *_").lstrip(":").rstrip(".,;").strip(" *_")
        for start, end in _WRAPPERS:
            inside = answer[len(start) : -len(end)]
            if (
                len(answer) > len(start) + len(end)
                and answer.startswith(start)
                and answer.endswith(end)
                and start not in inside
            ):
                answer = inside
        if answer.endswith("}"):
            answer = _unwrap_command(answer)
        if answer == before:
            break
    return answer


def _unwrap_command(answer: str) -> str:
    for command in _WRAPPING_COMMANDS:
        opening = command + "{"
        if answer.startswith(opening):
            start = len(opening)
            return answer[start:-1] if closing_brace(answer, start) == len(answer) - 1 else answer
    return answer


def closing_brace(text: str, start: int) -> int:
    """Where the brace closes that was opened before `start`; -1 where it never does."""
    depth = 1
    for index in range(start, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
    return -1


def _remove_unit(answer: str) -> str:
    """Drop the units behind an answer, unless their words change what it says."""
    for _ in range(_MAX_UNITS):
        for pattern in (_UNIT_IN_TEXT, _UNIT_IN_WORDS, _UNIT_AT_NUMBER):
            match = pattern.search(answer)
            if match and match.start() > 0 and _is_unit(answer[: match.start()], match):
                answer = answer[: match.start()].rstrip()
                break
        else:
            break
    return answer


def _is_unit(before: str, match: re.Match[str]) -> bool:
    words = set(re.split(r"[/. ]", match[1].lower())) - {""}
    if match.re is _UNIT_IN_WORDS and len(match[1].strip()) == 1 and not words <= _UNIT_WORDS:
        return False  # "2 k" is a product
    if match.re is not _UNIT_AT_NUMBER and before.rstrip()[-1:] in _ENDS_OF_QUANTITIES:
        return not words & _MEANINGFUL_WORDS
    return bool(words) and words <= _UNIT_WORDS


def _plain_number(match: re.Match[str]) -> str:
    whole, fraction = match[1], match[2] or ""
    if not whole and len(fraction) < 2:
        return match[0]
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + ("" if fraction == "." else fraction)


def _remove_spaces(answer: str) -> str:
    r"""Keep a space only where two words or a command and a letter would grow together."""
    if "(" not in answer and "[" not in answer:
        answer = _LIST_COMMA.sub(",\x00", answer)  # "100, 200" must not become 100,200
    kept: list[str] = []
    for part in _SPACE.split(answer):
        if kept and part and _grow_together(kept[-1], part):
            kept.append(" ")
        kept.append(part)
    return "".join(kept).replace("\x00", " ").strip()


def _grow_together(left: str, right: str) -> bool:
    if not left or not right[0].isalnum():
        return False
    if left[-1].isalpha() == right[0].isalpha():
        return left[-1].isalnum()
    return any(len(part) > 1 and part.isalpha() for part in (left, right)) and left[-1].isalnum()


def remove_name(answer: str) -> str:
    """Drop "x =" where it is the only relation; "5 = 34" has no name and stays."""
    match = _NAME.match(answer)
    if match is None or "=" in answer[match.end() :]:
        return answer
    value = answer[match.end() :].strip()
    return value[1:] if value.startswith("+") else value


_DIGITS = r"\d{1,60}"
_VALUE = re.compile(
    rf"(?P<sign>-?)(?:(?P<decimal>{_DIGITS}(?:\.{_DIGITS})?)(?:[eE](?P<exponent>[+-]?\d{{1,2}}))?"
    rf"|(?:(?P<whole>{_DIGITS}) ?)?\\frac\{{(?P<inner>-?)(?P<above>{_DIGITS})\}}"
    rf"\{{(?P<below>{_DIGITS})\}}"
    rf"|(?:(?P<full>{_DIGITS}) )?(?P<left>{_DIGITS})/(?P<right>{_DIGITS}))(?P<percent>%?)"
)
_INTEGER = re.compile(r"-?\d+")
_BASED = re.compile(r"(\d{1,60})_\{?(\d{1,2})\}?")


def plain_value(answer: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, decimal, simple or mixed fraction, and whether it has a "%".

    None where the canonical `answer` is anything else; that says nothing about its value.
    """
    match = _VALUE.fullmatch(answer)
    if match is None:
        return None
    if match["decimal"]:
        value = Fraction(match["decimal"]) * Fraction(10) ** int(match["exponent"] or 0)
    else:
        below = int(match["below"] or match["right"])
        if below == 0:
            return None
        value = Fraction(int(match["above"] or match["left"]), below)
        if match["inner"]:
            if match["whole"]:
                return None
            value = -value
        value += int(match["whole"] or match["full"] or 0)
    return (-value if match["sign"] else value), bool(match["percent"])


def number_in_base(answer: str) -> tuple[str, str] | None:
    """Digits and base of a number like "4210_5"."""
    match = _BASED.fullmatch(answer)
    return (match[1], match[2]) if match else None


def is_integer(answer: str) -> bool:
    """Whether a canonical answer is an integer, of any length; equal ones are spelled equally."""
    return _INTEGER.fullmatch(answer) is not None


def is_word(answer: str) -> bool:
    """Whether an answer is a word or name, which must not be read as a product of letters."""
    letters = answer.replace(" ", "")
    return len(letters) >= 4 and letters.isalpha()
