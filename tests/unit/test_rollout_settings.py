"""What is refused before an engine sees it, and what an engine expects of a push."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import (
    VLLMEngine,
    checkpoint_tensor_names,
    engine_environment,
)


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


def test_a_folder_without_config_is_refused_before_vllm_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_dir=.*holds no config\.json"):
        VLLMEngine(tmp_path, max_model_len=8)


@pytest.mark.parametrize("tied", [False, True])
def test_a_push_must_bring_the_checkpoints_weights(tmp_path: Path, tied: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    assert checkpoint_tensor_names(tmp_path) is None
    embed, inv_freq, head, norm = (torch.zeros(1) for _ in range(4))
    save_file(
        {"embed": embed, "layers.0.rotary_emb.inv_freq": inv_freq}, tmp_path / "1.safetensors"
    )
    save_file({"lm_head.weight": head, "norm": norm}, tmp_path / "2.safetensors")
    expected = {"embed", "norm"} if tied else {"embed", "norm", "lm_head.weight"}
    assert checkpoint_tensor_names(tmp_path) == expected
