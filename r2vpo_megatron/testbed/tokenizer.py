"""A small sentencepiece tokenizer in openPangu's form, readable by `AutoTokenizer` as it is.

What it shares with openPangu's: byte fallback, single digits, <unk> 0 (also the padding), <s> 1,
</s> 2, the markers [unused9] (start of a turn), [unused10] (end of a turn, which ends generation),
[unused16] and [unused17] (start and end of thinking), and the chat template.

Which ids make a prompt: `prompt_token_ids` below, that is, the chat template tokenised WITHOUT a
leading <s>, as vLLM's chat endpoint does it. `tokenizer(text)` adds <s>, as openPangu's does, so
the text of a template must never be tokenised again: ids are made once, and ids are what travels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

VOCAB_SIZE = 384
UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = "<unk>", "<s>", "</s>"
PAD_TOKEN = UNK_TOKEN
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
TURN_START, TURN_END = "[unused9]", "[unused10]"
THINK_START, THINK_END = "[unused16]", "[unused17]"
TURN_END_ID = 4
MARKERS = (TURN_START, TURN_END, THINK_START, THINK_END)

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '[unused9]系统：[unused10]' -}}{%- endif -%}"
    "{%- set names = {'system': '系统', 'user': '用户', 'assistant': '助手'} -%}"
    "{%- for message in messages -%}"
    "{{- '[unused9]' + names[message['role']] + '：' + message['content'] + '[unused10]' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '[unused9]助手：' -}}{%- endif -%}"
)

# The template's words must become pieces, or every prompt would begin with dozens of byte tokens;
# the English lines fill the vocabulary with pieces that common math prompts use.
_TEMPLATE_WORDS = ("系统：", "用户：", "助手：")
_ENGLISH_LINES = (
    "You are a helpful assistant.",
    "Solve the following math problem step by step.",
    "The last line of your response should be of the form Answer: $Answer (without quotes)",
    "where $Answer is the answer to the problem.",
    'Remember to put your answer on its own line after "Answer:".',
    "What is the sum of these numbers? First add, then subtract; think, and check the result.",
    "Put the final value in \\boxed{}, with no units, e.g. /no_think or (x * y) / 2 < 10.",
)


def write_tokenizer(folder: Path, corpus: Sequence[str]) -> None:
    """Train a tokenizer and write all of its files into `folder`.

    Writes tokenizer.model (sentencepiece), tokenizer.json (the same vocabulary and merges for
    `tokenizers`), tokenizer_config.json and chat_template.jinja.

    Args:
        folder: an existing folder.
        corpus: text to learn the merges from; the same text gives the same files.
    """
    model_proto = _train_sentencepiece(corpus)
    (folder / "tokenizer.model").write_bytes(model_proto)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    _as_fast_tokenizer(processor).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK_TOKEN,
        "bos_token": BOS_TOKEN,
        "eos_token": TURN_END,
        "pad_token": PAD_TOKEN,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def prompt_token_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a prompt that asks for the assistant's next turn; no <s> in front.

    Args:
        tokenizer: a transformers tokenizer with openPangu's chat template.
        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...].
    """
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return [int(token_id) for token_id in ids]


def _train_sentencepiece(corpus: Sequence[str]) -> bytes:
    """Train a BPE model; returns the serialised sentencepiece model."""
    lines = [line for text in corpus for line in text.splitlines()]
    lines += list(_TEMPLATE_WORDS) * max(1, len(lines) // 8)
    lines += list(_ENGLISH_LINES) * max(1, len(lines) // 100)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        user_defined_symbols=list(MARKERS),
        unk_id=PAD_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        # Text must survive the round trip unchanged, and the text after a marker must give the
        # same ids as sentencepiece gives for the whole.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,  # more threads may count pieces in another order
        minloglevel=2,
    )
    return model.getvalue()


def _as_fast_tokenizer(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """Express a sentencepiece BPE model as a `tokenizers` one that gives the same ids."""
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    byte_level = {i for i in range(len(pieces)) if processor.is_byte(i)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces, excluded=byte_level | {vocab[m] for m in MARKERS}),
            unk_token=UNK_TOKEN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([UNK_TOKEN, BOS_TOKEN, EOS_TOKEN, TURN_START, TURN_END])
    # Not special: they survive skip_special_tokens, as a reward that reads the thinking needs.
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS[2:]])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, BOS_ID)],
    )
    return tokenizer


def _merges(pieces: Sequence[str], excluded: set[int]) -> list[tuple[str, str]]:
    """Recover the merge rules: sentencepiece numbers merged pieces in the order it learned them."""
    usable = {piece for index, piece in enumerate(pieces) if index not in excluded}
    merges = []
    for index, piece in enumerate(pieces):
        if index in excluded or index <= EOS_ID:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((left, right))
    return merges
