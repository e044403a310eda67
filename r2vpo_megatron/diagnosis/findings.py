"""Findings: what was looked at, whether it is well, and what to do if not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, FAULT = "ok", "warning", "FAULT"
_INDENT = " " * 9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what, in a word or two.
        level: OK, WARNING (the run would start) or FAULT (it would not, or would go wrong).
        text: what was seen.
        remedy: what to do about it; empty if it is well.
    """

    subject: str
    level: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.level:7}  {self.subject}: {self.text}"]
        if self.remedy:
            lines.append(f"{_INDENT}-> {self.remedy}")
        return "\n".join(lines)


def ok(subject: str, text: str) -> Finding:
    """It is well."""
    return Finding(subject, OK, text)


def warning(subject: str, text: str, remedy: str) -> Finding:
    """It will do, but not well."""
    return Finding(subject, WARNING, text, remedy)


def fault(subject: str, text: str, remedy: str) -> Finding:
    """A run would not start, or would go wrong."""
    return Finding(subject, FAULT, text, remedy)


def summarize(findings: Iterable[Finding]) -> str:
    """How many of each level there are, in a line."""
    levels = [finding.level for finding in findings]
    counts = {level: levels.count(level) for level in (FAULT, WARNING, OK)}
    faults, warnings = (_count(counts[level], level.lower()) for level in (FAULT, WARNING))
    if counts[FAULT]:
        return f"{faults}, {warnings}: a run would fail"
    if counts[WARNING]:
        return f"no fault, {warnings}: a run can start"
    return f"all {counts[OK]} findings are well"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
