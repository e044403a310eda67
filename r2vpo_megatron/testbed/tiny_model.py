"""Make, and cache, a tiny Hugging Face model folder that trains on a CPU in minutes.

The folder has what a real checkpoint has (config.json, generation_config.json, model.safetensors,
tokenizer files) plus the task (train.jsonl, held_out.jsonl) and manifest.json, which records how it
was made, what was measured, and the digest of every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from r2vpo_megatron.models import pangu_hf
from r2vpo_megatron.testbed import tokenizer
from r2vpo_megatron.testbed.arithmetic import Problem, generate_problems
from r2vpo_megatron.testbed.warm_start import WarmStartSettings, measure_accuracy, train

Architecture = Literal["pangu", "qwen2", "llama"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

NUM_TRAIN_PROMPTS = 4096
NUM_HELD_OUT_PROMPTS = 256
# Prompts, held-out questions and the tokenizer are the same for every seed, so that runs of
# different seeds can be compared question by question.
_DATA_SEED = 0
_SUPERVISED_DATA_SEED = 1
_PROBE_DATA_SEED = 2
_MANIFEST = "manifest.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "sentencepiece")

_logger = logging.getLogger(__name__)


def make_tiny_model(
    output_dir: Path,
    architecture: str = "pangu",
    tied: bool = False,
    seed: int = 0,
    warm_start: bool = True,
) -> dict[str, Any]:
    """Make a model folder of about 0.9M fp32 parameters; returns its manifest.

    The folder appears at once and complete, or not at all. Without the warm start it takes a
    second or two; with it, about a minute on two idle cores.

    Args:
        output_dir: the folder to make; must not exist.
        architecture: one of ARCHITECTURES.
        tied: whether the LM head shares the embedding's weight.
        seed: seed of the initial weights and of the supervised training.
        warm_start: whether to train it to 15-35% sampled accuracy.

    Raises:
        ValueError: for an unknown architecture.
        FileExistsError: if `output_dir` exists.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}; valid: {', '.join(ARCHITECTURES)}")
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"output_dir={str(output_dir)!r} exists; give a new folder")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        manifest = _fill(partial, architecture, tied, seed, warm_start)
        partial.chmod(0o755)  # mkdtemp's folders are private
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def ensure_tiny_model(
    cache_root: Path,
    architecture: str = "pangu",
    tied: bool = False,
    seed: int = 0,
    warm_start: bool = True,
) -> Path:
    """Return a cached model folder, making it first if it is missing or damaged.

    The folder's name holds a hash of all that made it: the arguments, the source text of the
    testbed and of the model class, and the versions of the libraries.

    Args:
        cache_root: folder of the cache; made if missing.
        architecture: as in make_tiny_model.
        tied: as in make_tiny_model.
        seed: as in make_tiny_model.
        warm_start: as in make_tiny_model.
    """
    arguments = {
        "architecture": architecture,
        "tied": tied,
        "seed": seed,
        "warm_start": warm_start,
    }
    folder = Path(cache_root) / f"tiny-{architecture}-{_cache_key(arguments)}"
    if is_intact(folder):
        return folder
    if folder.exists():
        _logger.warning("%s is damaged; making it again", folder)
        shutil.rmtree(folder)
    try:
        make_tiny_model(folder, architecture, tied, seed, warm_start)
    except OSError:
        # Another process may have made it meanwhile; its folder is as good as ours.
        if not is_intact(folder):
            raise
    return folder


