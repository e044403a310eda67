"""Requests to engines and back: nothing lost, nothing twice, in order, by load."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from r2vpo_megatron.records import Generation, GenerationRequest
from r2vpo_megatron.rollout.dispatch import Additions, Dispatcher, EngineId
from r2vpo_megatron.rollout.sampling import SamplingSettings

SAMPLING = SamplingSettings(max_response_tokens=40)
OTHER_SAMPLING = SamplingSettings(max_response_tokens=7, greedy=True)
A, B, C = EngineId(0), EngineId(1), EngineId(2)


def requests_of(*sample_ids: str) -> list[GenerationRequest]:
    """Samples of a group, the id up to its last dot, have one prompt."""
    prompts = [sample_id.rpartition(".")[0] or sample_id for sample_id in sample_ids]
    return [
        GenerationRequest(sample_id, tuple(prompt.encode()), seed=5)
        for sample_id, prompt in zip(sample_ids, prompts, strict=True)
    ]


def generation(
    sample_id: str, tokens: list[int], reason: str = "stop", version: int = 0
) -> Generation:
    """Log-probs that tell each token from every other: -token / 8, exact in float32."""
    return Generation(
        sample_id,
        tuple(tokens),
        np.array([-token / 8 for token in tokens], dtype=np.float32),
        reason,
        np.full(len(tokens), version, dtype=np.int64),
    )


def ids_of(additions: Additions) -> list[str]:
    return [request.sample_id for requests, _ in additions for request in requests]


def dispatcher_of(*engines: EngineId, limit: int | None = None) -> Dispatcher:
    dispatcher = Dispatcher(limit)
    for engine in engines:
        dispatcher.add_engine(engine)
    return dispatcher


def test_a_single_engine_without_a_bound_gets_all_at_once_in_order() -> None:
    dispatcher = dispatcher_of(A)
    names = [f"{group}.{index}" for group in "cab" for index in range(40)]
    dispatcher.submit(requests_of(*names), SAMPLING)
    added = dispatcher.assign([A])
    assert len(added[A]) == 1  # of one sampling
    assert added[A][0][1] is SAMPLING
    assert ids_of(added[A]) == names


def test_by_load_with_ties_to_the_lower_index() -> None:
    dispatcher = dispatcher_of(C, B, A)
    dispatcher.submit(requests_of(*"uvwxy"), SAMPLING)  # five prompts
    added = dispatcher.assign([A, B, C])
    assert {engine: ids_of(part) for engine, part in added.items()} == {
        A: ["u", "x"],
        B: ["v", "y"],
        C: ["w"],
    }
    dispatcher.finish(B, [generation("v", [1]), generation("y", [1])])
    dispatcher.submit(requests_of("z"), SAMPLING)
    assert ids_of(dispatcher.assign([A, B, C])[B]) == ["z"]


def test_a_group_stays_together_up_to_an_equal_share() -> None:
    dispatcher = dispatcher_of(A, B)
    names = [f"1.{group}.{index}" for group in "abc" for index in range(4)]
    dispatcher.submit(requests_of(*names), SAMPLING)
    added = dispatcher.assign([A, B])
    # Six each: two whole groups, and the third halved.
    assert ids_of(added[A]) == ["1.a.0", "1.a.1", "1.a.2", "1.a.3", "1.c.0", "1.c.1"]
    assert ids_of(added[B]) == ["1.b.0", "1.b.1", "1.b.2", "1.b.3", "1.c.2", "1.c.3"]


def test_a_group_is_known_by_its_prompt_whatever_its_samples_are_called() -> None:
    dispatcher = dispatcher_of(A, B)
    prompts = {"p": (1, 2), "q": (1, 3)}
    asked = [GenerationRequest(f"{p}/{i}", prompts[p], seed=i) for p in "pq" for i in range(3)]
    dispatcher.submit(asked, SAMPLING)
    added = dispatcher.assign([A, B])
    assert ids_of(added[A]) == ["p/0", "p/1", "p/2"]
    assert ids_of(added[B]) == ["q/0", "q/1", "q/2"]


def test_what_goes_first_is_in_the_order_of_its_own_submission() -> None:
    dispatcher = dispatcher_of(A, limit=2)
    dispatcher.submit(requests_of(*"stu"), SAMPLING)
    dispatcher.assign([A])
    dispatcher.submit(requests_of("v", "w"), OTHER_SAMPLING, first=True)
    dispatcher.submit(requests_of("x"), SAMPLING, first=True)
    # What had begun goes on; aborted, it comes after those that go first, and before its own lane.
    dispatcher.finish(A, [generation("s", [1], "abort"), generation("t", [1])])
    assert ids_of(dispatcher.assign([A])[A]) == ["v", "w"]
    dispatcher.finish(A, [generation("v", [], "abort"), generation("w", [1])])
    assert ids_of(dispatcher.assign([A])[A]) == ["v", "x"]
    dispatcher.finish(A, [generation("v", [1]), generation("x", [1])])
    assert ids_of(dispatcher.assign([A])[A]) == ["s", "u"]


def test_the_bound_keeps_the_rest_for_whoever_is_free_first() -> None:
    dispatcher = dispatcher_of(A, B, limit=2)
    dispatcher.submit(requests_of(*"tuvwxyz"), SAMPLING)
    added = dispatcher.assign([A, B])
    assert (ids_of(added[A]), ids_of(added[B])) == (["t", "v"], ["u", "w"])
    assert dispatcher.assign([A, B]) == {}
    dispatcher.finish(A, [generation("t", [1]), generation("v", [1])])
    added = dispatcher.assign([A, B])
    assert list(added) == [A]
    assert ids_of(added[A]) == ["x", "y"]
    assert (dispatcher.num_queued, dispatcher.num_on(A), dispatcher.num_unfinished) == (1, 2, 5)


def test_requests_wait_for_the_least_loaded_engine_until_it_can_be_told() -> None:
    dispatcher = dispatcher_of(A, B)
    dispatcher.submit(requests_of("x", "y", "z"), SAMPLING)
    dispatcher.assign([A, B])  # x and z to A, y to B
    dispatcher.submit(requests_of("w"), SAMPLING)
    assert dispatcher.assign([A]) == {}
    assert ids_of(dispatcher.assign([B])[B]) == ["w"]


def test_sampling_settings_travel_with_their_requests() -> None:
    dispatcher = dispatcher_of(A)
    dispatcher.submit(requests_of("u", "v"), SAMPLING)
    dispatcher.submit(requests_of("w"), OTHER_SAMPLING)
    dispatcher.submit(requests_of("x"), SAMPLING)
    added = dispatcher.assign([A])[A]
    assert [([request.sample_id for request in part], how) for part, how in added] == [
        (["u", "v"], SAMPLING),
        (["w"], OTHER_SAMPLING),
        (["x"], SAMPLING),
    ]


def test_an_aborted_response_goes_on_with_its_tokens_and_is_given_as_one() -> None:
    dispatcher = dispatcher_of(A, limit=1)
    request = GenerationRequest("x", (1, 2), seed=5, partial_token_ids=(30,))
    dispatcher.submit([request], SAMPLING)
    dispatcher.assign([A])
    assert dispatcher.finish(A, [generation("x", [31, 32], "abort", version=3)]) == 0
    assert not dispatcher.finished

    ((again,), _) = dispatcher.assign([A])[A][0]
    assert again.partial_token_ids == (30, 31, 32)
    assert (again.prompt_token_ids, again.seed) == ((1, 2), 5)
    dispatcher.finish(A, [generation("x", [], "abort", version=4)])
    ((again,), _) = dispatcher.assign([A])[A][0]
    assert again.partial_token_ids == (30, 31, 32)
    assert dispatcher.finish(A, [generation("x", [33], "length", version=5)]) == 1

    (whole,) = dispatcher.take(["x"])
    assert whole.token_ids == (31, 32, 33)
    assert whole.finish_reason == "length"
    assert whole.rollout_logprobs.tolist() == [-31 / 8, -4.0, -33 / 8]
    assert whole.rollout_logprobs.dtype == np.float32
    assert whole.policy_versions.tolist() == [3, 3, 5]
    assert whole.policy_versions.dtype == np.int64


def test_what_comes_back_goes_before_what_was_never_handed_out() -> None:
    dispatcher = dispatcher_of(A, B, limit=2)
    dispatcher.submit(requests_of(*"stuvwxyz"), SAMPLING)
    dispatcher.assign([A, B])  # s and u to A, t and v to B
    dispatcher.finish(B, [generation("v", [8], "abort")])
    assert dispatcher.lose_engine(A) == 2
    assert dispatcher.lose_engine(A) == 0
    dispatcher.finish(B, [generation("t", [9])])
    added = dispatcher.assign([B])
    assert ids_of(added[B]) == ["s", "u"]
    dispatcher.finish(B, [generation("s", [9]), generation("u", [9])])
    assert ids_of(dispatcher.assign([B])[B]) == ["v", "w"]


def test_a_lost_engine_is_not_listened_to_and_its_tokens_do_not_count() -> None:
    dispatcher = dispatcher_of(A, B, limit=1)
    dispatcher.submit(requests_of("x"), SAMPLING)
    dispatcher.assign([A, B])
    dispatcher.finish(A, [generation("x", [3], "abort", version=1)])
    dispatcher.assign([A, B])
    dispatcher.lose_engine(A)
    assert dispatcher.finish(A, [generation("x", [77])]) == 0
    (((again,), _),) = dispatcher.assign([B])[B]
    assert again.partial_token_ids == (3,)  # of the abort; not what died with the engine
    dispatcher.finish(B, [generation("x", [4], version=2)])
    assert dispatcher.take(["x"])[0].token_ids == (3, 4)


def test_a_replacement_is_another_engine() -> None:
    dispatcher = dispatcher_of(A, limit=1)
    dispatcher.submit(requests_of("x"), SAMPLING)
    dispatcher.assign([A])
    dispatcher.lose_engine(A)
    replacement = EngineId(0, 1)
    assert (str(A), str(replacement)) == ("engine 0", "engine 0 (restart 1)")
    dispatcher.add_engine(replacement)
    assert ids_of(dispatcher.assign([replacement])[replacement]) == ["x"]
    dispatcher.add_engine(replacement)  # it keeps what it has
    assert dispatcher.num_on(replacement) == 1
    dispatcher.finish(A, [generation("x", [77])])
    assert not dispatcher.finished


def test_an_id_that_is_under_way_is_refused_and_nothing_of_its_call_is_queued() -> None:
    dispatcher = dispatcher_of(A)
    dispatcher.submit(requests_of("x"), SAMPLING)
    for new in (["y", "x"], ["y", "y"]):
        with pytest.raises(ValueError, match="sample_id='[xy]': is under way already"):
            dispatcher.submit(requests_of(*new), SAMPLING)
    assert dispatcher.num_unfinished == 1
    dispatcher.assign([A])
    dispatcher.finish(A, [generation("x", [1])])
    with pytest.raises(ValueError, match="sample_id='x'"):  # nobody has taken it
        dispatcher.submit(requests_of("x"), SAMPLING)
    dispatcher.take(["x"])
    dispatcher.submit(requests_of("x"), SAMPLING)


def test_an_engine_that_gives_what_it_does_not_have_is_found_out() -> None:
    dispatcher = dispatcher_of(A, B)
    dispatcher.submit(requests_of("x", "y"), SAMPLING)
    dispatcher.assign([A, B])
    with pytest.raises(RuntimeError, match="engine 1 gave back 'x', which it does not have"):
        dispatcher.finish(B, [generation("x", [1])])


def test_without_engines_requests_wait() -> None:
    dispatcher = Dispatcher(2)
    dispatcher.submit(requests_of("x"), SAMPLING)
    assert dispatcher.assign([A]) == {}
    with pytest.raises(ValueError, match="max_per_engine=0"):
        Dispatcher(0)


class AnyInterleaving(RuleBasedStateMachine):
    """Engines as sets of requests; each sampled token is a number that occurs once."""

    def __init__(self) -> None:
        super().__init__()
        self.limit: int | None = 3
        self.dispatcher = Dispatcher(self.limit)
        self.next_token = 0
        self.num_submitted = 0
        self.version = 0
        self.engines: dict[EngineId, dict[str, GenerationRequest]] = {}
        self.dead: list[tuple[EngineId, str]] = []
        self.tokens: dict[str, list[int]] = {}  # by sample, what must be in its response
        self.versions: dict[str, list[int]] = {}
        self.taken: set[str] = set()
        self.starts = [0, 0, 0]
        self.never_assigned: list[str] = []

    def sample(self, sample_id: str, num_tokens: int) -> list[int]:
        tokens = list(range(self.next_token, self.next_token + num_tokens))
        self.next_token += num_tokens
        return tokens

    @rule(index=st.integers(0, 2))
    def start_engine(self, index: int) -> None:
        if any(engine.number == index for engine in self.engines):
            return
        engine = EngineId(index, self.starts[index])
        self.starts[index] += 1
        self.engines[engine] = {}
        self.dispatcher.add_engine(engine)

    @rule(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def submit(self, sizes: list[int]) -> None:
        names = [
            f"{self.num_submitted + group:03d}.{index}"
            for group, size in enumerate(sizes)
            for index in range(size)
        ]
        self.num_submitted += len(sizes)
        self.dispatcher.submit(requests_of(*names), SAMPLING)
        self.tokens |= {name: [] for name in names}
        self.versions |= {name: [] for name in names}
        self.never_assigned += names

    @rule(data=st.data())
    def assign(self, data: st.DataObject) -> None:
        ready = data.draw(st.sets(st.sampled_from(sorted(self.engines)))) if self.engines else set()
        added = self.dispatcher.assign(ready)
        assert set(added) <= ready
        for engine, additions in added.items():
            assert ids_of(additions) == sorted(ids_of(additions))  # the order of submission
            for requests, _ in additions:
                for request in requests:
                    assert list(request.partial_token_ids) == self.tokens[request.sample_id]
                    assert request.sample_id not in self.engines[engine]
                    self.engines[engine][request.sample_id] = request
        handed = {name for additions in added.values() for name in ids_of(additions)}
        waiting = [name for name in self.never_assigned if name not in handed]
        # First come, first served: those never handed out are a tail of the queue.
        assert self.never_assigned[len(self.never_assigned) - len(waiting) :] == waiting
        self.never_assigned = waiting

    @precondition(lambda self: any(self.engines.values()))
    @rule(data=st.data(), reason=st.sampled_from(["stop", "length", "abort"]))
    def give_back(self, data: st.DataObject, reason: str) -> None:
        engine = data.draw(st.sampled_from([e for e, part in self.engines.items() if part]))
        names = data.draw(st.sets(st.sampled_from(sorted(self.engines[engine])), min_size=1))
        given = []
        for name in sorted(names):
            tokens = self.sample(name, data.draw(st.integers(0 if reason == "abort" else 1, 2)))
            given.append(generation(name, tokens, reason, self.version))
            self.tokens[name] += tokens
            self.versions[name] += [self.version] * len(tokens)
            del self.engines[engine][name]
        assert self.dispatcher.finish(engine, given) == (0 if reason == "abort" else len(names))

    @rule()
    def push(self) -> None:
        self.version += 1

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(sorted(self.engines)))
        had = self.engines.pop(engine)
        assert self.dispatcher.lose_engine(engine) == len(had)
        self.dead += [(engine, name) for name in had]

    @precondition(lambda self: self.dead)
    @rule()
    def hear_from_the_dead(self) -> None:
        engine, name = self.dead.pop()
        assert self.dispatcher.finish(engine, [generation(name, [10**6])]) == 0

    @rule()
    def take(self) -> None:
        names = sorted(self.dispatcher.finished, reverse=True)
        for name, done in zip(names, self.dispatcher.take(names), strict=True):
            assert done.sample_id == name
            assert name not in self.taken
            self.taken.add(name)
            assert list(done.token_ids) == self.tokens[name]
            assert done.rollout_logprobs.tolist() == [-token / 8 for token in self.tokens[name]]
            assert done.policy_versions.tolist() == self.versions[name]

    @invariant()
    def every_sample_is_somewhere_once(self) -> None:
        dispatcher = self.dispatcher
        on_engines = [name for part in self.engines.values() for name in part]
        assert len(on_engines) == len(set(on_engines))
        finished = set(dispatcher.finished)
        assert not finished & (self.taken | set(on_engines))
        assert dispatcher.num_unfinished == len(self.tokens) - len(finished) - len(self.taken)
        assert dispatcher.num_queued == dispatcher.num_unfinished - len(on_engines)
        for engine, part in self.engines.items():
            assert dispatcher.num_on(engine) == len(part)
            assert self.limit is None or len(part) <= self.limit

    def teardown(self) -> None:
        """From wherever it is, all that was submitted comes out."""
        self.start_engine(0)
        while self.dispatcher.num_unfinished:
            for engine, additions in self.dispatcher.assign(list(self.engines)).items():
                self.engines[engine] |= {
                    request.sample_id: request for requests, _ in additions for request in requests
                }
            assert any(self.engines.values())
            for engine, part in self.engines.items():
                for name in list(part):
                    (token,) = self.sample(name, 1)
                    self.tokens[name].append(token)
                    self.versions[name].append(self.version)
                    self.dispatcher.finish(
                        engine, [generation(name, [token], version=self.version)]
                    )
                    del part[name]
        self.take()
        assert self.taken == set(self.tokens)


class AnyInterleavingWithoutABound(AnyInterleaving):
    def __init__(self) -> None:
        super().__init__()
        self.limit = None
        self.dispatcher = Dispatcher(None)


TestAnyInterleaving = AnyInterleaving.TestCase
TestAnyInterleaving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyInterleavingWithoutABound = AnyInterleavingWithoutABound.TestCase
TestAnyInterleavingWithoutABound.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None
)
