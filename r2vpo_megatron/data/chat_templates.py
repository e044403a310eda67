"""Chat templates by name: a model's turn markers around the messages of a prompt.

Not prompt templates: those say inside the user's message how to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class ChatTemplate:
    """One way to put messages into a model's format.

    Attributes:
        name: Its key in `CHAT_TEMPLATES`.
        source: Jinja, as in a chat_template.jinja; None: the model folder's own.
        tokens: Markers that the tokenizer must know as tokens of their own.
        turn_end: The one of them that ends a turn; "" where the tokenizer's end of sequence does.
    """

    name: str
    source: str | None
    tokens: tuple[str, ...] = ()
    turn_end: str = ""


# No newline at the end: a base model goes on where the text stops.
_PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}\
{% endif %}{% endfor %}"

# A system turn always opens the conversation, empty where none is given.
_OPENPANGU = """\
{%- set names = {'system': '系统：', 'user': '用户：', 'assistant': '助手：'} -%}
{%- if messages[0]['role'] != 'system' -%}
    {{- '[unused9]' + names['system'] + '[unused10]' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '[unused9]' + names[message['role']] + message['content'] + '[unused10]' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[unused9]' + names['assistant'] -}}
{%- endif -%}
"""

# Earlier answers go in without their thinking, and the new one begins inside its own.
_DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for message in messages if message['role'] == 'system' -%}
    {{- message['content'] -}}
{%- endfor -%}
{%- for message in messages if message['role'] != 'system' -%}
    {%- if message['role'] == 'user' -%}
        {{- '<｜User｜>' + message['content'] -}}
    {%- else -%}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<｜Assistant｜><think>\\n' -}}
{%- endif -%}
"""

CHAT_TEMPLATES: dict[str, ChatTemplate] = {
    "model": ChatTemplate("model", None),
    "plain": ChatTemplate("plain", _PLAIN),
    "openpangu": ChatTemplate("openpangu", _OPENPANGU, ("[unused9]", "[unused10]"), "[unused10]"),
    "deepseek_r1": ChatTemplate("deepseek_r1", _DEEPSEEK_R1, ("<｜User｜>", "<｜Assistant｜>")),
}

# openPangu's ways to think, and what each adds to the last user message. Slow is its default.
THINKING_SUFFIXES: dict[str, str] = {
    "": "",
    "slow": "",
    "fast": " /no_think",
    "auto": " /auto_think",
}
_PANGU_MARKER = "[unused9]"


def check_chat_template(chat_template: str, thinking: str) -> None:
    """Check the two names.

    Raises:
        ValueError: There is no such template or way to think.
    """
    for field, value, valid in (
        ("chat_template", chat_template, CHAT_TEMPLATES),
        ("thinking", thinking, THINKING_SUFFIXES),
    ):
        if value not in valid:
            names = ", ".join(repr(name) for name in valid)
            raise ValueError(f"{field}: {value!r}; valid: {names}")


def check_thinking(chat_template: str, source: str, thinking: str) -> None:
    """Check that the template has such a way to think.

    Args:
        chat_template: Its name.
        source: Its Jinja source, the model folder's own for "model".
        thinking: Key of `THINKING_SUFFIXES`.

    Raises:
        ValueError: Only openPangu's template has it, and this is another.
    """
    if THINKING_SUFFIXES[thinking] and _PANGU_MARKER not in source:
        raise ValueError(
            f"thinking: {thinking!r}, but the chat template {chat_template!r} is not openPangu's; "
            "valid: '' or 'slow' here, 'fast' and 'auto' with an openPangu model"
        )


def with_thinking(messages: Sequence[Message], thinking: str) -> list[Message]:
    """Return the messages, the last of the user's ending as the way to think asks."""
    changed = list(messages)
    suffix = THINKING_SUFFIXES[thinking]
    for index in reversed(range(len(changed))):
        message = changed[index]
        if message["role"] == "user":
            if not message["content"].endswith(suffix):
                changed[index] = {**message, "content": message["content"] + suffix}
            break
    return changed
