"""Keep secrets out of what is written and printed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "***"
MIN_SECRET_LENGTH = 8  # hiding "1" or "false" wherever it occurs would leave no text readable
_SECRET_NAME = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_PLACE_NAME = re.compile(r"_(PATH|FILE|DIR)$", re.IGNORECASE)  # where a secret lies is none
_URL_LOGIN = re.compile(r"(?<=://)[^/\s'\"]+(?=@)")
# Unlike max-response-tokens, which is a number to keep.
_SECRET_FLAG = re.compile(
    r"(?P<flag>--?[\w.-]*(?:token|key|secret|password|passwd|credentials?))"
    r"(?P<separator>=|$)",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """`text` without values of the environment's secrets and without logins in URLs.

    A secret is the value, of 8 characters or more, of a variable whose name holds TOKEN, KEY,
    SECRET, PASSWORD, PASSWD or CREDENTIAL.
    """
    secrets = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name)
        and not _PLACE_NAME.search(name)
        and len(value) >= MIN_SECRET_LENGTH
    }
    for value in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, HIDDEN)
    return _URL_LOGIN.sub(HIDDEN, text)


def redact_values(value: Any) -> Any:
    """`redact` for every string, also a dictionary's key, in nested JSON values."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_values(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    return value


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets, nor what follows a flag such as --api-key."""
    result: list[str] = []
    hides_next = False
    for argument in arguments:
        match = _SECRET_FLAG.match(argument)
        if match and match["separator"]:
            result.append(f"{match['flag']}={HIDDEN}")
        else:
            result.append(HIDDEN if hides_next else redact(argument))
        hides_next = match is not None and not match["separator"]
    return result
