"""What is refused before an engine sees it, and what an engine expects of a push."""

from __future__ import annotations

import configparser
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from r2vpo_megatron.rollout.engine_settings import (
    PLUGINS,
    engine_arguments,
    engine_environment,
)
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import VLLMEngine, checkpoint_tensor_names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_response_tokens": 0}, "max_response_tokens=0"),
        ({"temperature": 0.0}, r"temperature=0.0: must be in \[0.01, 2\]"),
        ({"temperature": 2.5}, "temperature=2.5"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"stop_token_ids": (5, -2)}, "stop_token_ids"),
        ({"greedy": True, "temperature": 0.6}, "greedy=True with temperature=0.6"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**{"max_response_tokens": 8, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"top_p": 0.95}, "top_p=0.95"), ({"top_k": 50}, "top_k=50")],
)
def test_truncated_sampling_is_refused_for_training(fields: dict[str, Any], message: str) -> None:
    SamplingSettings(8, **fields)  # fine for evaluation
    with pytest.raises(ValueError, match=f"{message}: training"):
        SamplingSettings.for_training(8, (2,), **fields)


def test_greedy_decoding_is_refused_for_training() -> None:
    with pytest.raises(ValueError, match="greedy"):
        SamplingSettings(8, greedy=True).require_trainable()
    assert SamplingSettings.for_training(8, (2,), temperature=0.7).temperature == 0.7


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device_name='tpu': must be one of cpu, cuda, npu"):
        engine_environment("tpu")
    assert engine_environment("cpu", num_threads=3)["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in engine_environment("npu")


def test_a_list_of_plug_ins_gets_those_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "VLLM_PLUGINS" not in engine_environment("npu")  # vLLM then loads all
    monkeypatch.setenv("VLLM_PLUGINS", "ascend,openpangu")
    assert engine_environment("npu")["VLLM_PLUGINS"] == "ascend,openpangu,r2vpo_weight_transfer"
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parents[2] / "setup.cfg")
    announced = setup["options.entry_points"]["vllm.general_plugins"].strip().splitlines()
    assert tuple(line.split("=")[0].strip() for line in announced) == PLUGINS


def test_the_nz_layout_is_off_however_it_is_asked_for() -> None:
    assert engine_environment("npu")["VLLM_ASCEND_ENABLE_NZ"] == "0"
    arguments = engine_arguments(
        Path("model"),
        dtype="bfloat16",
        max_model_len=64,
        kv_cache_bytes=1 << 20,
        memory_fraction=None,
        max_num_seqs=4,
        tensor_parallel=1,
        seed=3,
        device_name="npu",
    )
    assert arguments["additional_config"] == {"weight_nz_mode": 0}


@pytest.mark.parametrize("device_name", ["cuda", "npu"])
def test_a_share_of_the_memory_decides_on_accelerators(device_name: str) -> None:
    arguments = {
        "dtype": "bfloat16",
        "max_model_len": 64,
        "kv_cache_bytes": 1 << 20,
        "max_num_seqs": 4,
        "tensor_parallel": 2,
        "seed": 3,
    }
    model_dir = Path("model")

    on_cpu = engine_arguments(model_dir, device_name="cpu", memory_fraction=0.6, **arguments)
    assert on_cpu["kv_cache_memory_bytes"] == 1 << 20
    assert "gpu_memory_utilization" not in on_cpu

    assert on_cpu["async_scheduling"] is False

    given = engine_arguments(model_dir, device_name=device_name, memory_fraction=0.6, **arguments)
    assert given["gpu_memory_utilization"] == 0.6
    assert "kv_cache_memory_bytes" not in given
    assert given["async_scheduling"] is False
    assert (given["dtype"], given["tensor_parallel_size"], given["seed"]) == ("bfloat16", 2, 3)

    left = engine_arguments(model_dir, device_name=device_name, memory_fraction=None, **arguments)
    assert left.keys() == given.keys() - {"gpu_memory_utilization"}


@pytest.mark.parametrize(
    ("max_model_len", "max_num_seqs", "tokens_per_step"),
    [(192, 8, 4096), (4096, 1, 4097), (18432, 256, 18688)],
)
def test_a_step_on_a_cpu_has_room_for_the_longest_response_beside_all_others(
    max_model_len: int, max_num_seqs: int, tokens_per_step: int
) -> None:
    arguments = engine_arguments(
        Path("model"),
        dtype="float32",
        max_model_len=max_model_len,
        kv_cache_bytes=1,
        memory_fraction=None,
        max_num_seqs=max_num_seqs,
        tensor_parallel=1,
        seed=0,
        device_name="cpu",
    )
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] == tokens_per_step


def test_a_folder_without_config_is_refused_before_vllm_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        VLLMEngine(tmp_path, max_model_len=8)


def write_config(folder: Path, tied: bool) -> None:
    config = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 16,
        "max_position_embeddings": 8,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("tied", [False, True])
def test_a_push_must_bring_the_checkpoints_weights(tmp_path: Path, tied: bool) -> None:
    write_config(tmp_path, tied)
    with pytest.raises(ValueError, match="only safetensors checkpoints are read"):
        checkpoint_tensor_names(tmp_path)
    files = {
        "1.safetensors": ["embed", "layers.0.rotary_emb.inv_freq"],
        "2.safetensors": ["lm_head.weight", "norm"],
        "consolidated.safetensors": ["tok_embeddings", "output"],  # the same weights, other names
    }
    for file_name, names in files.items():
        save_file({name: torch.zeros(1) for name in names}, tmp_path / file_name)
    weight_map = {
        name: file_name
        for file_name, names in files.items()
        if file_name != "consolidated.safetensors"
        for name in names
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    expected = {"embed", "norm"} if tied else {"embed", "norm", "lm_head.weight"}
    assert checkpoint_tensor_names(tmp_path) == expected