def is_intact(folder: Path) -> bool:
    """Whether a model folder has a manifest and every file still has the digest in it."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["files"]) and all(
            _digest(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def config_dict(architecture: str, tied: bool) -> dict[str, Any]:
    """Return config.json with the keys that published checkpoints of the architecture use."""
    config: dict[str, Any] = {
        "architectures": [_MODEL_CLASSES[architecture]],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.BOS_ID,
        "eos_token_id": tokenizer.TURN_END_ID,
        "pad_token_id": tokenizer.PAD_ID,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.08,  # about 1 / sqrt(hidden_size): a tiny model starts faster
        "intermediate_size": 384,
        "max_position_embeddings": 1024,
        "model_type": _MODEL_TYPES[architecture],
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,  # no library's default, so that a lost key shows
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": tokenizer.VOCAB_SIZE,
    }
    if architecture == "pangu":
        config["bias"] = True
    if architecture == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
    return config


_MODEL_TYPES = {"pangu": pangu_hf.PANGU_MODEL_TYPE, "qwen2": "qwen2", "llama": "llama"}
_MODEL_CLASSES = {
    "pangu": "PanguEmbeddedForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}


def _fill(
    folder: Path, architecture: str, tied: bool, seed: int, with_warm_start: bool
) -> dict[str, Any]:
    """Write every file of the model folder into an empty folder; returns the manifest."""
    started = time.monotonic()
    train_problems = generate_problems("train", NUM_TRAIN_PROMPTS, _DATA_SEED)
    held_out = generate_problems("held_out", NUM_HELD_OUT_PROMPTS, _DATA_SEED)
    _write_prompts(folder / "train.jsonl", train_problems)
    _write_prompts(folder / "held_out.jsonl", held_out)
    corpus = [f"{p.question}\n{p.solution}" for p in train_problems]
    tokenizer.write_tokenizer(folder, corpus)
    model = _random_model(architecture, tied, seed)
    manifest: dict[str, Any] = {
        "architecture": architecture,
        "tied": tied,
        "seed": seed,
        "warm_start": None,
        "num_parameters": model.num_parameters(),
        "versions": _versions(),
        "num_threads": torch.get_num_threads(),
    }
    if with_warm_start:
        manifest["warm_start"] = _warm_start(model, folder, held_out, seed)
    _write_weights(folder / "model.safetensors", model, tied)
    _write_json(folder / "config.json", config_dict(architecture, tied))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": tokenizer.BOS_ID,
            "eos_token_id": tokenizer.TURN_END_ID,
            "pad_token_id": tokenizer.PAD_ID,
        },
    )
    manifest["seconds"] = round(time.monotonic() - started, 2)
    manifest["files"] = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    _write_json(folder / _MANIFEST, manifest)
    return manifest


def _random_model(architecture: str, tied: bool, seed: int) -> Any:
    """Initialise a model; leaves the global random state as it was."""
    pangu_hf.register_with_transformers()
    values = config_dict(architecture, tied)
    config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # transformers starts biases at 0 and norms at 1, where a bias or a norm that got lost on
        # the way to another framework would go unnoticed.
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def _warm_start(model: Any, folder: Path, held_out: Sequence[Problem], seed: int) -> dict[str, Any]:
    """Train `model` in place; returns what the manifest says of it."""
    settings = WarmStartSettings()
    hf_tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = generate_problems("train", settings.num_problems, _SUPERVISED_DATA_SEED)
    probes = generate_problems("train", settings.num_probe_problems, _PROBE_DATA_SEED)
    started = time.monotonic()
    result = train(model, hf_tokenizer, problems, probes, settings, seed)
    seconds = round(time.monotonic() - started, 2)
    sampled = measure_accuracy(model, hf_tokenizer, held_out, samples_per_problem=4)
    greedy = measure_accuracy(model, hf_tokenizer, held_out, greedy=True)
    return {
        "settings": dataclasses.asdict(settings),
        "result": dataclasses.asdict(result),
        "seconds": seconds,
        "held_out_accuracy_sampled": sampled,
        "held_out_accuracy_greedy": greedy,
    }


def _write_weights(path: Path, model: Any, tied: bool) -> None:
    """Write the weights under their Hugging Face names; a tied LM head is not stored twice."""
    weights = model.state_dict()
    if tied:
        del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def _write_prompts(path: Path, problems: Sequence[Problem]) -> None:
    lines = [
        json.dumps(
            {
                "prompt_id": problem.prompt_id,
                "messages": [{"role": "user", "content": problem.question}],
                "ground_truth": problem.ground_truth,
            }
        )
        for problem in problems
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), **versions}


def _cache_key(arguments: dict[str, Any]) -> str:
    paths = [*sorted(Path(__file__).parent.glob("*.py")), Path(pangu_hf.__file__)]
    made_of = {
        "arguments": arguments,
        "sources": [path.read_text(encoding="utf-8") for path in paths],
        "versions": _versions(),
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
