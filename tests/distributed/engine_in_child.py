"""VLLMEngine in a child process, small random models for it, and what transformers says of them.

The engine lives in a child process, as it does in a run, so that pushes cross a process border
and nothing that vLLM changes in its process touches other tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import operator
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from r2vpo_megatron.models.pangu_hf import PanguEmbeddedConfig, PanguEmbeddedForCausalLM
from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout import engine_settings
from r2vpo_megatron.rollout.engine import EngineReport
from r2vpo_megatron.rollout.engine_settings import engine_environment
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import VLLMEngine
from r2vpo_megatron.weight_sync import SharedMemorySender

VOCAB_SIZE = 300
MAX_MODEL_LEN = 192
MAX_NUM_SEQS = 8
NUM_NEW_TOKENS = 12
# The last prompt is longer than a block of the KV cache (128 tokens on a CPU): a prefix cache that
# outlives its weights would be seen.
PROMPT_LENGTHS = [3, 8, 13, 18, 23, 28, 33, 160]
PROMPTS = [
    [(7 * i + 11 * j) % VOCAB_SIZE for j in range(length)]
    for i, length in enumerate(PROMPT_LENGTHS)
]
GREEDY = SamplingSettings(NUM_NEW_TOKENS, greedy=True)
# Splits layers and fused projections over buckets; the second takes a model in one bucket.
SMALL_BUCKET_BYTES, LARGE_BUCKET_BYTES = 16 << 10, 64 << 20


def make_model(architecture: str, seed: int) -> PreTrainedModel:
    """A random model whose weights are large enough to make greedy choices clear."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    model: PreTrainedModel
    if architecture == "qwen2":
        config = Qwen2Config(**{**fields, "num_key_value_heads": 2, "hidden_size": 128})
        model = Qwen2ForCausalLM(config)
    else:
        tied = architecture == "pangu_tied"
        pangu = PanguEmbeddedConfig(**fields, bias=True, tie_word_embeddings=tied)
        model = PanguEmbeddedForCausalLM(pangu)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.float().eval()


def checkpoint_tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    tied = model.config.tie_word_embeddings
    state = model.state_dict()
    return [(name, state[name]) for name in state if not (tied and name == "lm_head.weight")]


@torch.no_grad()
def hf_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([list(token_ids)])).logits[0].double()


def hf_greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[int, ...]:
    token_ids = list(prompt)
    for _ in range(NUM_NEW_TOKENS):
        token_ids.append(int(hf_logits(model, token_ids)[-1].argmax()))
    return tuple(token_ids[len(prompt) :])


def hf_logprobs(
    model: PreTrainedModel, prompt: list[int], response: Sequence[int], temperature: float
) -> np.ndarray:
    logits = hf_logits(model, [*prompt, *response])[len(prompt) - 1 : -1] / temperature
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])
    return chosen[:, 0].numpy()


class EngineInChild:
    """A VLLMEngine in the one process of a pool."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def call(self, method: str, *args: Any) -> Any:
        return self._pool.submit(call_engine, method, args).result(timeout=120)

    def greedy(self) -> list[tuple[int, ...]]:
        requests = [GenerationRequest(str(i), tuple(p), i) for i, p in enumerate(PROMPTS)]
        return [generation.token_ids for generation in self.call("generate", requests, GREEDY)]

    def push(self, version: int, model: PreTrainedModel, bucket_bytes: int) -> dict[str, float]:
        sender = SharedMemorySender(bucket_bytes)
        self.call("weights.begin", version)
        for bucket in sender.buckets(version, checkpoint_tensors(model)):
            self.call("weights.load", bucket)
        self.call("weights.finish", version, sender.push_checksum)
        return sender.metrics()


class Pushes:
    """An engine, and the model of every version that it has served."""

    def __init__(self, engine: EngineInChild, model: PreTrainedModel) -> None:
        self.engine = engine
        self.models = {int(engine.call("policy_version")): model}

    @property
    def version(self) -> int:
        return max(self.models)

    def push(self, model: PreTrainedModel, bucket_bytes: int = LARGE_BUCKET_BYTES) -> int:
        version = self.version + 1
        self.engine.push(version, model, bucket_bytes)
        self.models[version] = model
        return version

    def steps(self, count: int) -> list[Generation]:
        return [done for _ in range(count) for done in self.engine.call("advance", 0.0).finished]

    def finish(self) -> list[Generation]:
        report: EngineReport = self.engine.call("advance", 1e9)
        assert report.num_unfinished == 0
        return report.finished

    def check_logprobs(
        self, prompt: Sequence[int], generation: Generation, before: Sequence[int] = ()
    ) -> None:
        """Each token's log-prob is the one under the version that it is stamped with."""
        response = [*before, *generation.token_ids]
        assert generation.policy_versions.dtype == np.int64
        assert len(generation.policy_versions) == len(generation.token_ids)
        assert (np.diff(generation.policy_versions) >= 0).all()
        by_version = {
            version: hf_logprobs(model, list(prompt), response, 1.0)[len(before) :]
            for version, model in self.models.items()
        }
        expected = [
            by_version[version][place] for place, version in enumerate(generation.policy_versions)
        ]
        np.testing.assert_allclose(generation.rollout_logprobs, expected, atol=1e-4)


ENGINE_OF_CHILD: list[VLLMEngine] = []  # filled in the child process only


def start_engine(
    model_dir: Path,
    tensor_parallel: int = 1,
    min_tokens_per_step: int = engine_settings.MIN_TOKENS_PER_STEP,
) -> None:
    with mock.patch.object(engine_settings, "MIN_TOKENS_PER_STEP", min_tokens_per_step):
        engine = VLLMEngine(
            model_dir,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            tensor_parallel=tensor_parallel,
        )
    ENGINE_OF_CHILD.append(engine)


def stop_engine() -> None:
    ENGINE_OF_CHILD.pop().shutdown()


def call_engine(method: str, args: tuple[Any, ...]) -> Any:
    member = operator.attrgetter(method)(ENGINE_OF_CHILD[0])
    return member(*args) if callable(member) else member


@contextlib.contextmanager
def engine_process() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, engine_environment("cpu")),
        ProcessPoolExecutor(max_workers=1, mp_context=context) as pool,
    ):
        pool.submit(os.getpid).result()  # the child has this environment now
        yield pool
