from __future__ import annotations

import random
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.evaluation import runner
from r2vpo_megatron.evaluation.response import ResponseRecord
from r2vpo_megatron.evaluation.response_log import ResponseLog, begin
from r2vpo_megatron.evaluation.runner import (
    BenchmarkPrompts,
    Evaluation,
    Judge,
    chunk_size,
    response_seed,
)
from r2vpo_megatron.records import Generation, GenerationRequest, Prompt
from r2vpo_megatron.rewards import RewardResult
from r2vpo_megatron.rollout.sampling import SamplingSettings

SAMPLING = SamplingSettings(max_response_tokens=40)
BENCHMARKS = (
    # The same ids and prompts in both: only the benchmark's name tells their samples apart.
    BenchmarkPrompts("first", [Prompt(f"{i}", (i, 1), str(i % 3)) for i in range(5)]),
    BenchmarkPrompts("second", [Prompt(f"{i}", (i, 1), str(i % 2)) for i in range(3)]),
)
NUM_SAMPLES = 4
TOTAL = (5 + 3) * NUM_SAMPLES


def respond(request: GenerationRequest) -> Generation:
    """An answer and a length that prompt and seed alone decide; every fourth is cut off."""
    draw = random.Random(f"{request.seed}:{request.prompt_token_ids}")
    token_ids = (draw.randrange(3), *[9] * draw.randrange(1, 30))
    return Generation(
        sample_id=request.sample_id,
        token_ids=token_ids,
        rollout_logprobs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason="length" if draw.random() < 0.25 else "stop",
        policy_versions=np.zeros(len(token_ids), dtype=np.int64),
    )


@dataclass
class FakeEngines:
    """Gives chunks back in an order of its own, and can be interrupted after some."""

    num_engines: int = 1
    order_seed: int = 0
    stop_after_chunks: int | None = None
    asked: list[GenerationRequest] = field(default_factory=list)

    def generate_unordered(
        self, chunks: Iterable[Sequence[GenerationRequest]], sampling: SamplingSettings
    ) -> Iterator[list[Generation]]:
        assert sampling is SAMPLING
        order, waiting, num_given = random.Random(self.order_seed), iter(chunks), 0
        under_way = [chunk for _, chunk in zip(range(self.num_engines), waiting, strict=False)]
        while under_way:
            if num_given == self.stop_after_chunks:
                raise KeyboardInterrupt
            chunk = under_way.pop(order.randrange(len(under_way)))
            self.asked += chunk
            if (following := next(waiting, None)) is not None:
                under_way.append(following)
            yield [respond(request) for request in chunk]
            num_given += 1


class Told:
    def __init__(self) -> None:
        self.counts: list[dict[str, int]] = []
        self.notes: dict[str, str] = {}

    def advance(self, counts: Any, notes: Any) -> None:
        self.counts.append(dict(counts))
        self.notes |= notes


def decode(token_ids: Sequence[int]) -> str:
    return f"Answer: {token_ids[0]}" if token_ids[0] < 2 else "no idea"


def reward(prompt: Prompt, text: str) -> RewardResult:
    pred = text.removeprefix("Answer: ") if text.startswith("Answer: ") else None
    failure = "timeout" if pred == "1" and prompt.ground_truth == "0" else ""
    acc = pred == prompt.ground_truth
    return RewardResult(1.0 if acc else -1.0, acc, pred, pred is not None, failure)


JUDGE = Judge(decode, reward)


def make(folder: Path, seed: int = 0) -> tuple[Evaluation, ResponseLog]:
    if not folder.exists():
        begin(folder, {"deciding": {}})
    log = ResponseLog(folder, "tiny")
    return Evaluation(BENCHMARKS, NUM_SAMPLES, seed, log), log


def kept(log: ResponseLog) -> set[tuple[str, ResponseRecord]]:
    records = [(part.name, record) for part in BENCHMARKS for record in log.read(part.name)]
    assert len(set(records)) == len(records)
    return set(records)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, ResponseRecord]]:
    evaluation, log = make(tmp_path_factory.mktemp("runs") / "whole")
    evaluation.run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=TOTAL)
    records = kept(log)
    assert len(records) == TOTAL
    return records


