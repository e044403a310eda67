"""Lemma 3.1: the divergences by their definitions, their series, and the rigorous bounds."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo_megatron.rl.divergences import (
    DIVERGENCES,
    approximation_quotient,
    divergence,
    largest_deviation,
    quotient_bounds,
    second_moment,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def random_pair(seed: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of pi_off and rho - 1, whose expectation is 0 and largest magnitude given."""
    random = np.random.default_rng(seed)
    behavior = random.dirichlet(np.full(random.integers(2, 30), 0.7))
    excess = random.uniform(-1.0, 1.0, len(behavior))
    excess -= behavior @ excess
    return behavior, excess * (radius / np.abs(excess).max())


@pytest.mark.parametrize("seed", range(20))
def test_generators_give_the_divergences_of_their_definitions(seed):
    off, excess = random_pair(seed, 0.95)
    policy = off * (1 + excess)
    middle = (off + policy) / 2

    def kl(p: np.ndarray, q: np.ndarray) -> float:
        return float(p @ np.log(p / q))

    expected = {
        "js": (kl(policy, middle) + kl(off, middle)) / 2,
        "kl_policy_behavior": kl(policy, off),
        "kl_behavior_policy": kl(off, policy),
    }
    assert {name: divergence(name, off, excess) for name in DIVERGENCES} == pytest.approx(
        expected, rel=1e-10
    )


def test_second_derivatives_at_one():
    # f'' by central differences; 1/4 for JS, not what the paper's printed generator gives.
    step = 1e-3
    for entry in DIVERGENCES.values():
        left, middle, right = entry.generator(np.array([-step, 0.0, step]))
        assert middle == 0.0
        second_derivative = (left - 2 * middle + right) / step**2
        assert second_derivative == pytest.approx(2 * entry.coefficient, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "series"),
    [
        ("js", (1 / 8, -1 / 16, 7 / 192)),
        ("kl_policy_behavior", (1 / 2, -1 / 6, 1 / 12)),
        ("kl_behavior_policy", (1 / 2, -1 / 3, 1 / 4)),
    ],
)
def test_moments_give_the_divergence_to_fourth_order(name, series):
    off, excess = random_pair(5, 0.02)
    expected = sum(
        coefficient * (off @ excess**power)
        for coefficient, power in zip(series, (2, 3, 4), strict=True)
    )
    assert divergence(name, off, excess) == pytest.approx(expected, rel=1e-5)
    without_fourth = expected - series[2] * (off @ excess**4)
    assert divergence(name, off, excess) != pytest.approx(without_fourth, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), radius=st.floats(1e-3, 0.99))
def test_any_two_policies_are_within_the_bounds(seed, radius):
    off, excess = random_pair(seed, radius)
    for name, entry in DIVERGENCES.items():
        quotient = divergence(name, off, excess) / (entry.coefficient * second_moment(off, excess))
        low, high = quotient_bounds(name, radius)
        assert low - 1e-9 <= quotient <= high + 1e-9


def test_the_bounds_at_a_ratio_of_one_fifth():
    assert quotient_bounds("js", 0.2) == pytest.approx((0.910, 1.113), abs=5e-4)
    with pytest.raises(ValueError, match=r"radius = 1.5: valid is above 0 and at most 1"):
        quotient_bounds("js", 1.5)


def test_the_quotient_falls_over_the_whole_range():
    x = np.concatenate([np.linspace(-0.999, -1e-3, 500), [0.0], np.linspace(1e-3, 1, 500)])
    for name in DIVERGENCES:
        assert (np.diff(approximation_quotient(name, x)) < 0).all()


@pytest.mark.parametrize(
    ("name", "one_percent", "ten_percent"),
    [
        ("js", 0.020, 0.179),
        ("kl_policy_behavior", 0.030, 0.260),
        ("kl_behavior_policy", 0.015, 0.135),
    ],
)
def test_how_far_the_ratio_may_be_off(name, one_percent, ten_percent):
    assert largest_deviation(name, 0.01) == pytest.approx(one_percent, abs=5e-4)
    assert largest_deviation(name, 0.1) == pytest.approx(ten_percent, abs=5e-4)
    with pytest.raises(ValueError, match="relative_error"):
        largest_deviation(name, 0.0)


def test_an_action_that_the_policy_gave_up():
    zero_ratio = np.array([-1.0])
    assert DIVERGENCES["js"].generator(zero_ratio).item() == pytest.approx(np.log(2) / 2)
    assert DIVERGENCES["kl_policy_behavior"].generator(zero_ratio).item() == 1.0
    assert np.isinf(DIVERGENCES["kl_behavior_policy"].generator(zero_ratio)).all()


def test_the_tool_writes_data_and_picture(tmp_path):
    command = [sys.executable, "tools/verify_lemma.py", "--output", str(tmp_path), "--pairs", "20"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "OUTSIDE" not in result.stdout
    with (tmp_path / "lemma_ratio.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    at_two = min(rows, key=lambda row: abs(float(row["ratio"]) - 2.0))
    assert float(at_two["ratio"]) == pytest.approx(2.0, abs=0.01)
    assert float(at_two["kl_policy_behavior"]) == pytest.approx(2 * np.log(2) - 1, abs=0.01)
    assert float(at_two["square_over_8"]) == pytest.approx(1 / 8, abs=0.01)
    with (tmp_path / "lemma_errors.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert (tmp_path / "lemma.png").read_bytes().startswith(b"\x89PNG")
