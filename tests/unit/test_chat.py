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
from tests.byte_tokenizers import SPECIAL, write_byte_tokenizer

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
    # A folder without generation_config.json, as a converted checkpoint may be.
    folder = write_folder(tmp_path / "config")
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert ChatTokenizer(folder).stop_token_ids == (4, 2)


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
    with pytest.raises(ValueError, match=r"--chat-template\): plain, openpangu, deepseek_r1$"):
        ChatTokenizer(tmp_path / "plain")
    broken = ChatTokenizer(write_folder(tmp_path / "broken", template="{{ messages[0].x.y }}"))
    with pytest.raises(ValueError, match="broken: chat template 'model': .* no attribute 'x'"):
        broken.encode_prompt(MESSAGES)
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
        "additional_special_tokens": ["<turn>", "<tool>"],
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
    # A token that the file lacks is none, and not <unk>.
    lacking = [{"role": "user", "content": "what <tool> is"}]
    text_lacking = "<turn>user what <tool> is<end><turn>assistant"
    assert tokenizer.encode_prompt(lacking) == tuple(reference.encode(text_lacking))
    assert tokenizer.encode_prompt(MESSAGES) == tuple(reference.encode(text))
    assert tokenizer.stop_token_ids == (reference.piece_to_id("<end>"),)
    response = "<think> it  is 23\nAnswer: 23"
    assert tokenizer.decode_response(reference.encode(response + "<end>")) == response
    assert tokenizer.decode_response(reference.encode("two<turn> is<end>")) == "two is"


TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "hm</think>two"},
    {"role": "user", "content": "three"},
]


def write_byte_folder(folder: Path, special: list[str] = SPECIAL, template: str = "") -> Path:
    """Byte-level, as DeepSeek-R1-Distill's: the class named is Llama's, and plain text gets BOS."""
    folder.mkdir()
    write_byte_tokenizer(folder, special)
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "chat_template": template or None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_unknown_folder(folder: Path) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("plain", TURNS, "be brief\none\nhm</think>two\nthree"),
        (
            "openpangu",
            TURNS[1:2],
            "[unused9]系统：[unused10][unused9]用户：one[unused10][unused9]助手：",
        ),
        (
            "openpangu",
            TURNS[:3],
            "[unused9]系统：be brief[unused10][unused9]用户：one[unused10]"
            "[unused9]助手：hm</think>two[unused10][unused9]助手：",
        ),
        ("deepseek_r1", TURNS[1:2], "<bos><｜User｜>one<｜Assistant｜><think>\n"),
        (
            "deepseek_r1",
            TURNS,
            "<bos>be brief<｜User｜>one<｜Assistant｜>two<eos>"
            "<｜User｜>three<｜Assistant｜><think>\n",
        ),
    ],
)
def test_named_templates_and_their_ids(
    tmp_path: Path, name: str, messages: list[dict[str, str]], text: str
) -> None:
    folder = write_byte_folder(tmp_path / "m")
    tokenizer = ChatTokenizer(folder, chat_template=name)
    assert tokenizer.prompt_text(messages) == text
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids = tokenizer.encode_prompt(messages)
    assert token_ids == tuple(reference.encode(text, add_special_tokens=False).ids)
    # What tokenising the text once more would give: a BOS that the template does not have.
    assert tuple(reference.encode(text).ids) == (0, *token_ids)
    assert token_ids.count(0) == (1 if name == "deepseek_r1" else 0)


def test_a_named_templates_end_of_turn_stops_a_response(tmp_path: Path) -> None:
    folder = write_byte_folder(tmp_path / "m")  # says nothing of [unused10], number 5
    assert ChatTokenizer(folder, "openpangu").stop_token_ids == (1, 5)
    assert ChatTokenizer(folder, "deepseek_r1").stop_token_ids == (1,)


