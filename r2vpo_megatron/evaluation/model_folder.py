"""Which model is evaluated: the folder that holds it, and what tells it from others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.content_sample import add_content_sample

# What decides prompts and ends of responses, beside the weights.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)
_SLOW_TOKENIZER = ("vocab.json", "merges.txt")  # of a model without tokenizer.json


@dataclass(frozen=True)
class ModelFolder:
    """A model by its place.

    Attributes:
        name: of the folder that the user gave; a default for what is named after the model.
        folder: Hugging Face checkpoint, absolute.
        checkpoint: which weights these are of a training run; empty where it is none.
        base: name of the model that the run started from; empty likewise.
    """

    name: str
    folder: Path
    checkpoint: str = ""
    base: str = ""


def find_model(path: str | Path) -> ModelFolder:
    """Find the checkpoint in a Hugging Face folder or in that of a training run.

    Args:
        path: what --model was given.

    Raises:
        ValueError: there is none; a run has one only when it has ended.
    """
    given = Path(path).resolve()
    if not given.is_dir():
        raise ValueError(
            f"--model {path}: no such folder; valid: a folder with a Hugging Face checkpoint, or "
            "that of a training run"
        )
    config = _read_config(given)
    if not _is_run_config(config):
        return ModelFolder(given.parent.name if given.name == "hf" else given.name, given)
    folder = given / "hf"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"--model {path}: a training run without final weights: {folder} is missing (a run "
            "writes it at its end); valid: a run that has ended, or a folder with a Hugging Face "
            "checkpoint"
        )
    return ModelFolder(given.name, folder, checkpoint="hf", base=_base_of(config))


def fingerprint_model(folder: Path) -> str:
    """A hash that differs between models, also between two states of one training.

    Large weight files are sampled; see `add_content_sample`.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    slow = () if (folder / "tokenizer.json").is_file() else _SLOW_TOKENIZER
    for name in [*_SMALL_FILES, *slow, *weights]:
        path = folder / name
        if not path.is_file():
            continue
        digest.update(f"{name}:".encode())
        add_content_sample(digest, path)
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"--model {folder}: has no config.json; valid: a folder with a Hugging Face "
            "checkpoint, or that of a training run"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; valid: a JSON object")
    return content


def _is_run_config(config: dict[str, Any]) -> bool:
    """As `write_run_config` makes it."""
    return {"recipe", "config"} <= config.keys()


def _base_of(config: dict[str, Any]) -> str:
    """The model that a run started from; older versions wrote no `model_dir`."""
    if isinstance(model_dir := config.get("model_dir"), str):
        return Path(model_dir).name
    sections = config["config"]
    model = sections.get("model") if isinstance(sections, dict) else None
    if not isinstance(model, dict):
        return ""
    testbed = model.get("testbed")
    return f"tiny {testbed}" if testbed else Path(str(model.get("path", ""))).name
