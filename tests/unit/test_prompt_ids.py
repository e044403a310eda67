"""Prompt ids are made once: the engine's requests and the learner's batches hold these very ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from r2vpo_megatron.config import AlgorithmConfig, RolloutConfig, RunConfig, TrainConfig
from r2vpo_megatron.data.chat import ChatTokenizer, tokenize_prompts
from r2vpo_megatron.data.packing import pack
from r2vpo_megatron.data.prompts import RawPrompt
from r2vpo_megatron.orchestration.collect import Collector
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt, Trajectory
from r2vpo_megatron.rewards import RewardResult
from tests.byte_tokenizers import write_byte_tokenizer

TEXTS = ("What is 1+1?", "求 2+2 的值")


@dataclass
class RecordingRollout:
    requests: list[GenerationRequest] = field(default_factory=list)

    def submit(self, requests: Sequence[GenerationRequest], _: Any) -> None:
        self.requests += requests

    def wait_for(self, choose: Any) -> Any:
        return choose({request.sample_id for request in self.requests})

    def take(self, sample_ids: Sequence[str]) -> list[Generation]:
        logprobs, versions = np.full(2, -1.0, dtype=np.float32), np.zeros(2, dtype=np.int64)
        return [Generation(name, (40, 41), logprobs, "stop", versions) for name in sample_ids]


@dataclass
class Stream:
    prompts: list[Prompt]

    def take(self, count: int) -> list[Prompt]:
        return self.prompts[:count]


@dataclass
class RecordingLearner:
    seen: list[Trajectory] = field(default_factory=list)

    def compute_logprobs(self, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        self.seen += trajectories
        return {t.sample_id: np.full(2, -1.0, dtype=np.float32) for t in trajectories}


def judge(_prompt: Prompt, _text: str) -> RewardResult:
    return RewardResult(score=1.0, acc=True, pred=None, parsed=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plain text gets <bos> in front, as openPangu's and DeepSeek-R1-Distill's tokenizers do it."""
    write_byte_tokenizer(tmp_path)
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("chat_template", "before", "after"),
    [
        ("plain", "", ""),
        ("openpangu", "[unused9]系统：[unused10][unused9]用户：", "[unused10][unused9]助手："),
        ("deepseek_r1", "<bos><｜User｜>", "<｜Assistant｜><think>\n"),
    ],
)
def test_requests_trajectories_and_packed_batches_hold_the_same_ids(
    folder: Path, chat_template: str, before: str, after: str
) -> None:
    tokenizer = ChatTokenizer(folder, chat_template)
    raw = [
        RawPrompt(f"p{index}", ({"role": "user", "content": text},), "2")
        for index, text in enumerate(TEXTS)
    ]
    prompts, _ = tokenize_prompts(raw, tokenizer)
    config = RunConfig(
        train=TrainConfig(prompts_per_iteration=2, responses_per_prompt=2),
        algorithm=AlgorithmConfig(),
        rollout=RolloutConfig(max_response_tokens=4),
    )
    rollout, learner = RecordingRollout(), RecordingLearner()
    parts: Any = (Stream(prompts), rollout, learner)
    trajectories = Collector(config, tokenizer, judge, *parts).collect(1).trajectories

    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = [
        tuple(reference.encode(before + text + after, add_special_tokens=False).ids)
        for text in TEXTS
        for _ in range(2)
    ]
    assert [request.prompt_token_ids for request in rollout.requests] == wanted
    assert [trajectory.prompt_token_ids for trajectory in learner.seen] == wanted
    assert [trajectory.prompt_token_ids for trajectory in trajectories] == wanted
    batch = pack(trajectories)
    for index, ids in enumerate(wanted):
        start = batch.cumulative_lengths[index]
        assert tuple(batch.token_ids[start : start + len(ids)]) == ids
        assert list(batch.token_ids[start : start + len(ids)]).count(0) == before.count("<bos>")
