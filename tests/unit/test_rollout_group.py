"""RolloutGroup's bookkeeping, with Ray's calls as tickets that a fake redeems."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.config import ParallelConfig, RolloutConfig, RunConfig
from r2vpo_megatron.orchestration import groups
from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.sampling import SamplingSettings

SAMPLING = SamplingSettings(max_response_tokens=40)


def respond(request: GenerationRequest) -> Generation:
    return Generation(request.sample_id, (7,), np.zeros(1, dtype=np.float32), "stop", 0)


class FakeRay:
    """Remote calls as tickets; a later ticket is ready before an earlier one."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.answers_in_time = True

    def wait(self, tickets: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], Any]:
        assert num_returns == 1
        self.log.append(f"wait for {len(tickets)}")
        if not self.answers_in_time:
            return [], tickets
        return [tickets[-1]], tickets[:-1]

    def get(self, ticket: Any) -> Any:
        if isinstance(ticket, Dead):
            raise ConnectionError("the engine died")
        return [respond(request) for request in ticket.chunk]


class Ticket:
    def __init__(self, engine: str, chunk: Any) -> None:
        self.engine, self.chunk = engine, chunk


class Dead(Ticket):
    pass


def fake_group(monkeypatch: pytest.MonkeyPatch, names: str, dead: str = "") -> tuple[Any, FakeRay]:
    ray = FakeRay()
    monkeypatch.setattr(groups, "ray", ray)

    def engine(name: str) -> Any:
        def remote(chunk: Any, sampling: Any) -> Ticket:
            ray.log.append(f"{name} gets {len(chunk)}")
            return (Dead if name == dead else Ticket)(name, chunk)

        return types.SimpleNamespace(generate=types.SimpleNamespace(remote=remote))

    group = groups.RolloutGroup.__new__(groups.RolloutGroup)
    group._engines = [engine(name) for name in names]
    group._timeout = 5.0
    return group, ray


def chunks_of(*sizes: int) -> Iterator[list[GenerationRequest]]:
    for number, size in enumerate(sizes):
        yield [GenerationRequest(f"{number}.{index}", (1,), index) for index in range(size)]


def test_a_free_engine_gets_its_next_chunk_before_the_last_is_handed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group, ray = fake_group(monkeypatch, "AB")
    given = group.generate_unordered(chunks_of(1, 2, 3), SAMPLING)
    first = next(given)
    assert ray.log == ["A gets 1", "B gets 2", "wait for 2", "B gets 3"]
    rest = list(given)
    sample_ids = [[generation.sample_id for generation in part] for part in [first, *rest]]
    assert sample_ids == [["1.0", "1.1"], ["2.0", "2.1", "2.2"], ["0.0"]]


def test_more_engines_than_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    group, ray = fake_group(monkeypatch, "ABC")
    assert len(list(group.generate_unordered(chunks_of(1), SAMPLING))) == 1
    assert list(group.generate_unordered(iter(()), SAMPLING)) == []
    assert ray.log == ["A gets 1", "wait for 1"]


def test_a_dead_engine_ends_it_after_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    group, _ = fake_group(monkeypatch, "AB", dead="A")
    given = group.generate_unordered(chunks_of(1, 1, 1), SAMPLING)
    assert [generation.sample_id for generation in next(given)] == ["1.0"]
    assert [generation.sample_id for generation in next(given)] == ["2.0"]
    with pytest.raises(ConnectionError):
        next(given)


def test_engines_that_do_not_answer_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    group, ray = fake_group(monkeypatch, "A")
    ray.answers_in_time = False
    with pytest.raises(TimeoutError, match="no engine finished a chunk in 5 s"):
        next(group.generate_unordered(chunks_of(1), SAMPLING))


@pytest.mark.parametrize(
    ("resource", "alone", "with_learner"),
    [(None, {"CPU": 2}, {"CPU": 8}), ("GPU", {"CPU": 2, "GPU": 8}, {"CPU": 8, "GPU": 14})],
)
def test_an_evaluation_asks_for_engines_only(
    monkeypatch: pytest.MonkeyPatch,
    resource: str | None,
    alone: dict[str, int],
    with_learner: dict[str, int],
) -> None:
    platform = types.SimpleNamespace(accelerator_resource=lambda: resource)
    monkeypatch.setattr(groups, "get_platform", lambda name: platform)
    config = RunConfig(
        rollout=RolloutConfig(num_engines=2, tensor_parallel=4),
        parallel=ParallelConfig(tensor=2, data=3),
    )
    assert groups.needed_resources(config, with_learner=False) == alone
    assert groups.needed_resources(config) == with_learner
