"""The vLLM engine driven in slices of time: pushes, aborts and scores between its steps.

A slice of 0 seconds is one step, so that tests place what happens between two tokens. A step has
room for one of the longest prompts only: responses are recomputed after a push one by one, beside
others that go on.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.engine import EngineReport, NonFiniteLogprob
from r2vpo_megatron.rollout.sampling import SamplingSettings
from r2vpo_megatron.rollout.weight_updates import WeightUpdateError
from tests.distributed.engine_in_child import (
    LARGE_BUCKET_BYTES,
    MAX_NUM_SEQS,
    PROMPTS,
    SMALL_BUCKET_BYTES,
    VOCAB_SIZE,
    EngineInChild,
    Pushes,
    checkpoint_tensors,
    engine_process,
    hf_greedy,
    hf_logprobs,
    make_model,
    start_engine,
    stop_engine,
)

pytest.importorskip("vllm")

NUM_RESPONSE_TOKENS = 20
SAMPLING = SamplingSettings.for_training(NUM_RESPONSE_TOKENS, ())
# More than are decoded together, half of them too long to be recomputed two in one step.
REQUESTS = [
    GenerationRequest(f"sample-{i}", tuple(PROMPTS[-1] if i % 2 else PROMPTS[i // 2]), seed=50 + i)
    for i in range(MAX_NUM_SEQS + 4)
]


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return make_model("pangu_tied", seed=1), make_model("pangu_tied", seed=2)


@pytest.fixture(scope="module")
def running_engine(
    models: tuple[PreTrainedModel, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineInChild]:
    model_dir = tmp_path_factory.mktemp("model_a")
    models[0].save_pretrained(model_dir)
    with engine_process() as pool:
        pool.submit(start_engine, model_dir, min_tokens_per_step=1).result(timeout=120)
        yield EngineInChild(pool)
        pool.submit(stop_engine).result(timeout=60)


@pytest.fixture
def pushes(
    running_engine: EngineInChild, models: tuple[PreTrainedModel, PreTrainedModel]
) -> Iterator[Pushes]:
    """The engine serving model A with nothing queued, whatever the test before has left in it."""
    running_engine.call("abort_requests")
    version = running_engine.call("policy_version") + 1
    running_engine.push(version, models[0], LARGE_BUCKET_BYTES)
    return Pushes(running_engine, models[0])


def by_sample(generations: Sequence[Generation]) -> dict[str, Generation]:
    named = {generation.sample_id: generation for generation in generations}
    assert len(named) == len(generations)
    return named


def request_of(generation: Generation) -> GenerationRequest:
    return REQUESTS[int(generation.sample_id.removeprefix("sample-"))]


def test_the_length_of_slices_changes_no_token(pushes: Pushes) -> None:
    whole = pushes.engine.call("generate", REQUESTS, SAMPLING)
    assert [generation.sample_id for generation in whole] == [r.sample_id for r in REQUESTS]
    pushes.engine.call("add_requests", REQUESTS, SAMPLING)
    reports: list[EngineReport] = []
    while not reports or reports[-1].num_unfinished:
        reports.append(pushes.engine.call("advance", 0.001))
    sliced = by_sample([done for report in reports for done in report.finished])
    for generation in whole:
        assert sliced[generation.sample_id].token_ids == generation.token_ids
        np.testing.assert_array_equal(
            sliced[generation.sample_id].rollout_logprobs, generation.rollout_logprobs
        )
    assert len(reports) > 3
    assert sum(report.num_tokens for report in reports) == NUM_RESPONSE_TOKENS * len(REQUESTS)
    assert reports[0].num_unfinished == len(REQUESTS)
    assert all(report.busy_seconds > 0 for report in reports)
    assert min(report.memory_bytes for report in reports) > 100 << 20  # torch alone takes more

    idle = pushes.engine.call("advance", 1.0)
    assert (idle.finished, idle.num_unfinished, idle.num_tokens) == ([], 0, 0)
    assert idle.busy_seconds == 0


def test_every_token_is_stamped_with_the_version_that_sampled_it(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    pushes.engine.call("add_requests", REQUESTS[:1], SAMPLING)
    first = pushes.version
    pushes.steps(5)
    pushes.push(models[1])
    pushes.steps(1)
    pushes.push(models[0], SMALL_BUCKET_BYTES)
    pushes.push(models[1])  # nothing is sampled between these two
    (generation,) = pushes.finish()
    assert generation.policy_versions.tolist() == (
        [first] * 5 + [first + 1] + [first + 3] * (NUM_RESPONSE_TOKENS - 6)
    )
    pushes.check_logprobs(REQUESTS[0].prompt_token_ids, generation)


def test_responses_under_way_are_recomputed_however_long_they_are(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    first = pushes.version
    pushes.engine.call("add_requests", REQUESTS, SAMPLING)
    finished = pushes.steps(12)
    pushes.push(models[1])
    finished += pushes.steps(1)
    pushes.push(models[0])  # while most are still to be recomputed
    generations = by_sample([*finished, *pushes.finish()])
    assert len(generations) == len(REQUESTS)
    for request in REQUESTS:
        generation = generations[request.sample_id]
        assert len(generation.token_ids) == NUM_RESPONSE_TOKENS
        pushes.check_logprobs(request.prompt_token_ids, generation)
    mixed = [len(set(g.policy_versions.tolist())) for g in generations.values()]
    assert max(mixed) == 3
    # Those that found no place before the last push are its own.
    assert generations[REQUESTS[-1].sample_id].policy_versions.tolist() == (
        [first + 2] * NUM_RESPONSE_TOKENS
    )


def test_a_push_of_the_same_weights_changes_no_token(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """Random numbers go on where they were: neither drawn again nor left out."""
    undisturbed = by_sample(pushes.engine.call("generate", REQUESTS[:6], SAMPLING))
    pushes.engine.call("add_requests", REQUESTS[:6], SAMPLING)
    for _ in range(3):
        assert pushes.steps(3) == []
        pushes.push(models[0])
    for generation in pushes.finish():
        assert generation.token_ids == undisturbed[generation.sample_id].token_ids
        assert len(set(generation.policy_versions.tolist())) > 1


def test_an_aborted_response_goes_on_from_where_it_was(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    first = pushes.version
    pushes.engine.call("add_requests", REQUESTS, SAMPLING)
    finished = pushes.steps(6)
    aborted = pushes.engine.call("abort_requests")
    assert finished == []
    assert [generation.sample_id for generation in aborted] == [r.sample_id for r in REQUESTS]
    assert {generation.finish_reason for generation in aborted} == {"abort"}
    assert pushes.engine.call("advance", 0.0).num_unfinished == 0
    not_begun = aborted[-1]
    assert not_begun.token_ids == ()
    assert not_begun.rollout_logprobs.shape == not_begun.policy_versions.shape == (0,)
    pushes.push(models[1])

    pushes.engine.call(
        "add_requests",
        [
            dataclasses.replace(request, partial_token_ids=before.token_ids)
            for request, before in zip(REQUESTS, aborted, strict=True)
        ],
        SAMPLING,
    )
    after = by_sample(pushes.finish())
    assert 0 < len(aborted[0].token_ids) < NUM_RESPONSE_TOKENS
    for request, before in zip(REQUESTS, aborted, strict=True):
        rest = after[request.sample_id]
        assert len(before.token_ids) + len(rest.token_ids) == NUM_RESPONSE_TOKENS
        assert (before.policy_versions == first).all()
        assert (rest.policy_versions == first + 1).all()
        assert rest.finish_reason == "length"
        pushes.check_logprobs(request.prompt_token_ids, before)
        pushes.check_logprobs(request.prompt_token_ids, rest, before.token_ids)


def test_a_continued_greedy_response_is_the_undisturbed_one(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    expected = hf_greedy(models[0], PROMPTS[1])
    stop = expected[-1]
    end = expected.index(stop) + 1
    sampling = SamplingSettings(len(expected) + 3, stop_token_ids=(stop,), greedy=True)
    request = GenerationRequest("a", tuple(PROMPTS[1]), 0, expected[: end - 2])
    (generation,) = pushes.engine.call("generate", [request], sampling)
    assert generation.token_ids == expected[end - 2 : end]
    assert generation.finish_reason == "stop"


def test_scoring_lets_responses_go_on_and_keeps_those_it_finishes(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    short = dataclasses.replace(SAMPLING, max_response_tokens=2)
    # Prompts that fit into one step together.
    pushes.engine.call("add_requests", REQUESTS[0:4:2], short)
    pushes.engine.call("add_requests", REQUESTS[4:8:2], SAMPLING)
    assert pushes.steps(1) == []
    pushes.push(models[1])
    for prompt, logprobs in zip(PROMPTS, pushes.engine.call("score", PROMPTS), strict=True):
        np.testing.assert_allclose(
            logprobs, hf_logprobs(models[1], prompt[:1], prompt[1:], 1.0), atol=1e-4
        )
    with pytest.raises(ValueError, match=r"2 other requests are queued and 2 finished"):
        pushes.engine.call("generate", REQUESTS[1:2], SAMPLING)
    with pytest.raises(ValueError, match=r"sample-0: is queued already"):
        pushes.engine.call("add_requests", REQUESTS[:1], SAMPLING)
    report = pushes.engine.call("advance", 0.0)
    assert {done.sample_id for done in report.finished} == {"sample-0", "sample-2"}
    for generation in [*report.finished, *pushes.finish()]:
        request = request_of(generation)
        assert generation.policy_versions[:2].tolist() == [pushes.version - 1, pushes.version]
        pushes.check_logprobs(request.prompt_token_ids, generation)


def test_what_scoring_finishes_comes_with_the_aborted(pushes: Pushes) -> None:
    short = dataclasses.replace(SAMPLING, max_response_tokens=1)
    pushes.engine.call("add_requests", REQUESTS[:1], short)
    pushes.engine.call("add_requests", REQUESTS[1:2], SAMPLING)
    pushes.engine.call("score", PROMPTS[:1])
    aborted = by_sample(pushes.engine.call("abort_requests"))
    assert aborted["sample-0"].finish_reason == "length"
    assert aborted["sample-1"].finish_reason == "abort"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (GenerationRequest("b", (), 0), "b: the prompt is empty"),
        (GenerationRequest("b", tuple(PROMPTS[-1]) * 2, 0), "b: 320 prompt tokens"),
        (
            GenerationRequest("b", (1,), 0, (2,) * NUM_RESPONSE_TOKENS),
            "b: has 20 partial tokens: must be fewer than max_response_tokens=20",
        ),
        (GenerationRequest("b", (1,), 0, (2, 7, 3)), "b: its partial tokens hold the stop token 7"),
        (GenerationRequest("a", (1,), 0), "a: is queued already"),
        (GenerationRequest("b", (1, VOCAB_SIZE + 5), 0), "b: token id 305: must be below 300"),
    ],
)
def test_a_bad_request_queues_none_of_its_call(
    pushes: Pushes, request_: GenerationRequest, message: str
) -> None:
    sampling = dataclasses.replace(SAMPLING, stop_token_ids=(7,))
    with pytest.raises(ValueError, match=message):
        pushes.engine.call("add_requests", [GenerationRequest("a", (1, 2), 0), request_], sampling)
    assert pushes.engine.call("advance", 0.0) is not None
    assert pushes.engine.call("abort_requests") == []


def test_an_incomplete_push_stops_responses_until_a_complete_one(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    pushes.engine.call("add_requests", REQUESTS[:2], SAMPLING)
    pushes.steps(2)
    pushes.engine.call("weights.begin", pushes.version + 1)
    with pytest.raises(WeightUpdateError, match="not finished"):
        pushes.engine.call("advance", 1.0)
    with pytest.raises(WeightUpdateError, match="lacks"):
        pushes.engine.call("weights.finish", pushes.version + 1, 0)
    with pytest.raises(WeightUpdateError, match="push failed .*lacks"):
        pushes.engine.call("advance", 1.0)
    pushes.push(models[1])
    for generation, request in zip(pushes.finish(), REQUESTS, strict=False):
        assert generation.policy_versions[2] == pushes.version
        pushes.check_logprobs(request.prompt_token_ids, generation)


def test_weights_that_are_not_numbers_end_generation_by_name(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    poisoned = make_model("pangu_tied", seed=1)
    with torch.no_grad():
        dict(checkpoint_tensors(poisoned))["model.norm.weight"].fill_(float("nan"))
    pushes.engine.call("add_requests", REQUESTS[:1], SAMPLING)
    pushes.steps(3)
    pushes.push(poisoned)
    with pytest.raises(
        NonFiniteLogprob,
        match=rf"sample-0: the log-prob of response token 3 .* version {pushes.version}",
    ):
        pushes.engine.call("advance", 1e9)
    with pytest.raises(NonFiniteLogprob, match="response token 0 is nan"):
        pushes.engine.call("generate", REQUESTS[:2], SAMPLING)
    with pytest.raises(RuntimeError, match="sequence 0 of score"):
        pushes.engine.call("score", PROMPTS)
    pushes.push(models[1])
    (generation,) = pushes.engine.call("generate", REQUESTS[:1], SAMPLING)
    pushes.check_logprobs(REQUESTS[0].prompt_token_ids, generation)


@pytest.mark.slow
def test_tensor_parallel_ranks_recompute_responses_under_way(
    tmp_path: Path, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    models[0].save_pretrained(tmp_path)
    with engine_process() as pool:
        pool.submit(start_engine, tmp_path, 2).result(timeout=120)
        pushes = Pushes(EngineInChild(pool), models[0])
        pushes.engine.call("add_requests", REQUESTS[:4], SAMPLING)
        assert pushes.steps(4) == []
        pushes.push(models[1], SMALL_BUCKET_BYTES)
        for generation in pushes.finish():
            assert generation.policy_versions.tolist() == [0] * 4 + [1] * (NUM_RESPONSE_TOKENS - 4)
            pushes.check_logprobs(request_of(generation).prompt_token_ids, generation)
        pool.submit(stop_engine).result(timeout=60)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_keeps_log_probs_exact(
    pushes: Pushes, models: tuple[PreTrainedModel, PreTrainedModel], seed: int
) -> None:
    """Steps, pushes, scores and aborts with continuation, until every response is finished."""
    generator = np.random.default_rng(seed)
    waiting = {request.sample_id: request for request in REQUESTS}
    segments: dict[str, list[Generation]] = {sample_id: [] for sample_id in waiting}

    def keep(generations: Sequence[Generation]) -> None:
        for generation in generations:
            segments[generation.sample_id].append(generation)
            if generation.finish_reason == "abort":
                parts = [segment.token_ids for segment in segments[generation.sample_id]]
                request = request_of(generation)
                waiting[request.sample_id] = dataclasses.replace(
                    request, partial_token_ids=tuple(itertools.chain(*parts))
                )

    def has_ended(sample_id: str) -> bool:
        return any(segment.finish_reason == "length" for segment in segments[sample_id])

    while not all(map(has_ended, segments)):
        if waiting:
            added = list(waiting.values())[: int(generator.integers(1, 6))]
            pushes.engine.call("add_requests", added, SAMPLING)
            for request in added:
                del waiting[request.sample_id]
        keep(pushes.steps(int(generator.integers(0, 5))))
        event = generator.choice(["push", "score", "abort", "nothing"], p=[0.3, 0.1, 0.1, 0.5])
        if event == "push":
            pushes.push(models[int(generator.integers(2))])
        elif event == "score":
            pushes.engine.call("score", PROMPTS[:2])
        elif event == "abort":
            keep(pushes.engine.call("abort_requests"))
    assert len(pushes.models) > 1
    for request in REQUESTS:
        before: list[int] = []  # a response has one segment more than it was aborted
        for segment in segments[request.sample_id]:
            pushes.check_logprobs(request.prompt_token_ids, segment, before)
            before += segment.token_ids
        assert len(before) == NUM_RESPONSE_TOKENS
        reasons = [segment.finish_reason for segment in segments[request.sample_id]]
        assert reasons == ["abort"] * (len(reasons) - 1) + ["length"]
