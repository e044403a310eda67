"""Which groups are started when, and which make up an iteration, whatever finishes first."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    PipelineConfig,
    RunConfig,
    TrainConfig,
)
from r2vpo_megatron.orchestration.group_schedule import GroupSchedule
from r2vpo_megatron.records import Prompt


def make_config(num_iterations: int = 4, prompts: int = 3, **pipeline: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(testbed="pangu"),
        algorithm=AlgorithmConfig(behavior_logprobs="rollout"),
        train=TrainConfig(
            num_iterations=num_iterations,
            prompts_per_iteration=prompts,
            responses_per_prompt=2,
            mini_batch_samples=prompts * 2,
        ),
        pipeline=PipelineConfig(**pipeline),  # type: ignore[arg-type]
    )


def start_all(schedule: GroupSchedule, iteration: int) -> list[int]:
    """Start what may be started; the numbers of the new groups."""
    first = schedule.num_started
    for _ in range(schedule.num_startable(iteration)):
        number = schedule.num_started
        prompt = Prompt(f"p{number}", (1, 2), "")
        schedule.start(prompt, (f"{number}.0", f"{number}.1"), iteration)
    return list(range(first, schedule.num_started))


def ids(*numbers: int) -> set[str]:
    return {f"{number}.{response}" for number in numbers for response in (0, 1)}


def chosen(schedule: GroupSchedule, iteration: int, finished: set[str]) -> list[int] | None:
    groups = schedule.choose(iteration, finished)
    return None if groups is None else [group.number for group in groups]


def test_in_turn_an_iteration_is_its_own_prompts() -> None:
    schedule = GroupSchedule(make_config())
    assert start_all(schedule, 1) == [0, 1, 2]
    assert start_all(schedule, 1) == []
    assert chosen(schedule, 1, ids(0, 1)) is None
    assert chosen(schedule, 1, ids(0, 1) | {"2.0"}) is None
    assert chosen(schedule, 1, ids(2, 1, 0)) == [0, 1, 2]
    schedule.remove(schedule.choose(1, ids(0, 1, 2)) or [])
    assert start_all(schedule, 2) == [3, 4, 5]


def test_side_by_side_the_next_iterations_are_under_way_but_never_taken_early() -> None:
    schedule = GroupSchedule(make_config(mode="asynchronous", max_staleness=2))
    assert start_all(schedule, 1) == list(range(9))
    # The next iterations' groups are finished, one of this iteration's is not.
    assert chosen(schedule, 1, ids(0, 2, 3, 4, 5, 6, 7, 8)) is None
    assert chosen(schedule, 1, ids(*range(6))) == [0, 1, 2]
    schedule.remove(schedule.choose(1, ids(*range(6))) or [])
    assert start_all(schedule, 2) == [9, 10, 11]
    schedule.remove(schedule.choose(2, ids(*range(12))) or [])
    assert start_all(schedule, 3) == []  # the run needs no more
    assert schedule.metrics()["pipeline/groups_under_way"] == 6.0


def test_stragglers_are_carried_over_until_they_would_be_too_old() -> None:
    schedule = GroupSchedule(make_config(carry_over_fraction=0.3, max_staleness=1))
    assert start_all(schedule, 1) == [0, 1, 2, 3]
    assert chosen(schedule, 1, ids(1, 3)) is None
    assert chosen(schedule, 1, ids(1, 2, 3)) == [1, 2, 3]
    schedule.remove(schedule.choose(1, ids(1, 2, 3)) or [])
    assert start_all(schedule, 2) == [4, 5, 6]
    # Group 0 was started under version 0; iteration 2 is learned from version 1, 3 from 2.
    assert chosen(schedule, 2, ids(4, 5, 6)) is None
    assert chosen(schedule, 2, ids(0, 4, 6)) == [0, 4, 6]
    # Two unfinished ones are more than may be overtaken.
    assert chosen(schedule, 2, ids(0, 6)) is None


@pytest.mark.parametrize(("mode", "least"), [("synchronous", 1), ("asynchronous", 2)])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_finishes_first_every_group_is_learned_once_and_in_time(
    mode: str, least: int, data: st.DataObject
) -> None:
    prompts = data.draw(st.integers(1, 5))
    fraction = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    staleness = data.draw(st.integers(least, 3))
    config = make_config(
        6, prompts, mode=mode, max_staleness=staleness, carry_over_fraction=fraction
    )
    schedule = GroupSchedule(config)
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    begun: dict[int, int] = {}  # number of a group -> version that it was started under
    running: list[int] = []
    finished: set[str] = set()
    learned: list[int] = []
    for iteration in range(1, 7):
        new = start_all(schedule, iteration)
        begun |= dict.fromkeys(new, iteration - 1)
        running += new
        while (groups := schedule.choose(iteration, finished)) is None:
            assert running, "waits for what nobody samples"
            finished |= ids(running.pop(int(random.integers(len(running)))))
        assert len(groups) == prompts
        for group in groups:
            assert iteration - 1 - begun[group.number] <= (
                staleness if config.mixes_versions else 0
            )
        learned += [group.number for group in groups]
        schedule.remove(groups)
    assert sorted(learned) == list(range(6 * prompts))


def test_without_carry_over_completion_order_decides_nothing() -> None:
    config = make_config(mode="asynchronous", max_staleness=1)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 4, 2, 0, 1]):
        schedule, finished = GroupSchedule(config), set()
        start_all(schedule, 1)
        for number in order:
            finished |= ids(number)
            if groups := chosen(schedule, 1, finished):
                break
        assert groups == [0, 1, 2]


def test_what_cannot_work_is_refused() -> None:
    config = make_config(mode="asynchronous", max_staleness=1, carry_over_fraction=0.1)
    with pytest.raises(ValueError, match=r"pipeline.max_staleness = 1 .* at least 2"):
        config.validate()
    config = make_config(mode="asynchronous")
    config = replace(config, algorithm=replace(config.algorithm, behavior_logprobs="learner"))
    with pytest.raises(ValueError, match=r"algorithm.behavior_logprobs = 'learner' .* 'rollout'"):
        config.validate()


def test_a_run_that_goes_on_with_fewer_iterations_starts_nothing_more() -> None:
    schedule = GroupSchedule(make_config(mode="asynchronous", max_staleness=1))
    start_all(schedule, 1)  # groups of iterations 1 and 2
    shorter = GroupSchedule(make_config(num_iterations=1, mode="asynchronous", max_staleness=1))
    prompt = Prompt("p", (1,), "")
    shorter.load_state_dict(schedule.state_dict(), lambda number: (prompt, (str(number),)))
    assert shorter.num_started == 6 and shorter.num_startable(1) == 0
