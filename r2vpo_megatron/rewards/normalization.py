r"""Answer normalisation of the Minerva evaluation, as literal tables.

The tables and their order are part of the verdict: published math_dapo results depend on them,
oddities included ("childrentickets"; no "ft", which would eat a part of `\left`). Rules are
applied to prediction and ground truth alike, so an oddity only matters where it merges two
different answers.
"""

from __future__ import annotations

import re

# Replaced in this order. The first rows drop articles, so they must run before spaces go.
SUBSTITUTIONS: tuple[tuple[str, str], ...] = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)

UNIT_WORDS: tuple[str, ...] = (
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
)

# An empty \text{} is what is left of a unit; its exponents go with it ("cm^2").
TEX_REMNANTS: tuple[str, ...] = (
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    '"',
    "\\dots",
)

REMOVED_EXPRESSIONS = UNIT_WORDS + TEX_REMNANTS

# (pattern, replacement), applied in this order after the literal tables.
TEX_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    # The first $...$ keeps its inside; all else on that line goes.
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),
    # Unwrap. \boxed alone is greedy: it takes the last brace, the others the first.
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    # Shorthand: \frac12 -> \frac{1}{2}, \sqrt3 -> \sqrt{3}.
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def normalize_answer(answer: str) -> str:
    """Bring an answer to the form in which the `minerva` mode compares strings.

    Args:
        answer: Prediction or ground truth, as written.

    Returns:
        The normalised answer; may be empty (`$$12$$` gives "").
    """
    answer = answer.rsplit("=", maxsplit=1)[-1]
    for before, after in SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for expression in REMOVED_EXPRESSIONS:
        answer = answer.replace(expression, "")
    for pattern, replacement in TEX_REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    without_commas = answer.replace(",", "")
    if without_commas.isdigit():
        answer = without_commas
    return answer.strip()
