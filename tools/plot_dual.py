"""Draw how lambda brings the ratio's second moment to its target, over optimizer steps.

python tools/plot_dual.py --run outputs/NAME --output docs/images/dual_testbed.png
python tools/plot_dual.py --plant --output docs/images/dual_plant.png

With --run from updates.jsonl and config.json of runs with a dual controller; with --plant from the
simulated plant of the tests, the multiplicative controller and the paper's rule on the same one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.config import AlgorithmConfig
from r2vpo_megatron.observability import metric_names, read_metrics
from r2vpo_megatron.rl.dual import DualSettings, DualVariable
from tools.dual_plant import Plant, run_plant

# Okabe and Ito's palette, as in report/learning_curve.py.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
NUM_PLANT_UPDATES = 200
# Free of a penalty the second moment would be five times its target.
PLANT = Plant(free=0.2, half=0.2, lag=4.0, delay=4, noise=0.3, drift=0.0)


@dataclass(frozen=True)
class Curve:
    """One controller's course: m2 / delta and lambda at each update."""

    label: str
    relative: Sequence[float]
    penalties: Sequence[float]


def curve_of_run(run_dir: Path) -> Curve:
    """The course of a run.

    Raises:
        ValueError: the run has no updates, or no lambda that follows a target.
    """
    config = json.loads((run_dir / "config.json").read_text())["config"]
    algorithm = config["algorithm"]
    records = read_metrics(run_dir / "updates.jsonl", key="update")
    if algorithm["dual_controller"] == "fixed":
        raise ValueError(f"{run_dir}: algorithm.dual_controller is fixed, nothing follows a target")
    if not records or metric_names.RATIO_PENALTY not in records[0]:
        raise ValueError(f"{run_dir}: no updates with a lambda in updates.jsonl")
    target = algorithm["dual_target"]
    return Curve(
        label=f"{algorithm['dual_controller']}, target {target:g}, seed {config['train']['seed']}",
        relative=[record[metric_names.RATIO_SECOND_MOMENT] / target for record in records],
        penalties=[record[metric_names.RATIO_PENALTY] for record in records],
    )


def curves_of_plant() -> list[Curve]:
    """The multiplicative controller at its defaults and the paper's rule on one plant."""
    defaults = AlgorithmConfig()
    settings = DualSettings(
        target=defaults.dual_target,
        step_size=defaults.dual_step_size,
        gain=defaults.dual_gain,
        minimum=defaults.ratio_penalty_min,
        maximum=defaults.ratio_penalty_max,
    )
    curves = []
    for controller in ("multiplicative", "paper"):
        dual = DualVariable(controller, defaults.ratio_penalty, settings)
        levels, penalties = run_plant(PLANT, dual, NUM_PLANT_UPDATES, seed=0)
        relative = [level / settings.target for level in levels]
        curves.append(Curve(controller, relative, penalties))
    return curves


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()  # type: ignore[no-any-return]


def draw(curves: Sequence[Curve], window: int, output: Path) -> None:
    """Two panels over the updates: m2 / delta with its moving mean, and lambda."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    moment_axes, penalty_axes = figure.subplots(2, 1, sharex=True)
    moment_axes.axhspan(0.9, 1.1, color="0.85", label="within 10% of the target")
    for curve, color in zip(curves, COLORS, strict=False):
        updates = range(1, len(curve.relative) + 1)
        moment_axes.plot(updates, curve.relative, ".", markersize=3, alpha=0.5, color=color)
        mean = moving_mean(curve.relative, window)
        label = f"{curve.label}, mean of {window} updates"
        moment_axes.plot(updates, mean, color=color, label=label)
        penalty_axes.plot(updates, curve.penalties, color=color, label=curve.label)
    for axes in (moment_axes, penalty_axes):
        axes.set_yscale("log", nonpositive="mask")
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    moment_axes.set_ylabel(r"second moment / $\delta$")
    penalty_axes.set_ylabel(r"$\lambda$")
    penalty_axes.set_xlabel("optimizer step")
    moment_axes.legend(frameon=False)
    canvas.print_png(str(output))


def describe(curve: Curve, start: int) -> str:
    """Mean and spread of m2 / delta from an update on."""
    late = np.asarray(curve.relative[start:])
    if not late.size:
        return f"{curve.label}: {len(curve.relative)} updates, none after {start}"
    return (
        f"{curve.label}: m2 / delta after update {start}: mean {late.mean():.3f}, median "
        f"{np.median(late):.3f}, standard deviation {late.std():.3f}; lambda "
        f"{min(curve.penalties[start:]):.3g} to {max(curve.penalties[start:]):.3g}"
    )


def main() -> int:
    """Parse the command line, draw, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, nargs="+", help="folders of up to four runs")
    source.add_argument("--plant", action="store_true", help="simulate instead")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--window", type=int, default=16, help="updates of the moving mean")
    parser.add_argument("--start", type=int, default=50, help="update from which figures count")
    arguments = parser.parse_args()
    if arguments.run and len(arguments.run) > len(COLORS):
        parser.error(f"--run: {len(arguments.run)} folders; valid: up to {len(COLORS)}")
    try:
        curves = (
            curves_of_plant() if arguments.plant else [curve_of_run(run) for run in arguments.run]
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    draw(curves, arguments.window, arguments.output)
    for curve in curves:
        print(describe(curve, arguments.start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
