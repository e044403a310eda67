"""Weight pushes to engines that are threads: requests under way, losses, restarted engines."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import pytest

from r2vpo_megatron.orchestration import push_targets
from r2vpo_megatron.orchestration.engine_loop import Pace
from r2vpo_megatron.orchestration.pool_engines import EngineState, PoolEngine
from r2vpo_megatron.orchestration.push_targets import PushTargets, TargetsLost
from r2vpo_megatron.orchestration.rollout_pool import RolloutPool
from r2vpo_megatron.rollout.dispatch import EngineId
from r2vpo_megatron.rollout.engine import NonFiniteLogprob
from tests.fake_engines import (
    SAMPLING,
    Engines,
    FakeEngine,
    advances,
    has,
    pool_of,
    requests_of,
    until,
)


def go_on_when_paused(pool: RolloutPool, engines: Engines) -> None:
    """The slices that engines have go on once a push keeps the loop from queueing more."""

    def watch() -> None:
        until(lambda: pool._loop.pace is not Pace.RUNNING)
        engines.go.set()

    threading.Thread(target=watch, daemon=True).start()


def push(pool: RolloutPool, version: int, only_waiting: bool = False) -> list[int]:
    with pool.pushing(version, only_waiting) as targets:
        return targets.finish(targets.start("load", version))


def test_a_push_with_keep_leaves_requests_where_they_are() -> None:
    with pool_of(in_flight="keep") as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(20), SAMPLING)
        until(lambda: all(len(engine.requests) == 5 for engine in engines.made))
        go_on_when_paused(pool, engines)
        with pool.pushing(2) as targets:
            assert targets.membership == ("engine 0", "engine 1")
            assert targets.workers_per_engine == 1
            had = [dict(engine.requests) for engine in engines.made]
            num_calls = [len(engine.calls) for engine in engines.made]
            assert all(len(part) == 5 for part in had)
            time.sleep(0.05)
            assert [len(engine.calls) for engine in engines.made] == num_calls
            targets.finish(targets.start("load", 2))
            assert pool.policy_version == 0
        assert pool.policy_version == 2
        pool.wait_for(has(20))
        given = pool.take(f"{i:03d}" for i in range(20))
        # Two slices were queued when it began.
        assert {g.policy_versions.tobytes() for g in given[:10]} == {as_bytes(1, 1, 2)}
        assert {g.policy_versions.tobytes() for g in given[10:]} == {as_bytes(2, 2, 2)}
        assert not any(name == "abort_requests" for e in engines.made for name, _ in e.calls)


def as_bytes(*versions: int) -> bytes:
    return np.array(versions, dtype=np.int64).tobytes()


def test_a_push_with_abort_hands_requests_out_anew_with_their_tokens() -> None:
    with pool_of(in_flight="abort") as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(20), SAMPLING)
        until(lambda: all(len(engine.requests) == 5 for engine in engines.made))
        go_on_when_paused(pool, engines)
        with pool.pushing(2) as targets:
            assert [engine.requests for engine in engines.made] == [{}, {}]
            assert pool.metrics()["rollout/num_unfinished"] == 20
            targets.finish(targets.start("load", 2))
        pool.wait_for(has(20))
        given = pool.take(f"{i:03d}" for i in range(20))
        assert {g.policy_versions.tobytes() for g in given[:10]} == {as_bytes(1, 1, 2)}
        assert {g.rollout_logprobs.tolist()[-1] for g in given[:10]} == {-2.0}
        assert {g.token_ids for g in given[10:]} == {(2, 2, 2)}
        assert pool.metrics()["rollout/num_resent"] == 0


def test_a_push_with_drain_waits_for_what_engines_have_and_no_more() -> None:
    with pool_of(in_flight="drain") as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(20), SAMPLING)
        until(lambda: all(len(engine.requests) == 5 for engine in engines.made))
        go_on_when_paused(pool, engines)
        with pool.pushing(2) as targets:
            assert [engine.requests for engine in engines.made] == [{}, {}]
            targets.finish(targets.start("load", 2))
        pool.wait_for(has(20))
        given = pool.take(f"{i:03d}" for i in range(20))
        assert {g.token_ids for g in given[:10]} == {(1, 1, 1)}
        assert {g.token_ids for g in given[10:]} == {(2, 2, 2)}


def test_a_run_that_is_to_end_does_not_wait_for_what_is_drained() -> None:
    with pool_of(in_flight="drain") as (pool, engines):
        engines.go.clear()
        pool.submit(requests_of(20), SAMPLING)
        until(lambda: all(len(engine.requests) == 5 for engine in engines.made))

        def end() -> None:
            raise KeyboardInterrupt

        pool.before_look = end
        with pytest.raises(KeyboardInterrupt), pool.pushing(2):
            pytest.fail("engines are not at rest")
        engines.go.set()


def test_an_engine_that_fails_in_a_push_is_left_behind_and_replaced() -> None:
    with pool_of() as (pool, engines):
        pool.refresh = lambda: push(pool, pool.policy_version, only_waiting=True)
        engines.made[0].errors["load"] = RuntimeError("damaged bucket")
        with pool.pushing(2) as targets:
            pending = targets.start_each("load", [(7,), (2,)])
            assert targets.finish(pending) == [2]
            assert targets.membership == ("engine 1",)
            assert targets.finish(pending) == [2]  # the one that is left behind is passed over
        pool.generate(requests_of(4), SAMPLING)
        until(lambda: len(engines.made) == 3)
        pool.wait_for(lambda finished: True if engines.made[2].policy_version == 2 else None)
        with pool.pushing(3) as targets:
            assert set(targets.membership) == {"engine 1", "engine 0 (restart 1)"}
            targets.finish(targets.start("load", 3))


def test_a_log_prob_that_is_no_number_ends_the_run_and_costs_no_restart() -> None:
    with pool_of() as (pool, engines):
        engines.made[0].errors["advance"] = NonFiniteLogprob("sample 007: response token 3 is nan")
        with pytest.raises(NonFiniteLogprob, match="sample 007"):
            pool.generate(requests_of(20), SAMPLING)
        assert len(engines.made) == 2


def test_a_push_that_no_engine_survives_can_be_made_anew_to_their_replacements() -> None:
    with pool_of() as (pool, engines):
        pool.refresh = lambda: push(pool, pool.policy_version, only_waiting=True)
        for engine in engines.made:
            engine.errors["load"] = RuntimeError("damaged bucket")
        with pytest.raises(TargetsLost, match="engine 0: RuntimeError: damaged bucket; engine 1: "):
            push(pool, 2)
        # Until then nothing is sampled: not of the version before, nor of new weights by its name.
        until(lambda: [engine.state.name for engine in pool._loop.engines] == ["WAITING"] * 2)
        with pytest.raises(TargetsLost):
            pool.generate(requests_of(4), SAMPLING)
        with pytest.raises(TargetsLost):
            pool.score_on_each([[1]])
        assert not any(advances(engine) for engine in engines.made)
        assert pool.policy_version == 0
        assert push(pool, 2) == [2, 2]
        given = pool.generate(requests_of(10, "more"), SAMPLING)
        assert {generation.token_ids for generation in given} == {(2, 2, 2)}


def test_pushes_that_no_engine_survives_end_with_the_restarts() -> None:
    with pool_of(num_engines=1, max_restarts=2) as (pool, engines):
        broken = {"load": RuntimeError("damaged bucket")}
        engines.made[0].errors = broken
        engines.errors = {1: broken, 2: broken}
        for _ in range(3):
            with pytest.raises(TargetsLost):
                push(pool, 2)
        with pytest.raises(RuntimeError, match="rollout.max_restarts = 2"):
            push(pool, 2)


def test_an_error_of_the_sender_ends_the_pool() -> None:
    with pool_of() as (pool, engines):
        with pytest.raises(KeyError), pool.pushing(2):
            raise KeyError("learner")
        assert pool.policy_version == 0
        with pytest.raises(KeyError):
            pool.generate(requests_of(1), SAMPLING)
        assert not any(engine.requests for engine in engines.made)


def test_a_restarted_engine_samples_only_after_the_current_weights() -> None:
    with pool_of() as (pool, engines):
        push(pool, 5)
        refreshes: list[list[int]] = []
        engines.made[0].kill()
        pool.generate(requests_of(4), SAMPLING)
        until(lambda: [e.state.name for e in pool._loop.engines] == ["SERVING", "WAITING"])
        pool.generate(requests_of(10, "second"), SAMPLING)
        assert not advances(engines.made[2])  # weights were pushed, and nothing can push them anew
        pool.refresh = lambda: refreshes.append(push(pool, pool.policy_version, only_waiting=True))
        given = pool.generate(requests_of(300, "third"), SAMPLING)
        assert refreshes == [[5]]
        assert advances(engines.made[2])
        assert {generation.token_ids for generation in given} == {(5, 5, 5)}


def test_others_sample_while_a_restarted_engine_gets_its_weights() -> None:
    with pool_of() as (pool, engines):
        push(pool, 5)
        engines.made[0].kill()
        pool.generate(requests_of(4), SAMPLING)
        until(lambda: [e.state.name for e in pool._loop.engines] == ["SERVING", "WAITING"])
        with pool.pushing(5, only_waiting=True) as targets:
            assert targets.membership == ("engine 0 (restart 1)",)
            before = len(advances(engines.made[1]))
            pool.submit(requests_of(4, "meanwhile"), SAMPLING)
            until(lambda: len(advances(engines.made[1])) > before + 2)
            targets.finish(targets.start("load", 5))
        with pytest.raises(ValueError, match="version=6"), pool.pushing(6, only_waiting=True):
            pass


def test_a_restarted_engine_that_dies_of_its_weights_is_restarted_again() -> None:
    with pool_of() as (pool, engines):
        push(pool, 5)
        engines.errors = {2: {"load": RuntimeError("damaged bucket")}}
        pool.refresh = lambda: push(pool, pool.policy_version, only_waiting=True)
        engines.made[0].kill()
        pool.generate(requests_of(10), SAMPLING)
        pool.wait_for(
            lambda finished: (
                True if len(engines.made) == 4 and engines.made[3].policy_version == 5 else None
            )
        )
        assert pool.metrics()["rollout/num_restarts"] == 2


def test_a_push_waits_for_a_restarting_engine_when_it_is_the_only_one() -> None:
    with pool_of(num_engines=1) as (pool, engines):
        push(pool, 2)
        engines.made[0].kill()
        pool.submit(requests_of(3), SAMPLING)
        until(lambda: len(engines.made) == 2)
        assert push(pool, 3) == [3]
        pool.wait_for(has(3))
        assert {g.token_ids for g in pool.take(f"{i:03d}" for i in range(3))} == {(3, 3, 3)}


def test_an_engine_that_is_restarted_during_the_first_push_gets_its_weights() -> None:
    with pool_of() as (pool, engines):
        with pool.pushing(2) as targets:
            engines.made[0].errors["load"] = RuntimeError("damaged bucket")
            targets.finish(targets.start("load", 2))
            until(lambda: {e.state.name for e in pool._loop.engines} == {"SERVING", "WAITING"})
        given = pool.generate(requests_of(30), SAMPLING)
        assert {generation.token_ids for generation in given} == {(2, 2, 2)}


def test_an_answer_may_come_late_if_the_driver_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers are there when the driver goes on, but its threads have not taken them in."""
    future: Future[str] = Future()
    engine = PoolEngine(EngineId(0), FakeEngine(0, threading.Event()), EngineState.SERVING, 0.0)
    stops = [0.5]

    def wait_through_a_stop(futures: list[Future[str]], timeout: float) -> Any:
        if stops:
            time.sleep(stops.pop())
            threading.Timer(0.05, future.set_result, ["loaded"]).start()
            return wait(futures, 0)
        return wait(futures, timeout)

    monkeypatch.setattr(push_targets, "wait", wait_through_a_stop)
    targets = PushTargets([engine], 1, hang_seconds=0.4, lose=lambda engine, cause: None)
    assert targets.finish([(engine, future)]) == ["loaded"]
    with pytest.raises(TargetsLost, match="engine 0: no answer in 0.4 s"):
        targets.finish([(engine, Future())])