def test_records_say_what_engine_and_reward_said(undisturbed: Any) -> None:
    for benchmark, record in undisturbed:
        (part,) = [part for part in BENCHMARKS if part.name == benchmark]
        prompt = part.prompts[int(record.problem_id)]
        seed = response_seed(0, benchmark, record.problem_id, record.sample_index)
        generation = respond(GenerationRequest("", prompt.token_ids, seed))
        text = decode(generation.token_ids)
        verdict = reward(prompt, text)
        assert record == ResponseRecord(
            problem_id=prompt.prompt_id,
            sample_index=record.sample_index,
            seed=seed,
            num_tokens=len(generation.token_ids),
            finish_reason=generation.finish_reason,
            acc=verdict.acc,
            pred=verdict.pred,
            parsed=verdict.parsed,
            failure=verdict.failure,
            text=text,
        )
    records = [record for _, record in undisturbed]
    # The draws above are such that everything occurs.
    assert {record.finish_reason for record in records} == {"stop", "length"}
    assert {record.failure for record in records} == {"", "timeout"}
    assert {record.acc for record in records} == {True, False}
    assert any(record.pred is None for record in records)
    assert {record.sample_index for record in records} == {0, 1, 2, 3}


@pytest.mark.parametrize("num_engines", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_engines_chunks_and_their_order_change_nothing(
    tmp_path: Path, undisturbed: Any, num_engines: int, size: int
) -> None:
    evaluation, log = make(tmp_path / "run")
    engines = FakeEngines(num_engines, order_seed=size)
    evaluation.run(engines, SAMPLING, JUDGE, Told(), chunk_responses=size)
    assert kept(log) == undisturbed


@pytest.mark.parametrize("stop_after_chunks", range(11))
def test_an_interrupted_evaluation_goes_on_where_it_was(
    tmp_path: Path, undisturbed: Any, stop_after_chunks: int
) -> None:
    """32 responses in chunks of 3: eleven of them. No response is made twice."""
    evaluation, log = make(tmp_path / "run")
    engines = FakeEngines(2, stop_after_chunks=stop_after_chunks)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(engines, SAMPLING, JUDGE, Told(), chunk_responses=3)
    so_far = kept(log)
    assert so_far <= undisturbed
    assert len(so_far) >= 3 * stop_after_chunks - 1  # one chunk may be the last, which has 2

    resumed, log = make(tmp_path / "run")
    assert sum(resumed.done.values()) == len(so_far)
    again = FakeEngines(3, order_seed=1)
    resumed.run(again, SAMPLING, JUDGE, Told(), chunk_responses=5)
    assert len(again.asked) == TOTAL - len(so_far)
    assert kept(log) == undisturbed
    for part in BENCHMARKS:
        assert len(resumed.records(part.name)) == len(part.prompts) * NUM_SAMPLES


def test_a_kill_within_a_write_costs_one_response(tmp_path: Path, undisturbed: Any) -> None:
    evaluation, log = make(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(FakeEngines(stop_after_chunks=2), SAMPLING, JUDGE, Told(), chunk_responses=3)
    path = log.path("first")
    path.write_bytes(path.read_bytes()[:-30])
    resumed, log = make(tmp_path / "run")
    assert resumed.done == {"first": 5, "second": 0}
    resumed.run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=3)
    assert kept(log) == undisturbed


def test_a_finished_evaluation_asks_for_nothing(tmp_path: Path) -> None:
    make(tmp_path / "run")[0].run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=9)
    again, _ = make(tmp_path / "run")
    assert again.remaining == []
    assert again.done == again.totals == {"first": 20, "second": 12}


def test_another_seed_gives_other_responses(tmp_path: Path, undisturbed: Any) -> None:
    evaluation, log = make(tmp_path / "run", seed=1)
    evaluation.run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=9)
    assert not {record.seed for _, record in kept(log)} & {record.seed for _, record in undisturbed}


def test_responses_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    evaluation, log = make(tmp_path / "run")
    evaluation.run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=9)
    with pytest.raises(ValueError, match=r"first.jsonl: sample 0 of problem '0' has seed"):
        make(tmp_path / "run", seed=1)
    with pytest.raises(ValueError, match=r"first.jsonl: sample 3 of problem '0' is no sample"):
        Evaluation(BENCHMARKS, NUM_SAMPLES - 1, 0, log)


def test_engines_that_end_early_are_found_out(tmp_path: Path) -> None:
    class Lazy(FakeEngines):
        def generate_unordered(self, chunks: Any, sampling: Any) -> Iterator[list[Generation]]:
            yield [respond(request) for request in next(iter(chunks))]

    evaluation, log = make(tmp_path / "run")
    with pytest.raises(RuntimeError, match="27 responses short"):
        evaluation.run(Lazy(), SAMPLING, JUDGE, Told(), chunk_responses=5)
    assert len(kept(log)) == 5


