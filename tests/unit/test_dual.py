"""The dual variable: its controllers by hand, on simulated plants, and across a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from r2vpo_megatron.config import AlgorithmConfig
from r2vpo_megatron.observability import MetricsWriter
from r2vpo_megatron.rl.dual import DualSettings, DualVariable, fixed, multiplicative, paper
from tools.dual_plant import Plant, run_plant

TARGET = 0.04


def settings(step_size=math.nan, gain=math.nan):
    """Each controller must read its own number: the other's is not one."""
    return DualSettings(target=TARGET, step_size=step_size, gain=gain, minimum=1e-3, maximum=1e3)


def test_steps_by_hand():
    assert fixed(0.04, 9.0, settings()) == 0.04
    assert paper(0.04, 0.05, settings(step_size=1e-3)) == pytest.approx(0.04001)
    assert paper(1e-6, 0.0, settings(step_size=1e-3)) == 0.0
    gain = settings(gain=0.2)
    assert multiplicative(0.5, 0.05, gain) == pytest.approx(0.5 * math.exp(0.05))
    assert multiplicative(0.5, 0.03, gain) == pytest.approx(0.5 * math.exp(-0.05))
    # The largest step, alike in both directions.
    assert multiplicative(0.5, 4.0, gain) == pytest.approx(0.5 * math.exp(0.1))
    assert multiplicative(0.5, 0.0, gain) == pytest.approx(0.5 * math.exp(-0.1))
    assert multiplicative(0.5, 0.04, gain) == 0.5
    assert multiplicative(950.0, 40.0, gain) == 1e3
    assert multiplicative(0.0, 0.0, gain) == 1e-3


def multiplicative_at_its_defaults() -> DualVariable:
    defaults = AlgorithmConfig()
    chosen = DualSettings(
        target=TARGET,
        step_size=defaults.dual_step_size,
        gain=defaults.dual_gain,
        minimum=defaults.ratio_penalty_min,
        maximum=defaults.ratio_penalty_max,
    )
    return DualVariable("multiplicative", defaults.ratio_penalty, chosen)


# Free of any penalty the second moment would be 3 or 8 times its target; lambda that halves it;
# updates until it follows; how old lambda is when it acts; noise of one update; growth over time.
PLANTS = [
    Plant(TARGET * free, half, lag, delay, noise, drift)
    for free, half, lag, delay, (noise, drift) in itertools.product(
        (3.0, 8.0), (0.05, 0.5), (1.0, 4.0), (0, 4), ((0.1, 0.0), (0.3, 0.003))
    )
]


@pytest.mark.parametrize("plant", PLANTS, ids=str)
def test_multiplicative_control_reaches_its_target_in_50_updates_and_holds_it(plant):
    levels, penalties = run_plant(plant, multiplicative_at_its_defaults(), num_updates=200, seed=0)
    late = levels[50:]
    # The drift asks for a lambda that grows all the time: that costs a lag behind the target.
    assert sum(late) / len(late) == pytest.approx(TARGET, rel=0.1)
    for start in range(50, 200, 25):
        block = levels[start : start + 25]
        assert sum(block) / len(block) == pytest.approx(TARGET, rel=0.25), start
    assert min(penalties) > 1e-3
    assert max(penalties) < 1e3


@pytest.mark.parametrize("plant", [p for p in PLANTS if p.noise < 0.2 and p.delay == 0], ids=str)
def test_without_delay_it_is_within_a_tenth_at_every_quarter(plant):
    levels, _ = run_plant(plant, multiplicative_at_its_defaults(), num_updates=150, seed=1)
    for start in range(50, 150, 25):
        block = levels[start : start + 25]
        assert sum(block) / len(block) == pytest.approx(TARGET, rel=0.1), start


def test_the_papers_rule_hardly_moves_on_the_same_plant():
    plant = Plant(TARGET * 3.0, 0.5, 1.0, 0, 0.1, 0.0)
    dual = DualVariable("paper", 0.04, settings(step_size=1e-3))
    levels, penalties = run_plant(plant, dual, num_updates=200, seed=0)
    assert penalties[-1] - penalties[0] < 0.02  # reaching the target takes 0.96
    assert levels[-1] > 2.5 * TARGET


@pytest.mark.parametrize("controller", ["fixed", "paper", "multiplicative"])
def test_a_restored_variable_continues_identically(controller):
    chosen = settings(step_size=1e-2, gain=0.1)
    noise = random.Random(0)
    moments = [0.08 * noise.random() for _ in range(40)]
    whole = DualVariable(controller, 0.04, chosen)
    for moment in moments:
        whole.step(moment)

    first = DualVariable(controller, 0.04, chosen)
    for moment in moments[:17]:
        first.step(moment)
    saved = json.loads(json.dumps(first.state_dict()))  # plain values, as a checkpoint keeps them
    second = DualVariable(controller, 0.04, chosen)
    second.load_state_dict(saved)
    for moment in moments[17:]:
        second.step(moment)
    assert (second.value, second.num_updates) == (whole.value, 40)
    assert (whole.value == 0.04) == (controller == "fixed")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"value": 0.1}, r"keys \['value'\].*'num_updates' and 'value'"),
        ({"value": 0.1, "num_updates": 1, "mean": 0.0}, "keys .*'mean'"),
        ({"value": math.nan, "num_updates": 1}, "lambda = nan"),
        ({"value": -0.1, "num_updates": 1}, "lambda = -0.1"),
        ({"value": "0.1", "num_updates": 1}, "lambda = '0.1'"),
        ({"value": True, "num_updates": 1}, "lambda = True"),
        ({"value": 0.1, "num_updates": -1}, "num_updates = -1"),
        ({"value": 0.1, "num_updates": 1.5}, "num_updates = 1.5"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(state, message):
    dual = DualVariable("multiplicative", 0.04, settings(gain=0.1))
    dual.step(0.08)
    before = dual.state_dict()
    with pytest.raises(ValueError, match=message):
        dual.load_state_dict(state)
    assert dual.state_dict() == before


def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/plot_dual.py", *arguments]
    repository = Path(__file__).resolve().parents[2]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_the_tool_draws_a_run(tmp_path):
    config = {
        "algorithm": {"dual_controller": "multiplicative", "dual_target": 0.01},
        "train": {"seed": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    moments = [0.04, 0.03, 0.009, 0.011, 0.013]
    with MetricsWriter(tmp_path, tensorboard=False, key="update") as writer:
        for update, moment in enumerate(moments, start=1):
            writer.write(update, {"ratio/second_moment": moment, "ratio/penalty": 0.1 * update})
    picture = tmp_path / "dual.png"
    result = plot("--run", str(tmp_path), "--output", str(picture), "--start", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("multiplicative, target 0.01, seed 3: ")
    assert "after update 2: mean 1.100, median 1.100" in result.stdout
    assert "lambda 0.3 to 0.5" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    (tmp_path / "updates.jsonl").write_text('{"update": 1, "ratio/second_moment": 0.1}\n')
    result = plot("--run", str(tmp_path), "--output", str(picture))
    assert result.returncode == 2
    assert "no updates with a lambda" in result.stderr


def test_the_tool_draws_the_plant(tmp_path):
    picture = tmp_path / "plant.png"
    result = plot("--plant", "--output", str(picture))
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [
        "multiplicative",
        "paper",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
