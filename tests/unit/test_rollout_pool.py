"""RolloutPool over engines that are threads: dispatch, losses, and what its caller sees."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
import types
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from r2vpo_megatron.config import (
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from r2vpo_megatron.orchestration import placement, rollout_pool
from r2vpo_megatron.orchestration.cluster import NoAnswer
from r2vpo_megatron.orchestration.pool_engines import describe_error
from r2vpo_megatron.records import GenerationRequest
from r2vpo_megatron.rollout import shared_segments
from r2vpo_megatron.rollout.engine import EngineReport
from tests.fake_engines import (
    NUM_TOKENS,
    SAMPLING,
    advances,
    has,
    pool_of,
    requests_of,
    until,
)


def test_responses_come_in_order_from_all_engines() -> None:
    with pool_of() as (pool, engines):
        asked = requests_of(50)
        given = pool.generate(asked, SAMPLING)
        assert [generation.sample_id for generation in given] == [r.sample_id for r in asked]
        assert {generation.token_ids for generation in given} == {(1, 1, 1)}
        for engine in engines.made:
            assert any(additions for _, (additions, _) in advances(engine))
            assert engine.most_queued == 2
        metrics = pool.metrics()
        assert metrics["rollout/tokens_per_second"] > 0
        assert 0 < metrics["rollout/idle_fraction"] < 1
        assert metrics["memory/rollout_bytes"] == 101
        assert metrics["rollout/num_unfinished"] == 0
        assert pool.metrics()["rollout/tokens_per_second"] == 0  # since the last time


def test_reports_count_in_the_order_of_their_slices() -> None:
    """A small report may be delivered before a large one of the slice before."""
    with pool_of(num_engines=1) as (pool, engines):
        (engine,) = engines.made
        call, delayed = engine.call, []

        def call_with_the_first_report_late(method: str, *args: Any) -> Future[Any]:
            future = call(method, *args)
            if method != "advance" or delayed:
                return future
            delayed.append((future, Future()))
            return delayed[0][1]

        engine.call = call_with_the_first_report_late  # type: ignore[method-assign]
        # One response is complete after the first slice, the other after the second.
        asked = [GenerationRequest(name, (1,), 0, (9,) * n) for name, n in (("a", 2), ("b", 1))]
        pool.submit(asked, SAMPLING)
        until(lambda: len(advances(engine)) == 2 and not engine.requests)
        time.sleep(0.02)
        delayed[0][1].set_result(delayed[0][0].result())
        pool.wait_for(has(2))
        assert [len(generation.token_ids) for generation in pool.take("ab")] == [1, 2]
        assert len(engines.made) == 1


def test_idle_engines_are_left_alone() -> None:
    with pool_of(num_engines=3) as (pool, engines):
        pool.generate(requests_of(1), SAMPLING)
        until(lambda: all(not engine.requests for engine in engines.made))
        assert [bool(advances(engine)) for engine in engines.made] == [True, False, False]
        num_calls = len(engines.made[0].calls)
        assert num_calls <= 1 + 1 + NUM_TOKENS + 1  # start, shared_segments, slices, one too many
        time.sleep(0.05)
        assert len(engines.made[0].calls) <= num_calls + 1


def test_a_single_engine_gets_everything_in_its_first_slice() -> None:
    with pool_of(num_engines=1) as (pool, engines):
        pool.generate(requests_of(70), SAMPLING)
        _, (((requests, _),), _) = advances(engines.made[0])[0]
        assert len(requests) == 70


def test_chunks_are_given_when_they_are_whole_and_asked_for_ahead() -> None:
    with pool_of(max_num_seqs=2) as (pool, engines):
        asked: list[int] = []

        def chunks() -> Iterator[list[GenerationRequest]]:
            for number in range(40):
                asked.append(number)
                yield requests_of(3, f"{number:02d}.")

        ahead = []

        def go_on() -> None:
            until(lambda: len(asked) == 6)  # four rounds of both engines are 16 requests
            time.sleep(0.05)
            ahead.append(len(asked))
            engines.go.set()

        engines.go.clear()
        threading.Thread(target=go_on, daemon=True).start()
        parts = list(pool.generate_unordered(chunks(), SAMPLING))
        assert ahead == [6]
        names = [[generation.sample_id for generation in part] for part in parts]
        assert sorted(names) == [[f"{n:02d}.{i:03d}" for i in range(3)] for n in range(40)]
        assert list(pool.generate_unordered(iter(()), SAMPLING)) == []
        assert len(list(pool.generate_unordered([requests_of(1)], SAMPLING))) == 1


def test_engines_get_more_while_every_chunk_waits_for_its_longest_response() -> None:
    """The first response of each chunk is not complete before the fifth chunk is asked for."""
    with pool_of(num_engines=1, max_num_seqs=2, timeout_seconds=5) as (pool, engines):
        (engine,) = engines.made
        asked: list[int] = []
        held: dict[str, list[int]] = {}

        def chunks() -> Iterator[list[GenerationRequest]]:
            for number in range(10):
                asked.append(number)
                yield requests_of(4, f"{number:02d}.")

        take_in = engine.do_advance

        def hold_the_longest(additions: Any, seconds: float) -> EngineReport:
            report = take_in(additions, seconds)
            if len(asked) < 5:
                for sample_id in [name for name in engine.requests if name.endswith(".000")]:
                    held[sample_id] = engine.requests.pop(sample_id)
            else:
                engine.requests |= held
                held.clear()
            return replace(report, num_unfinished=len(engine.requests) + len(held))

        engine.do_advance = hold_the_longest  # type: ignore[method-assign]
        given = list(pool.generate_unordered(chunks(), SAMPLING))
        assert len(given) == 10
        assert len(engines.made) == 1


def test_the_caller_of_generate_goes_before_what_nobody_has_begun() -> None:
    with pool_of(num_engines=2, max_num_seqs=4) as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(200, "training"), SAMPLING)
        until(lambda: all(len(engine.requests) == 5 for engine in engines.made))
        threading.Timer(0.05, engines.go.set).start()
        given = pool.generate(requests_of(10, "held-out"), SAMPLING)
        assert [generation.sample_id for generation in given] == [
            request.sample_id for request in requests_of(10, "held-out")
        ]
        order = [
            request.sample_id
            for engine in engines.made
            for _, (additions, _) in list(advances(engine))
            for requests, _ in additions[:1]
            for request in requests
        ]
        # Each engine had five; those of the caller are the next.
        first = {name for name in order if name.startswith("held-out")}
        assert len(first) == 10
        begun = sum(name.startswith("training") for name in order)
        assert begun < 100


def test_what_a_killed_engine_had_is_sampled_by_others_and_it_comes_back() -> None:
    with pool_of() as (pool, engines):
        events: list[str] = []
        pool.on_event = events.append
        engines.go.clear()
        pool.submit(requests_of(30), SAMPLING)
        until(lambda: len(engines.made[1].requests) == 5)  # max_num_seqs and a quarter
        engines.made[1].kill()
        until(lambda: len(engines.made) == 3)
        engines.go.set()
        pool.wait_for(has(30))
        assert {g.token_ids for g in pool.take(f"{i:03d}" for i in range(30))} == {(1, 1, 1)}
        assert events == [
            "engine 1 was lost (Died: killed); 5 requests are sent anew, restart 1 of at most 3"
        ]
        metrics = pool.metrics()
        assert metrics["rollout/num_restarts"] == 1
        assert metrics["rollout/num_resent"] == 5
        until(lambda: [e.state.name for e in pool._loop.engines] == ["SERVING"] * 2)
        pool.generate(requests_of(10, "more"), SAMPLING)
        # It is told what the other has left in /dev/shm.
        assert engines.made[2].calls[0] == ("start", (("psm_r2vpo_test_1",),))
        assert advances(engines.made[2])  # without `refresh` it serves the model folder's weights
        assert pool.metrics()["rollout/num_restarts"] == 0


def test_an_engine_that_hangs_is_killed_and_replaced() -> None:
    with pool_of(hang_seconds=1.0) as (pool, engines):
        stopped = engines.made[0]
        stopped.go = threading.Event()
        given = pool.generate(requests_of(20), SAMPLING)
        assert len(given) == 20
        until(lambda: len(engines.made) == 3)
        assert stopped.is_dead
        assert not engines.made[1].is_dead


def test_an_engine_that_loses_count_of_its_requests_is_replaced() -> None:
    with pool_of() as (pool, engines):
        events: list[str] = []
        pool.on_event = events.append
        engines.go.clear()
        pool.submit(requests_of(2), SAMPLING)
        until(lambda: engines.made[0].requests and engines.made[1].requests)
        engines.made[0].requests.clear()
        engines.go.set()
        pool.wait_for(has(2))
        assert events[0].startswith("engine 0 was lost (it has 0 requests and was sent 1)")


@pytest.mark.parametrize("max_restarts", [0, 2])
def test_more_losses_than_allowed_end_it(max_restarts: int) -> None:
    with pool_of(max_restarts=max_restarts) as (pool, engines):
        for engine in engines.made:
            engine.errors["advance"] = RuntimeError("out of memory\nand much more")
        engines.errors = {number: {"start": OSError("no such model")} for number in range(2, 9)}
        limit = f"number {max_restarts + 1} of this run, rollout.max_restarts = {max_restarts}"
        with pytest.raises(RuntimeError, match=limit) as caught:
            pool.generate(requests_of(4), SAMPLING)
        lost = {
            0: r"engine [01] was lost \(RuntimeError: out of memory\); it is",
            # Two first processes and a replacement, or one and two, in any order.
            2: r"engine [01]( \(restart [12]\) was lost \(OSError: no such model\)"
            r"| was lost \(RuntimeError: out of memory\)); it is",
        }
        assert re.match(lost[max_restarts], str(caught.value))
        with pytest.raises(RuntimeError, match=limit):  # it stays ended
            pool.wait_for(has(0))


def test_a_request_that_an_engine_refuses_is_the_callers_mistake() -> None:
    with pool_of() as (pool, engines):
        with pytest.raises(ValueError, match="request bad: the prompt is empty"):
            pool.generate([GenerationRequest("bad", (), seed=0)], SAMPLING)
        assert len(engines.made) == 2


def test_without_progress_the_caller_learns_what_engines_are_doing() -> None:
    with pool_of(timeout_seconds=0.3, hang_seconds=60) as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(13), SAMPLING)
        until(lambda: all(len(engine.requests) == 5 for engine in engines.made))
        with pytest.raises(NoAnswer) as caught:
            pool.wait_for(has(13))
        assert "no progress of the rollout in 0.3 s" in str(caught.value)
        assert "engine 1 is sampling with 5 requests" in str(caught.value)
        assert "3 requests are queued" in str(caught.value)
        with (
            mock.patch.object(engines.made[0], "call", lambda *_: Future()),
            pytest.raises(NoAnswer, match="node_id: no answer in 0.3 s"),
        ):
            pool.node_ids()


def test_every_engine_scores() -> None:
    with pool_of() as (pool, engines):
        assert pool.score_on_each([[1], [1, 2, 3]]) == [[1, 3], [101, 103]]
        engines.made[1].errors["score"] = RuntimeError("broken")
        assert pool.score_on_each([[1]]) == [[1]]
        engines.made[0].errors["score"] = ValueError("a sequence of 0 tokens")
        with pytest.raises(ValueError, match="a sequence of 0 tokens"):
            pool.score_on_each([[]])
        assert not engines.made[0].is_dead


def test_scores_wait_for_an_engine_that_is_restarted_when_there_is_no_other() -> None:
    with pool_of(num_engines=1) as (pool, engines):
        engines.made[0].kill()
        assert pool.score_on_each([[1, 2]]) == [[102]]  # by the second process
        assert pool.metrics()["rollout/num_restarts"] == 1
        engines.made[1].errors["score"] = RuntimeError("broken")
        engines.errors = {number: {"score": RuntimeError("broken")} for number in range(2, 9)}
        with pytest.raises(RuntimeError, match=r"restart 3\) was lost .* rollout.max_restarts = 3"):
            pool.score_on_each([[1, 2]])


def test_time_in_which_the_driver_was_stopped_is_neither_a_hang_nor_a_lack_of_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_pool, "WATCH_SECONDS", 0.05)
    with pool_of(timeout_seconds=1.0, hang_seconds=1.0) as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(30), SAMPLING)
        until(lambda: all(engine.requests for engine in engines.made))
        stops = [1.3]

        def all_finished(finished: Collection[str]) -> bool | None:
            if stops:
                time.sleep(stops.pop())  # no thread of the driver gets on meanwhile
                threading.Timer(0.1, engines.go.set).start()
            return True if len(finished) == 30 else None

        assert pool.wait_for(all_finished)
        assert len(engines.made) == 2


def test_engines_that_do_not_stop_in_time_are_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared_segments, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(rollout_pool, "STOP_SECONDS", 0.2)
    (tmp_path / "psm_r2vpo_test_0").touch()
    with pool_of() as (pool, engines):
        engines.made[0].go = threading.Event()
        pool.submit(requests_of(2), SAMPLING)
        until(lambda: engines.made[0].requests)
        pool.stop()
        assert [engine.is_dead for engine in engines.made] == [True, False]
        assert not list(tmp_path.iterdir())


def test_a_lost_engine_is_killed_even_if_the_pool_ends_with_it() -> None:
    with pool_of(max_restarts=0) as (pool, engines):
        engines.made[0].errors["advance"] = RuntimeError("broken")
        with pytest.raises(RuntimeError):
            pool.generate(requests_of(4), SAMPLING)
        pool.stop()
        assert engines.made[0].is_dead
        assert ("stop", ()) in engines.made[1].calls


def test_what_a_lost_engine_leaves_in_shared_memory_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared_segments, "SHARED_MEMORY", tmp_path)
    for name in ("psm_r2vpo_test_0", "psm_r2vpo_test_1", "others"):
        (tmp_path / name).touch()
    with pool_of() as (pool, engines):
        engines.made[0].kill()
        pool.generate(requests_of(4), SAMPLING)
        until(lambda: len(engines.made) == 3)
        assert {path.name for path in tmp_path.iterdir()} == {"psm_r2vpo_test_1", "others"}
    shared_segments.remove_segments(["others", "psm_gone"])
    assert (tmp_path / "others").exists()


def test_segments_of_a_process_are_found_while_they_have_a_name() -> None:
    before = set(shared_segments.list_segments())
    segment = SharedMemory(create=True, size=100)
    semaphore = multiprocessing.get_context("spawn").Lock()
    names = {segment.name, "sem." + semaphore._semlock.name.removeprefix("/")}  # type: ignore[attr-defined]
    try:
        assert set(shared_segments.list_segments()) - before == names
        del semaphore
        segment.unlink()
        assert set(shared_segments.list_segments()) == before
    finally:
        segment.close()


def test_errors_in_one_line() -> None:
    wrapped = RuntimeError("a traceback")
    wrapped.cause = OSError("no\nspace")  # type: ignore[attr-defined]
    assert describe_error(wrapped) == "OSError: no"
    assert describe_error(KeyError()) == "KeyError"


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
    monkeypatch.setattr(placement, "get_platform", lambda name: platform)
    config = RunConfig(
        rollout=RolloutConfig(num_engines=2, tensor_parallel=4),
        parallel=ParallelConfig(tensor=2, data=3),
    )
    assert placement.needed_resources(config, with_learner=False) == alone
    assert placement.needed_resources(config) == with_learner