def test_progress_is_told_of_each_chunk_with_the_accuracy_so_far(tmp_path: Path) -> None:
    told = Told()
    evaluation, log = make(tmp_path / "run")
    evaluation.run(FakeEngines(), SAMPLING, JUDGE, told, chunk_responses=9)
    # 20 of the first benchmark, then 12 of the second: the third chunk has 2 and 7.
    assert told.counts == [
        {"first": 9}, {"first": 9}, {"first": 2, "second": 7}, {"second": 5}
    ]  # fmt: skip
    for part in BENCHMARKS:
        records = list(log.read(part.name))
        accuracy = sum(record.acc for record in records) / len(records)
        assert told.notes[part.name] == f"accuracy {accuracy:.3f}"


def test_texts_are_on_disk_and_not_in_memory(tmp_path: Path) -> None:
    evaluation, log = make(tmp_path / "run")
    evaluation.run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=9)
    assert {record.text for record in evaluation.records("first")} == {""}
    assert "" not in {record.text for record in log.read("first")}
    assert {record.text for record in make(tmp_path / "run")[0].records("first")} == {""}


def test_the_time_of_a_chunk_is_shared_by_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([100.0, 140.0])
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    evaluation, log = make(tmp_path / "run")
    evaluation.run(FakeEngines(), SAMPLING, JUDGE, Told(), chunk_responses=TOTAL)
    tokens = {
        part.name: sum(record.num_tokens for record in log.read(part.name)) for part in BENCHMARKS
    }
    seconds = log.load_seconds()
    assert sum(seconds.values()) == pytest.approx(40.0)
    assert seconds["first"] / seconds["second"] == pytest.approx(tokens["first"] / tokens["second"])


def test_a_reward_is_asked_once_a_chunk(tmp_path: Path) -> None:
    class Batched:
        sizes: list[int] = []  # noqa: RUF012

        def __call__(self, prompt: Prompt, text: str) -> RewardResult:
            raise AssertionError("one by one")

        def score_batch(
            self, prompts: Sequence[Prompt], texts: Sequence[str]
        ) -> list[RewardResult]:
            self.sizes.append(len(texts))
            return [reward(*pair) for pair in zip(prompts, texts, strict=True)]

    evaluation, _ = make(tmp_path / "run")
    evaluation.run(FakeEngines(), SAMPLING, Judge(decode, Batched()), Told(), chunk_responses=12)
    assert Batched.sizes == [12, 12, 8]


def test_a_pred_that_is_no_text_can_be_read_again(tmp_path: Path) -> None:
    def number(prompt: Prompt, text: str) -> RewardResult:
        return RewardResult(1.0, True, 5, True)  # type: ignore[arg-type]

    evaluation, log = make(tmp_path / "run")
    evaluation.run(FakeEngines(), SAMPLING, Judge(decode, number), Told(), chunk_responses=50)
    assert {record.pred for record in log.read("first")} == {"5"}


def test_a_seed_is_the_hash_of_what_it_belongs_to() -> None:
    # printf '%s' 1:06:aime243:I-51:2 | sha256sum
    assert response_seed(0, "aime24", "I-5", 2) == 0xD6B4C9C7
    seeds = {
        response_seed(seed, benchmark, problem, sample)
        for seed in (0, 1)
        for benchmark in ("aime24", "aime25", "aime2", "")
        for problem in ("1", "11", "4", "51", "\ud83d")
        for sample in range(30)
    }
    assert len(seeds) == 2 * 4 * 5 * 30
    assert all(0 <= seed < 1 << 32 for seed in seeds)


@pytest.mark.parametrize(
    ("num_responses", "num_engines", "max_num_seqs", "size"),
    [
        (7360, 1, 256, 491),  # 512 at most: 15 rounds of 491
        (7360, 8, 256, 460),  # two rounds of 8 x 460
        (64, 1, 256, 64),
        (64, 2, 256, 32),  # no engine without work
        (65, 2, 16, 17),  # 32 at most: two rounds of 2 x 16.25
        (3, 8, 256, 1),
        (0, 1, 256, 1),
    ],
)
def test_chunks_fill_the_engines_evenly(
    num_responses: int, num_engines: int, max_num_seqs: int, size: int
) -> None:
    assert chunk_size(num_responses, num_engines, max_num_seqs) == size
    assert chunk_size(num_responses, num_engines, max_num_seqs, asked=10) == 10
