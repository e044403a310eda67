"""The chat tokenizer, on a word-level vocabulary whose ids can be read off."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from r2vpo_megatron.data.chat import ChatTokenizer, tokenize_prompts
from r2vpo_megatron.data.prompts import RawPrompt

WORDS = ["<pad>", "<s>", "</s>", "<turn>", "<end>", "user", "assistant", "what", "is", "two"]
TEMPLATE = (
    "{%- for m in messages -%}{{ '<turn>' + m['role'] + ' ' + m['content'] + '<end>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<turn>assistant' }}{%- endif -%}"
)
MESSAGES = [{"role": "user", "content": "what is two"}]
PROMPT_IDS = (3, 5, 7, 8, 9, 4, 3, 6)


def write_folder(folder: Path, template: str | None = TEMPLATE, **generation: Any) -> Path:
    """A folder of a model type that transformers does not know; plain text gets <s> in front."""
    folder.mkdir(exist_ok=True)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<turn>"])
    tokenizer.add_tokens(["<end>"])  # ends a turn and is no special token
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<pad>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "PanguEmbedded"}))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_prompt_ids_are_the_templates_without_bos(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_folder(tmp_path / "m"))
    assert tokenizer.encode_prompt(MESSAGES) == PROMPT_IDS
    raw = [RawPrompt("a", tuple(MESSAGES), "2", {"k": 1})]
    (prompt,), too_long = tokenize_prompts(raw, tokenizer, max_prompt_tokens=8)
    assert (prompt.token_ids, prompt.text, prompt.ground_truth) == (PROMPT_IDS, "what is two", "2")
    assert too_long == []


def test_stop_and_padding_ids(tmp_path: Path) -> None:
    own = ChatTokenizer(write_folder(tmp_path / "own"))
    assert own.stop_token_ids == (2,)
    assert own.pad_token_id == 2
    both = ChatTokenizer(write_folder(tmp_path / "both", eos_token_id=[4, 2], pad_token_id=0))
    assert both.stop_token_ids == (4, 2)
    assert both.pad_token_id == 0


def test_decoding_drops_stop_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_folder(tmp_path / "m", eos_token_id=4))
    assert tokenizer.decode_response([7, 8, 4]) == "what is"
    assert tokenizer.decode_response([7, 3, 8, 2]) == "what is"
    assert tokenizer.decode_response([7, 4, 8]) == "what <end> is"  # inside: not the stop
    assert tokenizer.decode_response([4]) == ""


def test_long_prompts_are_left_out_and_named(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_folder(tmp_path / "m"))
    long = RawPrompt("long", ({"role": "user", "content": "is " * 9},), "1")
    short = RawPrompt("short", tuple(MESSAGES), "1")
    prompts, too_long = tokenize_prompts([long, short], tokenizer, max_prompt_tokens=8)
    assert [p.prompt_id for p in prompts] == ["short"]
    assert too_long == ["long"]
    with pytest.raises(ValueError, match="max_prompt_tokens: 7; all 2 prompts are longer"):
        tokenize_prompts([long, short], tokenizer, max_prompt_tokens=7)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template; valid: a file chat_template.jinja"):
        ChatTokenizer(write_folder(tmp_path / "plain", template=None))
    with pytest.raises(ValueError, match="no such folder"):
        ChatTokenizer(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no readable tokenizer"):
        ChatTokenizer(tmp_path / "empty")


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """openPangu's form: tokenizer.model, and a tokenizer class that is remote code only."""
    folder = tmp_path_factory.mktemp("pangu")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is two and three", "user assistant answer 0123456789"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        user_defined_symbols=["<turn>", "<end>", "<think>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "PanguTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": {"content": "<end>", "__type": "AddedToken"},
        "unk_token": "<unk>",
        "additional_special_tokens": ["<turn>"],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "PanguEmbedded"}))
    return folder


def test_a_sentencepiece_folder_needs_no_remote_code(sentencepiece_folder: Path) -> None:
    tokenizer = ChatTokenizer(sentencepiece_folder)
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    text = "<turn>user what is two<end><turn>assistant"
    assert tokenizer.encode_prompt(MESSAGES) == tuple(reference.encode(text))
    assert tokenizer.stop_token_ids == (reference.piece_to_id("<end>"),)
    response = "<think> it  is 23\nAnswer: 23"
    assert tokenizer.decode_response(reference.encode(response + "<end>")) == response
    assert tokenizer.decode_response(reference.encode("two<turn> is<end>")) == "two is"
