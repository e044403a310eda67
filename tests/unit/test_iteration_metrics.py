"""One record of an iteration from those of its updates."""

from __future__ import annotations

from r2vpo_megatron.orchestration.iteration_metrics import merge_updates


def test_updates_merge_by_what_a_metric_is():
    updates = [
        {"ratio/mean": 1.0, "ratio/max": 2.0, "ratio/min": 0.5, "ratio/penalty": 0.1},
        {"ratio/mean": 2.0, "ratio/max": 1.5, "ratio/min": 0.2, "ratio/penalty": 0.3},
    ]
    assert merge_updates(updates) == {
        "updates/num": 2.0,
        "ratio/mean": 1.5,
        "ratio/max": 2.0,
        "ratio/min": 0.2,
        "ratio/penalty": 0.3,
    }
    assert merge_updates([]) == {"updates/num": 0.0}


def test_what_only_some_updates_report_is_kept():
    """The head is compared with log_softmax in every tenth update only."""
    merged = merge_updates([{"ratio/mean": 1.0}, {"ratio/mean": 1.0, "head_check/max": 1e-6}])
    assert merged["head_check/max"] == 1e-6
