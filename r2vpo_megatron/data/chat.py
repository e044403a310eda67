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

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from r2vpo_megatron.data.prompts import Message, RawPrompt
from r2vpo_megatron.data.sentencepiece_chat import SentencePieceChat
from r2vpo_megatron.records import Prompt

# Classes without behaviour of their own: tokenizer.json says all.
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class ChatTokenizer:
    """Encodes prompts and decodes responses for one model folder.

    Attributes:
        stop_token_ids: Each ends a response: the folder's generation_config.json, then the
            tokenizer's own end of sequence.
        pad_token_id: The tokenizer's, else the generation config's, else the first stop token.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Load the tokenizer; no code from the folder is run.

        Raises:
            ValueError: The folder has no readable tokenizer, no chat template or no stop token.
        """
        folder = Path(model_dir)
        if not folder.is_dir():
            raise ValueError(f"model folder {folder}: no such folder")
        self._tokenizer = _load_tokenizer(folder)
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"model folder {folder}: no chat template; valid: a file chat_template.jinja or "
                "the field chat_template of tokenizer_config.json"
            )
        generation_config = _read_json(folder / "generation_config.json")
        stop = [*_as_list(generation_config.get("eos_token_id")), self._tokenizer.eos_token_id]
        self.stop_token_ids: tuple[int, ...] = tuple(
            dict.fromkeys(int(token_id) for token_id in stop if token_id is not None)
        )
        if not self.stop_token_ids:
            raise ValueError(
                f"model folder {folder}: no stop token; valid: eos_token_id in "
                "generation_config.json or eos_token in tokenizer_config.json"
            )
        padding = [self._tokenizer.pad_token_id, generation_config.get("pad_token_id")]
        padding.append(self.stop_token_ids[0])
        self.pad_token_id: int = next(int(token) for token in padding if token is not None)

    def encode_prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the ids that ask for the assistant's next turn: the template, nothing added."""
        token_ids = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
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

    AutoTokenizer also reads config.json, and stumbles over a model type it does not know or over a
    tokenizer class that exists as remote code only; openPangu folders have both.
    """
    config = _read_json(folder / "tokenizer_config.json")
    has_fast_file = (folder / "tokenizer.json").is_file()
    is_remote = "auto_map" in config
    try:
        if has_fast_file and (is_remote or config.get("tokenizer_class") in _GENERIC_CLASSES):
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
