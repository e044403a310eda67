"""Which nodes ranks and engines are put on, where the nodes of a Ray belong to groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.orchestration.placement import (
    LEARNER_GROUP,
    ROLLOUT_GROUP,
    actor_options,
    needed_resources,
    nodes_of_ranks,
    rank_placements,
)


def node_id(name: str) -> str:
    """As Ray writes one: 28 bytes in hex."""
    return name.encode().hex().ljust(56, "f")


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {
        "NodeID": node_id(name),
        "NodeManagerHostname": name,
        "Alive": alive,
        "Resources": resources,
    }


def config(device: str, *, groups: bool) -> RunConfig:
    base = RunConfig()
    return replace(
        base,
        parallel=replace(base.parallel, tensor=4),
        rollout=replace(base.rollout, num_engines=3, tensor_parallel=2),
        runtime=replace(
            base.runtime,
            device=device,
            ray_address="head:1" if groups else "",
            node_groups=groups,
        ),
    )


def test_nodes_are_filled_in_the_order_of_their_names() -> None:
    nodes = [
        node("n10", learner=2.0),
        node("n9", learner=3.0),
        node("n1", rollout=8.0),
        node("n2", learner=0.0, rollout=8.0),
        node("a3", alive=False, learner=8.0),
    ]
    n9, n10 = node_id("n9"), node_id("n10")
    assert nodes_of_ranks(nodes, 4) == [n9, n9, n9, n10]
    assert nodes_of_ranks(reversed(nodes), 5) == [n9, n9, n9, n10, n10]


def test_too_few_devices_are_named() -> None:
    with pytest.raises(RuntimeError, match="4 ranks, and the nodes .* lend 3 devices"):
        nodes_of_ranks([node("a", learner=3.0), node("b", rollout=9.0)], 4)


@pytest.mark.parametrize("device", ["cpu", "npu", "cuda"])
def test_workers_ask_for_their_group(device: str) -> None:
    grouped = config(device, groups=True)
    engine = actor_options(grouped, {}, 2, group=ROLLOUT_GROUP)
    accelerators = {"npu": {"NPU": 2}}.get(device, {})
    assert engine["resources"] == {ROLLOUT_GROUP: 2} | accelerators
    assert engine.get("num_gpus") == (2 if device == "cuda" else None)
    assert actor_options(grouped, {}, group=LEARNER_GROUP)["resources"][LEARNER_GROUP] == 1

    needed = needed_resources(grouped)
    assert needed == needed_resources(config(device, groups=False)) | {
        LEARNER_GROUP: 4,
        ROLLOUT_GROUP: 6,
    }
    assert needed_resources(grouped, with_learner=False)[LEARNER_GROUP] == 0


def test_without_groups_ray_decides() -> None:
    plain = config("cpu", groups=False)
    assert "resources" not in actor_options(plain, {}, 2, group=ROLLOUT_GROUP)
    assert rank_placements(plain) == [{}] * 4
    assert set(needed_resources(plain)) == {"CPU"}


def test_ranks_are_bound_to_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("b", learner=2.0), node("a", learner=2.0)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    strategies = [
        place["scheduling_strategy"] for place in rank_placements(config("cpu", groups=True))
    ]
    a, b = node_id("a"), node_id("b")
    assert [strategy.node_id for strategy in strategies] == [a, a, b, b]
    assert not any(strategy.soft for strategy in strategies)


def test_groups_need_a_ray_that_has_them() -> None:
    with pytest.raises(ValueError, match="runtime.node_groups = True .* runtime.ray_address"):
        replace(RunConfig().runtime, node_groups=True)
