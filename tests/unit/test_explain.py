"""Counts of a run whose iterations do not all make as many updates."""

from __future__ import annotations

from dataclasses import replace

from r2vpo_megatron.cli.explain import derive_counts
from recipes.tiny_cpu import r2vpo_off_policy


def test_updates_that_are_not_whole() -> None:
    config = r2vpo_off_policy()
    replay = replace(config.replay, update_to_data="5/4")
    counts = derive_counts(replace(config, replay=replay))
    assert counts["updates per iteration"] == "5/2 on average: 2 or 3"  # 5/4 x 512 / 256
    assert counts["uses of a sample, expected"] == "1.25"
    assert counts["iterations, updates in all"] == "30, 75"

    rare = replace(config, replay=replace(config.replay, update_to_data=0.01))
    assert derive_counts(rare)["updates per iteration"] == "1/50 on average: 0 or 1"
    assert derive_counts(rare)["iterations, updates in all"] == "30, 0"


def test_what_runs_side_by_side() -> None:
    def turns(**fields: object) -> str:
        config = r2vpo_off_policy()
        pipeline = replace(config.pipeline, **fields)
        return derive_counts(replace(config, pipeline=pipeline))["rollout and learner"]

    assert turns() == "in turn, new samples up to 0 versions old"
    side_by_side = turns(mode="asynchronous", max_staleness=2)
    assert (
        side_by_side == "side by side, up to 1024 responses ahead, new samples up to 2 versions old"
    )
    carried = turns(carry_over_fraction=0.1)  # of 64 groups
    assert carried == "in turn, up to 7 groups carried over, new samples up to 1 versions old"
