"""A chat tokenizer from a bare sentencepiece file, where the tokenizer class is remote code.

openPangu folders hold tokenizer.model, a tokenizer_config.json and Python code that is not run
here. This reads the two files and does what such "slow" tokenizers do: cut the text at the special
tokens, and give each piece between them to sentencepiece.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from r2vpo_megatron.data.chat_templates import Message

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class SentencePieceChat:
    """The few methods of a transformers tokenizer that `ChatTokenizer` calls.

    Attributes:
        chat_template: Jinja source, or None.
        eos_token_id: None where the folder names none.
        pad_token_id: None where the folder names none.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        """Read tokenizer.model and chat_template.jinja of `folder`.

        Args:
            folder: The model folder.
            config: Its tokenizer_config.json.
        """
        self._processor = sentencepiece.SentencePieceProcessor(
            model_file=str(folder / "tokenizer.model")
        )
        self._role_tokens = {
            role: _content(config[role]) for role in _SPECIAL_ROLES if config.get(role)
        }
        extra = [_content(token) for token in config.get("additional_special_tokens") or []]
        # A token that the file lacks would get the id of <unk>, and so stand for any such.
        self._added_ids = {
            token: token_id
            for token in [*self._role_tokens.values(), *extra]
            if self._processor.id_to_piece(token_id := self._processor.piece_to_id(token)) == token
        }
        for token_id, token in (config.get("added_tokens_decoder") or {}).items():
            # "special" there is not what decoding leaves out: openPangu marks the ends of its
            # thinking so, and they belong to the response. Slow tokenizers go by the roles, too.
            self._added_ids[_content(token)] = int(token_id)
        self._special_tokens = {*self._role_tokens.values(), *extra} & self._added_ids.keys()
        longest_first = sorted(self._added_ids, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._added_tokens = {token_id: token for token, token_id in self._added_ids.items()}

        template_file = folder / "chat_template.jinja"
        self.chat_template: str | None = config.get("chat_template")
        if template_file.is_file():
            self.chat_template = template_file.read_text(encoding="utf-8")
        self.eos_token_id = self._added_ids.get(self._role_tokens.get("eos_token", ""))
        self.pad_token_id = self._added_ids.get(self._role_tokens.get("pad_token", ""))

    def apply_chat_template(
        self, messages: Sequence[Message], chat_template: str, **_options: Any
    ) -> str:
        """Return the template's text, asking for the assistant's next turn."""
        # Block trimming as transformers does it: templates are written for it.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        return environment.from_string(chat_template).render(
            messages=list(messages), add_generation_prompt=True, **self._role_tokens
        )

    def encode(self, text: str, **_options: Any) -> list[int]:
        """Return the ids of the text; no BOS is put in front."""
        token_ids: list[int] = []
        pieces = self._splitter.split(text) if self._added_ids else [text]
        for piece in pieces:
            if piece in self._added_ids:
                token_ids.append(self._added_ids[piece])
            elif piece:
                token_ids += self._processor.encode(piece)
        return token_ids

    def get_vocab(self) -> dict[str, int]:
        """Return the id of every piece and added token."""
        size = self._processor.get_piece_size()
        pieces = {self._processor.id_to_piece(token_id): token_id for token_id in range(size)}
        return pieces | self._added_ids

    def decode(self, token_ids: Sequence[int], **_options: Any) -> str:
        """Return the text without the tokens that have a role; other added tokens stay."""
        special = {self._added_ids[token] for token in self._special_tokens}
        text = ""
        ordinary: list[int] = []
        for token_id in token_ids:
            if token_id in special:
                continue
            if token_id in self._added_tokens:
                text += self._processor.decode(ordinary) + self._added_tokens[token_id]
                ordinary = []
            else:
                ordinary.append(token_id)
        return text + str(self._processor.decode(ordinary))


def _content(token: str | dict[str, Any]) -> str:
    """The text of a token, which configs write plainly or as a serialised AddedToken."""
    return token if isinstance(token, str) else str(token["content"])


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
