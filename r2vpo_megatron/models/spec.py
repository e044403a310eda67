"""The shape of a model, read from the config.json of a Hugging Face checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.config import ParallelConfig
from r2vpo_megatron.models import ARCHITECTURES
from r2vpo_megatron.models.pipeline import layers_of_chunks

_VOCAB_MULTIPLE = 128  # rows of the embedding per tensor-parallel rank, for matrix units
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder: pre-norm RMSNorm, rotate-half RoPE, grouped-query attention, SwiGLU."""

    architecture: str  # key of ARCHITECTURES
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int  # as in config.json, before any padding
    rope_theta: float
    norm_eps: float
    max_positions: int  # tokens of prompt and response together
    qkv_bias: bool
    o_bias: bool
    tied_embeddings: bool
    dtype: str  # of the checkpoint: "bfloat16", ...

    @property
    def heads_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Parameters of the Hugging Face checkpoint, a tied embedding counted once."""
        query_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        qkv_size = query_size + 2 * kv_size
        attention = self.hidden_size * (qkv_size + query_size)
        attention += qkv_size * self.qkv_bias + self.hidden_size * self.o_bias
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size


def read_model_spec(model_dir: str | Path) -> ModelSpec:
    """Read `model_dir`/config.json.

    Args:
        model_dir: folder of a Hugging Face checkpoint.

    Raises:
        ValueError: no such folder or file, a key that is missing or has a value this project
            has no code for, an unknown architecture. The message names file, key and remedy.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise ValueError(f"model folder {folder}: does not exist or is not a folder")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model folder {folder}: has no config.json; give a Hugging Face checkpoint folder"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of encoding, syntax, long numbers, depth
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return _spec_from_config(_Config(path, raw))


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding once padded to a multiple of 128 for each of `tensor` ranks."""
    multiple = _VOCAB_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def validate_layout(
    spec: ModelSpec,
    tensor: int,
    pipeline: int,
    virtual_pipeline: int | None = None,
    pipeline_layout: str = "",
) -> None:
    """Check that the model can be cut into `tensor` x `pipeline` (x `virtual_pipeline`) parts.

    Args:
        spec: the model.
        tensor: tensor-parallel size.
        pipeline: pipeline stages.
        virtual_pipeline: model chunks per stage, None for one.
        pipeline_layout: layers of each chunk, see models/pipeline.py; empty for an even split.

    Raises:
        ValueError: naming both numbers and what is valid.
    """
    if tensor not in valid_tensor_sizes(spec):
        raise ValueError(
            f"tensor parallel size {tensor} does not fit {spec.num_heads} attention heads and "
            f"{spec.num_kv_heads} KV heads (ffn {spec.ffn_size}); "
            f"valid sizes: {_join(valid_tensor_sizes(spec))}"
        )
    layers_of_chunks(spec.num_layers, pipeline, virtual_pipeline, pipeline_layout)


def validate_parallel(spec: ModelSpec, parallel: ParallelConfig) -> None:
    """Check that the model can be cut as a run's configuration says; see `validate_layout`."""
    validate_layout(
        spec,
        parallel.tensor,
        parallel.pipeline,
        parallel.interleaved_chunks,
        parallel.pipeline_layout,
    )


def valid_tensor_sizes(spec: ModelSpec) -> list[int]:
    """Tensor-parallel sizes that divide the heads, the KV heads and the MLP."""
    return [
        size
        for size in range(1, spec.num_kv_heads + 1)
        if spec.num_kv_heads % size == 0
        and spec.num_heads % size == 0
        and spec.ffn_size % size == 0
    ]


class _Config:
    """config.json with lookups whose errors name file and key."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"{self.path}: key {key!r} is missing; it must be a positive integer")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {key} = {value!r}: must be a positive integer")
        return value

    def positive_float(self, key: str, source: Mapping[str, Any] | None = None) -> float:
        value = (self.raw if source is None else source).get(key)
        if value is None:
            raise ValueError(f"{self.path}: key {key!r} is missing; it must be a positive number")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.path}: {key} = {value!r}: must be a positive number")
        if not 0 < value <= sys.float_info.max:
            raise ValueError(f"{self.path}: {key} = {value!r}: must be a positive number, finite")
        return float(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: {key} = {value!r}: must be an object or null")
        return value

    def architecture(self) -> str:
        model_type = self.raw.get("model_type")
        for name, architecture in ARCHITECTURES.items():
            if architecture.model_type == model_type:
                return name
        valid = ", ".join(architecture.model_type for architecture in ARCHITECTURES.values())
        raise ValueError(f"{self.path}: model_type = {model_type!r}: must be one of {valid}")

    def rope_theta(self) -> float:
        """Base of the rotary frequencies, from `rope_theta` or transformers 5's parameters."""
        scaling = self.mapping("rope_scaling")
        parameters = self.mapping("rope_parameters")
        for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
            kind = value.get("rope_type", value.get("type", "default"))
            if kind != "default":
                raise ValueError(
                    f"{self.path}: {key} asks for RoPE scaling {kind!r}; only 'default' "
                    "(no scaling) is supported"
                )
        if "rope_theta" in parameters:
            return self.positive_float("rope_theta", parameters)
        return self.positive_float("rope_theta")


def _spec_from_config(config: _Config) -> ModelSpec:
    name = config.architecture()
    architecture = ARCHITECTURES[name]
    raw = config.raw
    for key, required in architecture.required_values.items():
        if raw.get(key, required) != required:
            raise ValueError(
                f"{config.path}: {key} = {raw[key]!r}: only {required!r} is supported for "
                f"{architecture.model_type}"
            )
    num_heads = config.positive_int("num_attention_heads")
    num_kv_heads = config.positive_int("num_key_value_heads", default=num_heads)
    hidden_size = config.positive_int("hidden_size")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{config.path}: num_key_value_heads = {num_kv_heads}: must divide "
            f"num_attention_heads = {num_heads}"
        )
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in _DTYPES:
        raise ValueError(f"{config.path}: dtype = {dtype!r}: must be one of {', '.join(_DTYPES)}")
    qkv_bias, o_bias = architecture.attention_biases(raw)
    return ModelSpec(
        architecture=name,
        num_layers=config.positive_int("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.positive_int("head_dim", default=hidden_size // num_heads),
        ffn_size=config.positive_int("intermediate_size"),
        vocab_size=config.positive_int("vocab_size"),
        rope_theta=config.rope_theta(),
        norm_eps=config.positive_float("rms_norm_eps"),
        max_positions=config.positive_int("max_position_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
    )


def _join(sizes: list[int]) -> str:
    return ", ".join(str(size) for size in sizes)
