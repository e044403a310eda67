"""Which ranks are gone, by what Ray says of each: fakes raise what Ray raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from r2vpo_megatron.orchestration import learner_group
from r2vpo_megatron.orchestration.learner_group import LearnerGroup, RankLost

Answer = Callable[[], object]
BUSY = object()


class Rank:
    """Answers in turn; the last answer again and again."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.node_id = self

    def remote(self) -> tuple[Rank, Any]:
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        return self, answer


def group_of(monkeypatch: pytest.MonkeyPatch, *ranks: Rank) -> LearnerGroup:
    monkeypatch.setattr(learner_group, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(learner_group, "LOSS_SECONDS", 0.2)

    def wait(calls: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        assert num_returns == len(calls)
        return [call for call in calls if call[1] is not BUSY], []

    def get(call: Any) -> object:
        if isinstance(call[1], Exception):
            raise call[1]
        return call[1]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    group = object.__new__(LearnerGroup)
    group._ranks = list(ranks)
    return group


def unavailable() -> ActorUnavailableError:
    return ActorUnavailableError("connection refused", b"0" * 16)


def test_a_dead_rank_is_named_though_its_peers_error_came_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    group = group_of(monkeypatch, Rank(BUSY), Rank(ActorDiedError()), Rank("node"))
    error = RayTaskError("update", "traceback", RuntimeError("Connection closed by peer"))
    expected = pytest.raises(RankLost, match="learner rank 1 is gone")
    with expected as raised, group.naming_lost_ranks():
        raise error
    assert raised.value.__cause__ is error


def test_ray_is_asked_until_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Rank(unavailable(), unavailable(), ActorDiedError())
    group = group_of(monkeypatch, Rank(BUSY), late)
    with pytest.raises(RankLost, match="learner rank 1 is gone"), group.naming_lost_ranks():
        raise unavailable()


def test_where_nobody_is_gone_the_error_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for last in (BUSY, unavailable(), "node"):
        group = group_of(monkeypatch, Rank("node"), Rank(last))
        error = RayTaskError("update", "traceback", FloatingPointError("nan"))
        with pytest.raises(RayTaskError) as raised, group.naming_lost_ranks():
            raise error
        assert raised.value is error


def test_a_rank_that_could_not_begin_has_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class DiedBeginning(ActorDiedError):
        def __str__(self) -> str:
            return "The actor died because of an error raised in its creation task: no weights"

    died = DiedBeginning()
    group = group_of(monkeypatch, Rank(died))
    with pytest.raises(DiedBeginning) as raised, group.naming_lost_ranks():
        raise died
    assert raised.value is died


def test_where_all_is_being_ended_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(monkeypatch, Rank(ActorDiedError()))
    error = unavailable()
    expected = pytest.raises(ActorUnavailableError)
    with expected as raised, group.naming_lost_ranks(has_time=lambda: False):
        raise error
    assert raised.value is error
