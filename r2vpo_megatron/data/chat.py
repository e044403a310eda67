"""Text to token ids and back, by the chat template of a Hugging Face model folder.

Ids of a prompt are made here, once, and both the rollout engine and the learner get these very
ids. Tokenising the template's text again is a trap: tokenizers that add a BOS token to plain text
add one that the template does not have, and the two sides then see different prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r2vpo_megatron.data.chat_templates import (
    CHAT_TEMPLATES,
    Message,
    check_chat_template,
    check_thinking,
    with_thinking,
)
from r2vpo_megatron.data.prompts import RawPrompt
from r2vpo_megatron.data.sentencepiece_chat import SentencePieceChat
from r2vpo_megatron.records import Prompt

__all__ = ["CHAT_TEMPLATES", "ChatTokenizer", "tokenize_prompts"]


class ChatTokenizer:
    """Encodes prompts and decodes responses for one model folder.

    Attributes:
        chat_template: Name of the template in use.
        thinking: Way to think that prompts ask for; "" leaves it to the template.
        stop_token_ids: Each ends a response: those of the folder's generation_config.json, or of
            its config.json where that names none, then the tokenizer's own end of sequence and the
            named chat template's end of a turn.
        pad_token_id: The tokenizer's, else the generation config's, else the first stop token.
    """

    def __init__(
        self, model_dir: str | Path, chat_template: str = "model", thinking: str = ""
    ) -> None:
        """Load the tokenizer; no code from the folder is run.

        Args:
            model_dir: The model folder, in Hugging Face format.
            chat_template: Key of `CHAT_TEMPLATES`; "model" is the folder's own.
            thinking: Key of `THINKING_SUFFIXES`: "slow", "fast", "auto" or "".

        Raises:
            ValueError: The folder has no readable tokenizer, no chat template or no stop token, or
                the template does not fit the tokenizer or the way to think.
        """
        check_chat_template(chat_template, thinking)
        self.chat_template = chat_template
        self.thinking = thinking
        self._folder = Path(model_dir)
        if not self._folder.is_dir():
            raise ValueError(f"model folder {self._folder}: no such folder")
        self._tokenizer = _load_tokenizer(self._folder)
        self._source = self._template_source()
        generation_config = _read_json(self._folder / "generation_config.json")
        stop = _as_list(generation_config.get("eos_token_id"))
        if stop == [None]:
            stop = _as_list(_read_json(self._folder / "config.json").get("eos_token_id"))
        stop.append(self._tokenizer.eos_token_id)
        turn_end = CHAT_TEMPLATES[chat_template].turn_end
        if turn_end:
            stop.append(self._tokenizer.get_vocab()[turn_end])
        self.stop_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys(int(token_id) for token_id in stop if token_id is not None)
        )
        if not self.stop_token_ids:
            raise ValueError(
                f"model folder {self._folder}: no stop token; valid: eos_token_id in "
                "generation_config.json or eos_token in tokenizer_config.json"
            )
        padding = [self._tokenizer.pad_token_id, generation_config.get("pad_token_id")]
        padding.append(self.stop_token_ids[0])
        self.pad_token_id: int = next(int(token) for token in padding if token is not None)

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """Return the template's text that asks for the assistant's next turn.

        Raises:
            ValueError: The template refuses the messages.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                with_thinking(messages, self.thinking),
                chat_template=self._source,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"model folder {self._folder}: chat template {self.chat_template!r}: {error}"
            ) from error
        return text

    def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the ids of `prompt_text`, and nothing added to them."""
        text = self.prompt_text(messages)
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(int(token_id) for token_id in token_ids)

    def decode_response(self, token_ids: Sequence[int]) -> str:
        """Return the text of a response, without its stop token and other special tokens."""
        end = len(token_ids)
        # By id: a stop token need not be a special token of the tokenizer.
        while end > 0 and token_ids[end - 1] in self.stop_token_ids:
            end -= 1
        text: str = self._tokenizer.decode(
            list(token_ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _template_source(self) -> str:
        """The Jinja source in use, checked against the tokenizer."""
        template = CHAT_TEMPLATES[self.chat_template]
        source = template.source or self._tokenizer.chat_template
        if isinstance(source, dict):  # several, by name
            source = source.get("default")
        if not source:
            named = ", ".join(name for name in CHAT_TEMPLATES if name != "model")
            raise ValueError(
                f"model folder {self._folder}: no chat template; valid: a file "
                "chat_template.jinja, the field chat_template of tokenizer_config.json, or "
                f"data.chat_template (--chat-template): {named}"
            )
        vocabulary = self._tokenizer.get_vocab() if template.tokens else {}
        for token in template.tokens:
            token_ids = self._tokenizer.encode(token, add_special_tokens=False)
            if list(token_ids) != [vocabulary.get(token)]:
                raise ValueError(
                    f"model folder {self._folder}: chat template {self.chat_template!r} needs the "
                    f"token {token}, which the tokenizer does not have; valid: a template of this "
                    "model ('model' is the folder's own)"
                )
        check_thinking(self.chat_template, source, self.thinking)
        return str(source)


def tokenize_prompts(
    raw_prompts: Sequence[RawPrompt],
    tokenizer: ChatTokenizer,
    max_prompt_tokens: int | None = None,
) -> tuple[list[Prompt], list[str]]:
    """Apply the chat template to every prompt.

    Args:
        raw_prompts: As `load_prompts` gives them.
        tokenizer: Of the model to train.
        max_prompt_tokens: Longer prompts are left out, never cut.

    Returns:
        The prompts in the given order, and the ids of those left out.

    Raises:
        ValueError: No prompt is short enough.
    """
    prompts: list[Prompt] = []
    too_long: list[str] = []
    for raw in raw_prompts:
        token_ids = tokenizer.encode_prompt(raw.messages)
        if max_prompt_tokens is not None and len(token_ids) > max_prompt_tokens:
            too_long.append(raw.prompt_id)
            continue
        prompts.append(Prompt(raw.prompt_id, token_ids, raw.ground_truth, raw.text, raw.extra))
    if too_long and not prompts:
        raise ValueError(
            f"max_prompt_tokens: {max_prompt_tokens}; all {len(too_long)} prompts are longer"
        )
    return prompts, too_long


def _load_tokenizer(folder: Path) -> Any:
    """Choose the loader by what the folder holds; code from it is never run.

    A tokenizer.json says all, and the class that tokenizer_config.json names is not asked. That
    class may be remote code (openPangu), or may rebuild the tokenizer by its own rules: for
    DeepSeek-R1-Distill's byte-level file, LlamaTokenizer of transformers 5 loses the spaces.
    """
    config = _read_json(folder / "tokenizer_config.json")
    is_remote = "auto_map" in config
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        if is_remote and (folder / "tokenizer.model").is_file():
            return SentencePieceChat(folder, config)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"model folder {folder}: no readable tokenizer ({reason}); valid: tokenizer.json or "
            "tokenizer.model beside tokenizer_config.json"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; valid: a JSON object")
    return content


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
