"""The vLLM engine against Hugging Face transformers: samples, log-probs and weight pushes.

The engine lives in a child process, as it does in a run, so that pushes cross a process border
and nothing that vLLM changes in its process touches other tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from r2vpo_megatron.models.pangu_hf import PanguEmbeddedConfig, PanguEmbeddedForCausalLM
from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.engine import WeightUpdateError
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.vllm_engine import VLLMEngine, engine_environment
from r2vpo_megatron.weight_sync import SharedMemorySender

pytest.importorskip("vllm")

VOCAB_SIZE = 300
MAX_MODEL_LEN = 192
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
        self.call("begin_weight_update", version)
        for bucket in sender.buckets(version, checkpoint_tensors(model)):
            self.call("load_weight_bucket", bucket)
        self.call("finish_weight_update", version, sender.push_checksum)
        return sender.metrics()


ENGINE_OF_CHILD: list[VLLMEngine] = []  # filled in the child process only


def start_engine(model_dir: Path, tensor_parallel: int = 1) -> None:
    engine = VLLMEngine(
        model_dir, max_model_len=MAX_MODEL_LEN, max_num_seqs=8, tensor_parallel=tensor_parallel
    )
    ENGINE_OF_CHILD.append(engine)


def stop_engine() -> None:
    ENGINE_OF_CHILD.pop().shutdown()


def call_engine(method: str, args: tuple[Any, ...]) -> Any:
    member = getattr(ENGINE_OF_CHILD[0], method)
    return member(*args) if callable(member) else member


@pytest.fixture(scope="module", params=["pangu_tied", "pangu_untied", "qwen2"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_a(architecture: str) -> PreTrainedModel:
    model = make_model(architecture, seed=1)
    # Only stop_token_ids may end a response: an end-of-sequence id of the checkpoint that the
    # greedy response holds in its middle makes every test below notice otherwise.
    eos_token_id = hf_greedy(model, PROMPTS[0])[1]
    model.config.eos_token_id = model.generation_config.eos_token_id = eos_token_id
    return model


@pytest.fixture(scope="module")
def model_b(architecture: str) -> PreTrainedModel:
    return make_model(architecture, seed=2)


@contextlib.contextmanager
def engine_process() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, engine_environment("cpu")),
        ProcessPoolExecutor(max_workers=1, mp_context=context) as pool,
    ):
        pool.submit(os.getpid).result()  # the child has this environment now
        yield pool


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with engine_process() as pool:
        yield pool


@pytest.fixture(scope="module")
def running_engine(
    model_a: PreTrainedModel, pool: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineInChild]:
    model_dir = tmp_path_factory.mktemp("model_a")
    model_a.save_pretrained(model_dir)
    pool.submit(start_engine, model_dir).result(timeout=120)
    yield EngineInChild(pool)
    pool.submit(stop_engine).result(timeout=60)


@pytest.fixture
def engine(running_engine: EngineInChild, model_a: PreTrainedModel) -> EngineInChild:
    """The engine serving model A, whatever the test before has left in it."""
    version = running_engine.call("policy_version") + 1
    if version > 1:
        running_engine.push(version, model_a, LARGE_BUCKET_BYTES)
    return running_engine


def sample(
    engine: EngineInChild, order: Sequence[int], sampling: SamplingSettings
) -> list[Generation]:
    requests = [GenerationRequest(f"sample-{i}", tuple(PROMPTS[i]), seed=100 + i) for i in order]
    return engine.call("generate", requests, sampling)


def test_greedy_output_equals_transformers(engine: EngineInChild, model_a: PreTrainedModel) -> None:
    assert engine.greedy() == [hf_greedy(model_a, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollout_logprobs_are_those_at_the_sampling_temperature(
    engine: EngineInChild, model_a: PreTrainedModel, temperature: float
) -> None:
    sampling = SamplingSettings.for_training(NUM_NEW_TOKENS, (), temperature=temperature)
    for prompt, generation in zip(PROMPTS, sample(engine, range(8), sampling), strict=True):
        assert generation.finish_reason == "length"
        expected = hf_logprobs(model_a, prompt, generation.token_ids, temperature)
        np.testing.assert_allclose(generation.rollout_logprobs, expected, atol=1e-4)


def test_score_equals_transformers(engine: EngineInChild, model_a: PreTrainedModel) -> None:
    scored = engine.call("score", [*PROMPTS, [5]])
    for prompt, logprobs in zip(PROMPTS, scored, strict=False):
        np.testing.assert_allclose(
            logprobs, hf_logprobs(model_a, prompt[:1], prompt[1:], 1.0), atol=1e-4
        )
    assert len(scored[-1]) == 0


def test_a_seed_gives_one_response_in_any_batch_and_order(engine: EngineInChild) -> None:
    sampling = SamplingSettings.for_training(NUM_NEW_TOKENS, ())
    forward = sample(engine, range(8), sampling)
    backward = sample(engine, range(7, -1, -1), sampling)
    assert [g.sample_id for g in backward] == [f"sample-{i}" for i in range(7, -1, -1)]
    assert [g.token_ids for g in backward] == [g.token_ids for g in reversed(forward)]
    assert sample(engine, [3], sampling)[0].token_ids == forward[3].token_ids

    again = sample(engine, range(8), sampling)
    for first, second in zip(forward, again, strict=True):
        np.testing.assert_array_equal(first.rollout_logprobs, second.rollout_logprobs)


def test_responses_of_one_prompt_differ_by_seed(engine: EngineInChild) -> None:
    requests = [GenerationRequest(str(i), tuple(PROMPTS[4]), seed=i) for i in range(8)]
    sampling = SamplingSettings.for_training(NUM_NEW_TOKENS, ())
    generations = engine.call("generate", requests, sampling)
    assert len({generation.token_ids for generation in generations}) == 8


def test_a_response_ends_with_its_stop_token(
    engine: EngineInChild, model_a: PreTrainedModel
) -> None:
    greedy = hf_greedy(model_a, PROMPTS[0])
    stop = greedy[4]
    end = greedy.index(stop) + 1
    request = GenerationRequest("0", tuple(PROMPTS[0]), 0)
    sampling = SamplingSettings(NUM_NEW_TOKENS, stop_token_ids=(stop,), greedy=True)
    (generation,) = engine.call("generate", [request], sampling)
    assert generation.token_ids == greedy[:end]
    assert generation.finish_reason == "stop"
    expected = hf_logprobs(model_a, PROMPTS[0], greedy[:end], 1.0)
    np.testing.assert_allclose(generation.rollout_logprobs, expected, atol=1e-4)


def test_a_prompt_that_leaves_no_room_is_refused(engine: EngineInChild) -> None:
    sampling = SamplingSettings(MAX_MODEL_LEN - 2, greedy=True)
    with pytest.raises(ValueError, match=r"sample-0: 3 prompt tokens .* max_model_len=192"):
        sample(engine, [0], sampling)


def test_pushes_back_and_forth_are_served_exactly(
    engine: EngineInChild, model_a: PreTrainedModel, model_b: PreTrainedModel
) -> None:
    first_version = engine.call("policy_version")
    pushes = [
        (model_b, SMALL_BUCKET_BYTES),
        (model_a, LARGE_BUCKET_BYTES),
        (model_b, LARGE_BUCKET_BYTES),
        (model_a, SMALL_BUCKET_BYTES),
    ]
    for version, (model, bucket_bytes) in enumerate(pushes, start=first_version + 1):
        metrics = engine.push(version, model, bucket_bytes)
        assert metrics["weight_sync/num_tensors"] == len(checkpoint_tensors(model))
        assert (metrics["weight_sync/num_buckets"] > 5) == (bucket_bytes == SMALL_BUCKET_BYTES)
        assert engine.call("policy_version") == version
        assert engine.greedy() == [hf_greedy(model, prompt) for prompt in PROMPTS]
        for prompt, logprobs in zip(PROMPTS, engine.call("score", PROMPTS), strict=True):
            np.testing.assert_allclose(
                logprobs, hf_logprobs(model, prompt[:1], prompt[1:], 1.0), atol=1e-4
            )


def test_an_aborted_push_is_not_served_and_the_next_one_recovers(
    engine: EngineInChild, model_b: PreTrainedModel
) -> None:
    version = engine.call("policy_version")
    sender = SharedMemorySender(SMALL_BUCKET_BYTES)
    buckets = sender.buckets(version + 1, checkpoint_tensors(model_b))
    engine.call("begin_weight_update", version + 1)
    for _ in range(3):
        engine.call("load_weight_bucket", next(buckets))
    with pytest.raises(WeightUpdateError, match="not finished: 3 buckets received"):
        engine.greedy()
    engine.call("abort_weight_update")
    sender.close()
    with pytest.raises(WeightUpdateError, match="aborted"):
        engine.greedy()
    with pytest.raises(WeightUpdateError, match="aborted"):
        engine.call("score", PROMPTS)
    assert engine.call("policy_version") == version

    engine.push(version + 1, model_b, SMALL_BUCKET_BYTES)
    assert engine.greedy() == [hf_greedy(model_b, prompt) for prompt in PROMPTS]


def test_a_push_begun_over_a_half_push_is_served_exactly(
    engine: EngineInChild, model_a: PreTrainedModel, model_b: PreTrainedModel
) -> None:
    version = engine.call("policy_version")
    sender = SharedMemorySender(SMALL_BUCKET_BYTES)
    engine.call("begin_weight_update", version + 1)
    engine.call(
        "load_weight_bucket", next(sender.buckets(version + 1, checkpoint_tensors(model_a)))
    )
    sender.close()
    engine.push(version + 2, model_b, LARGE_BUCKET_BYTES)
    assert engine.greedy() == [hf_greedy(model_b, prompt) for prompt in PROMPTS]


def test_an_incomplete_push_is_refused(engine: EngineInChild, model_b: PreTrainedModel) -> None:
    version = engine.call("policy_version")
    missing = "model.layers.1.self_attn.v_proj.weight"
    tensors = [(name, value) for name, value in checkpoint_tensors(model_b) if name != missing]
    sender = SharedMemorySender(LARGE_BUCKET_BYTES)
    engine.call("begin_weight_update", version + 1)
    for bucket in sender.buckets(version + 1, tensors):
        engine.call("load_weight_bucket", bucket)
    with pytest.raises(WeightUpdateError, match=rf"lacks 1 of \d+ tensors: {missing}"):
        engine.call("finish_weight_update", version + 1, sender.push_checksum)
    with pytest.raises(WeightUpdateError, match="needs a complete push"):
        engine.greedy()


def test_an_unreachable_bucket_fails_the_push(
    engine: EngineInChild, model_b: PreTrainedModel
) -> None:
    version = engine.call("policy_version")
    sender = SharedMemorySender(LARGE_BUCKET_BYTES)
    bucket = next(sender.buckets(version + 1, checkpoint_tensors(model_b)))
    sender.close()
    engine.call("begin_weight_update", version + 1)
    with pytest.raises(WeightUpdateError, match="cannot open the weight bucket"):
        engine.call("load_weight_bucket", bucket)
    with pytest.raises(WeightUpdateError, match="cannot open the weight bucket"):
        engine.greedy()


@pytest.mark.slow
def test_a_push_reaches_every_tensor_parallel_rank(tmp_path: Path) -> None:
    models = [make_model("pangu_tied", seed) for seed in (1, 2)]
    models[0].save_pretrained(tmp_path)
    with engine_process() as pool:
        pool.submit(start_engine, tmp_path, 2).result(timeout=120)
        engine = EngineInChild(pool)
        for version, model in enumerate([*models, *models]):
            if version > 0:
                engine.push(version, model, SMALL_BUCKET_BYTES)
            assert engine.greedy() == [hf_greedy(model, prompt) for prompt in PROMPTS]
        pool.submit(stop_engine).result(timeout=60)
