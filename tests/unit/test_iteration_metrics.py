"""One record of an iteration from those of its updates."""

from __future__ import annotations

import pytest

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


def test_staleness_merges_by_tokens():
    """Of all tokens of the iteration together: 3 of version-lag 1 with ratio 1, one with 3."""

    def update(tokens, ratio, share):
        values = {
            "tokens": tokens,
            "token_fraction": share,
            "mean_ratio": ratio,
            "second_moment": (ratio - 1) ** 2,
            "effective_sample_size": 1.0,
            "mean_advantage": ratio,
        }
        return {f"staleness_1/{name}": value for name, value in values.items()}

    merged = merge_updates([update(3.0, 1.0, 1.0), {**update(1.0, 3.0, 1.0), "ratio/mean": 2.0}])
    assert merged == pytest.approx(
        {
            "updates/num": 2.0,
            "ratio/mean": 2.0,
            "staleness_1/tokens": 2.0,
            "staleness_1/token_fraction": 1.0,
            "staleness_1/mean_ratio": 1.5,
            "staleness_1/second_moment": 1.0,
            "staleness_1/effective_sample_size": 6**2 / (4 * 12),
            "staleness_1/mean_advantage": 1.5,
        }
    )


def test_what_only_some_updates_report_is_kept():
    """The head is compared with log_softmax in every tenth update only."""
    merged = merge_updates([{"ratio/mean": 1.0}, {"ratio/mean": 1.0, "head_check/max": 1e-6}])
    assert merged["head_check/max"] == 1e-6
