"""The testbed's tokenizer: the same ids as sentencepiece, openPangu's chat form, no second <s>."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from r2vpo_megatron.testbed.arithmetic import generate_problems
from r2vpo_megatron.testbed.tokenizer import prompt_token_ids, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only the tokenizer's files."""
    path = tmp_path_factory.mktemp("tokenizer")
    problems = generate_problems("train", 1000, seed=0)
    write_tokenizer(path, [f"{p.question}\n{p.solution}" for p in problems])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# Without `<`: transformers reads a spelled-out <s> as the token, sentencepiece as three letters.
_TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "Answer",
                ": ",
                "  ",
                "\n",
                "=?",
                "12",
                "系统：",
                "用户",
                "[unused9]",
                "[unused10]",
                "the ",
            ]
        ),
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="▁\0<"), max_size=5),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=_TEXT)
def test_ids_equal_sentencepiece_and_decode_gives_the_text_back(
    tokenizer: Any, processor: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == text


def test_special_ids_and_single_digits(
    tokenizer: Any, processor: sentencepiece.SentencePieceProcessor
) -> None:
    assert processor.id_to_piece([0, 1, 2, 3, 4, 5, 6]) == [
        *("<unk>", "<s>", "</s>"),
        *("[unused9]", "[unused10]", "[unused16]", "[unused17]"),
    ]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 4)
    assert len(tokenizer) == processor.get_piece_size() == 384
    assert tokenizer.tokenize("2048+17") == ["2", "0", "4", "8", "+", "1", "7"]
    thought = tokenizer("[unused16]1+1[unused17]2[unused10]")["input_ids"]
    assert tokenizer.decode(thought, skip_special_tokens=True) == "[unused16]1+1[unused17]2"


def test_chat_template_gives_the_text_of_openpangu(tokenizer: Any) -> None:
    user = {"role": "user", "content": "1+2=?"}
    system = {"role": "system", "content": "Be brief."}
    assistant = {"role": "assistant", "content": "Answer: 3"}

    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == (
        "[unused9]系统：[unused10][unused9]用户：1+2=?[unused10][unused9]助手："
    )
    assert tokenizer.apply_chat_template([system, user, assistant], tokenize=False) == (
        "[unused9]系统：Be brief.[unused10][unused9]用户：1+2=?[unused10]"
        "[unused9]助手：Answer: 3[unused10]"
    )


def test_prompt_ids_are_the_templates_and_have_no_bos(
    tokenizer: Any, processor: sentencepiece.SentencePieceProcessor
) -> None:
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": "1+2=?"}])
    piece = processor.piece_to_id
    assert ids == [
        *(3, piece("系统"), piece("："), 4),
        *(3, piece("用户"), piece("："), piece("1"), piece("+"), piece("2"), piece("=?"), 4),
        *(3, piece("助手"), piece("：")),
    ]
    # The trap: tokenising the template's text again puts <s> in front, as openPangu's does.
    text = "[unused9]系统：[unused10][unused9]用户：1+2=?[unused10][unused9]助手："
    assert tokenizer(text)["input_ids"] == [1, *ids]
