"""A tokenizer of bytes that puts <bos> in front of plain text, as openPangu's does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<bos>", "<eos>", "<｜User｜>", "<｜Assistant｜>", "[unused9]", "[unused10]"]


def write_byte_tokenizer(folder: Path, special: Sequence[str] = SPECIAL) -> None:
    """Write tokenizer.json; `special`, <bos> first, become the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=list(special))
    tokenizer.train_from_iterator([], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
