"""The vLLM engine against Hugging Face transformers: samples, log-probs and weight pushes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from r2vpo_megatron.weight_sync import SharedMemorySender
from tests.distributed.engine_in_child import (
    LARGE_BUCKET_BYTES,
    MAX_MODEL_LEN,
    NUM_NEW_TOKENS,
    PROMPTS,
    SMALL_BUCKET_BYTES,
    EngineInChild,
    checkpoint_tensors,
    engine_process,
    hf_greedy,
    hf_logprobs,
    make_model,
    start_engine,
    stop_engine,
)

pytest.importorskip("vllm")


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


def test_half_a_push_is_not_served_and_the_next_one_is_exact(
    engine: EngineInChild, model_a: PreTrainedModel, model_b: PreTrainedModel
) -> None:
    version = engine.call("policy_version")
    sender = SharedMemorySender(SMALL_BUCKET_BYTES)
    buckets = sender.buckets(version + 1, checkpoint_tensors(model_a))
    engine.call("weights.begin", version + 1)
    for _ in range(3):
        engine.call("weights.load", next(buckets))
    sender.close()
    with pytest.raises(WeightUpdateError, match="not finished: 3 buckets received"):
        engine.greedy()
    with pytest.raises(WeightUpdateError, match="not finished: 3 buckets received"):
        engine.call("score", PROMPTS)
    assert engine.call("policy_version") == version

    engine.push(version + 2, model_b, LARGE_BUCKET_BYTES)
    assert engine.greedy() == [hf_greedy(model_b, prompt) for prompt in PROMPTS]


def test_an_incomplete_push_is_refused(engine: EngineInChild, model_b: PreTrainedModel) -> None:
    version = engine.call("policy_version")
    missing = "model.layers.1.self_attn.v_proj.weight"
    tensors = [(name, value) for name, value in checkpoint_tensors(model_b) if name != missing]
    sender = SharedMemorySender(LARGE_BUCKET_BYTES)
    engine.call("weights.begin", version + 1)
    for bucket in sender.buckets(version + 1, tensors):
        engine.call("weights.load", bucket)
    with pytest.raises(WeightUpdateError, match=rf"lacks 1 of \d+ tensors: {missing}"):
        engine.call("weights.finish", version + 1, sender.push_checksum)
    with pytest.raises(WeightUpdateError, match="needs a complete push"):
        engine.greedy()


def test_an_unreachable_bucket_fails_the_push(
    engine: EngineInChild, model_b: PreTrainedModel
) -> None:
    version = engine.call("policy_version")
    sender = SharedMemorySender(LARGE_BUCKET_BYTES)
    bucket = next(sender.buckets(version + 1, checkpoint_tensors(model_b)))
    sender.close()
    engine.call("weights.begin", version + 1)
    with pytest.raises(WeightUpdateError, match="cannot open the weight bucket"):
        engine.call("weights.load", bucket)
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