def test_a_byte_level_file_is_not_rebuilt_by_the_class_it_names(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(write_byte_folder(tmp_path / "m"), chat_template="plain")
    text = "two  words\nand 中文"
    token_ids = tokenizer.encode_prompt([{"role": "user", "content": text}])
    assert tokenizer.decode_response(token_ids) == text


@pytest.mark.parametrize(
    ("thinking", "suffix"),
    [("", ""), ("slow", ""), ("fast", " /no_think"), ("auto", " /auto_think")],
)
def test_openpangus_ways_to_think_end_the_last_user_message(
    tmp_path: Path, thinking: str, suffix: str
) -> None:
    own = "[unused9]{{ messages[-1]['content'] }}[unused10]"  # a model's own template counts too
    folder = write_byte_folder(tmp_path / "m", template=own)
    assert ChatTokenizer(folder, "model", thinking).prompt_text(TURNS) == (
        f"[unused9]three{suffix}[unused10]"
    )
    text = ChatTokenizer(folder, "openpangu", thinking).prompt_text(TURNS)
    assert text.endswith(f"two[unused10][unused9]用户：three{suffix}[unused10][unused9]助手：")
    assert "用户：one[unused10]" in text
    asked = [{"role": "user", "content": f"three{suffix}"}]  # what says so already is left alone
    assert ChatTokenizer(folder, "model", thinking).prompt_text(asked) == (
        f"[unused9]three{suffix}[unused10]"
    )


def test_templates_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write_byte_folder(tmp_path / "m", SPECIAL[:2], template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="'openpangu' needs the token .unused9., which the token"):
        ChatTokenizer(folder, "openpangu")
    with pytest.raises(ValueError, match="'deepseek_r1' needs the token <｜User｜>"):
        ChatTokenizer(folder, "deepseek_r1")
    for thinking in ("fast", "auto"):
        with pytest.raises(
            ValueError, match=f"thinking: '{thinking}', .*'' or 'slow' here, 'fast'"
        ):
            ChatTokenizer(folder, "model", thinking)
    ChatTokenizer(folder, "model", "slow")
    with pytest.raises(ValueError, match="thinking: 'quick'; valid: '', 'slow', 'fast', 'auto'"):
        ChatTokenizer(folder, "model", "quick")
    with pytest.raises(ValueError, match="chat_template: 'llama'; valid: 'model', 'plain', 'openp"):
        ChatTokenizer(folder, "llama")


def test_a_sentencepiece_folder_takes_named_templates(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )
    plain = ChatTokenizer(sentencepiece_folder, "plain").encode_prompt(MESSAGES)
    assert plain == tuple(reference.encode("what is two"))
    assert reference.bos_id() not in plain
    with pytest.raises(ValueError, match="needs the token .unused9."):
        ChatTokenizer(sentencepiece_folder, "openpangu")
    # The folder of the model itself: pangu's markers are pieces, BOS would be added to plain text.
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["what is two 系统：用户：助手： /no_think"] * 40),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        user_defined_symbols=["[unused9]", "[unused10]", "[unused16]", "[unused17]"],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    published = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    config = {
        "tokenizer_class": "PanguTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        # As the published folder has it: all are "special", and roles decide what decoding drops.
        "added_tokens_decoder": {
            str(published.piece_to_id(token)): {"content": token, "special": True}
            for token in ("[unused9]", "[unused10]", "[unused16]", "[unused17]")
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    pangu = ChatTokenizer(tmp_path, "openpangu", "fast")
    text = "[unused9]系统：[unused10][unused9]用户：what is two /no_think[unused10][unused9]助手："
    token_ids = pangu.encode_prompt(MESSAGES)
    assert pangu.prompt_text(MESSAGES) == text
    assert token_ids == tuple(published.encode(text))
    assert token_ids[0] == published.piece_to_id("[unused9]")
    assert published.bos_id() not in token_ids
    assert pangu.stop_token_ids == (published.piece_to_id("[unused10]"),)
    response = published.encode("[unused16]what[unused17]two[unused10]")
    assert pangu.decode_response(response) == "[unused16]what[unused17]two"
