"""What a checkpoint folder holds beside weights: copied byte for byte, never executed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.models.spec import ModelSpec

# Configs and vocabularies; tokenizers of other kinds; chat templates; remote code.
_SUFFIXES = frozenset(
    {".json", ".txt", ".yaml", ".yml", ".jinja", ".py"}
    | {".model", ".tiktoken", ".bpe", ".vocab", ".tokens"}
)
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
)
_INDEX_ENDING = ".index.json"
# Speak of the weights of one folder: of its conversion, of a training run's state.
_RECORDS = frozenset({"conversion.json", "manifest.json", "trainer_state.json"})
_TEMPLATE_FOLDER = "chat_templates"
_TERMS = re.compile(r"licen[cs]e|notice|copying|readme", re.IGNORECASE)

# Keys that mean in Llama's config what they mean in any decoder's.
_KEPT_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "transformers_version",
)


@dataclass(frozen=True)
class CopiedCompanions:
    """What copy_companions did, by name; files of chat_templates/ with the folder's name."""

    copied: tuple[str, ...]
    left_out: tuple[str, ...]  # folders end in "/"


def copy_companions(source: str | Path, target: str | Path) -> CopiedCompanions:
    """Copy config, tokenizer, templates, remote code, licence and readme of a model folder.

    Weights, their indexes and records, hidden files, folders other than chat_templates/ and files
    of unknown kinds are left out. A symbolic link is followed if it leads to a regular file, and
    copied as that file.

    Args:
        source: folder of a Hugging Face checkpoint.
        target: folder to copy to; made if it does not exist, files of the same names replaced.

    Returns:
        Names that were copied and names that were not.

    Raises:
        ValueError: source is not a folder.
        OSError: a file cannot be read or written.
    """
    source, target = Path(source), Path(target)
    companions = list_companions(source)
    target.mkdir(parents=True, exist_ok=True)
    for name in companions.copied:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return companions


def list_companions(source: str | Path) -> CopiedCompanions:
    """What copy_companions would do; nothing is written.

    Raises:
        ValueError: source is not a folder.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"model folder {source}: does not exist or is not a folder")
    copied, left_out = [], []
    for path in _candidates(source):
        name = path.relative_to(source).as_posix()
        if _is_companion(path):
            copied.append(name)
        else:
            left_out.append(f"{name}/" if path.is_dir() else name)
    return CopiedCompanions(tuple(copied), tuple(left_out))


def not_copied(source: str | Path) -> tuple[str, ...]:
    """What of a model folder a conversion leaves behind, for a person to read.

    Returns:
        What copy_companions leaves out, less what nobody misses: hidden files, safetensors and
        their index, whose tensors a conversion writes itself, and conversion.json.

    Raises:
        ValueError: source is not a folder.
    """
    return tuple(
        name
        for name in list_companions(source).left_out
        if not Path(name).name.startswith(".")
        and not name.endswith((".safetensors", ".safetensors.index.json"))
        and name != "conversion.json"
    )


def _candidates(source: Path) -> list[Path]:
    paths = []
    for path in sorted(source.iterdir()):
        if path.name == _TEMPLATE_FOLDER and path.is_dir() and not path.is_symlink():
            paths += sorted(path.iterdir())
        else:
            paths.append(path)
    return paths


def _is_companion(path: Path) -> bool:
    suffix = path.suffix.lower()
    if path.name.startswith(".") or not path.is_file():
        return False
    if suffix in _WEIGHT_SUFFIXES or path.name.endswith(_INDEX_ENDING) or path.name in _RECORDS:
        return False
    return suffix in _SUFFIXES or _TERMS.search(path.name) is not None


def state_dtype(config_path: Path, dtype: str) -> None:
    """Correct config.json's dtype: loaders that follow it would cast the weights.

    Args:
        config_path: left untouched if it states this dtype already.
        dtype: as in config.json, "bfloat16".
    """
    config = json.loads(config_path.read_text(encoding="utf-8"))
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if all(config.get(key) == dtype for key in keys):
        return
    config.update(dict.fromkeys(keys, dtype))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    config_path.write_text(text, encoding="utf-8")


def llama_config(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """config.json with which the same weights serve as LlamaForCausalLM.

    RoPE's base and the dtype are stated under the keys of transformers 5 and under those of
    older releases.

    Args:
        config: the model's config.json.
        spec: read from the same file.

    Raises:
        ValueError: q, k, v and o are not all with bias or all without.
    """
    if spec.qkv_bias != spec.o_bias:
        raise ValueError(
            f"a {spec.architecture} model cannot be written as Llama: it has a bias on "
            f"{'q, k and v' if spec.qkv_bias else 'o'} only, and Llama has one switch "
            "(attention_bias) for q, k, v and o"
        )
    llama: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.ffn_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "attention_bias": spec.qkv_bias,
        "mlp_bias": False,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    llama.update({key: config[key] for key in _KEPT_KEYS if key in config})
    if config.get("dtype") or config.get("torch_dtype"):
        llama.update(dtype=spec.dtype, torch_dtype=spec.dtype)
    return llama
