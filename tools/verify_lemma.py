"""Check Lemma 3.1 of arXiv 2601.03320 in numbers, and draw its Figure 2(b, c).

python tools/verify_lemma.py --output /tmp/lemma

Writes lemma_ratio.csv (the divergences over the ratio), lemma_bounds.csv (random pairs of
policies against the rigorous bounds), lemma_errors.csv (how far the ratio may be off for an error
of 1% and 10%) and lemma.png. Exits with 1 if a pair lies outside its bounds.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before installation, too

from r2vpo_megatron.rl.divergences import (
    DIVERGENCES,
    Array,
    divergence,
    largest_deviation,
    quotient_bounds,
    second_moment,
)

RADII = (0.05, 0.1, 0.2, 0.5, 0.9)
ERRORS = (0.01, 0.1)
# Okabe and Ito's palette, as in report/learning_curve.py.
COLORS = {"js": "#0072B2", "kl_policy_behavior": "#D55E00", "kl_behavior_policy": "#009E73"}


def random_policies(
    random: np.random.Generator, num_actions: int, radius: float
) -> tuple[Array, Array]:
    """[A] probabilities of pi_off and [A] rho - 1, whose largest magnitude is the radius."""
    behavior = random.dirichlet(np.full(num_actions, 0.5))
    excess = random.uniform(-1.0, 1.0, num_actions)
    excess -= behavior @ excess  # so that pi sums to 1
    return behavior, excess * (radius / np.abs(excess).max())


def ratio_rows(ratios: Array) -> list[list[float]]:
    """Rows of the ratio, the three divergences' terms, (rho - 1)^2 / 8 and / 2."""
    columns = [entry.generator(ratios - 1.0) for entry in DIVERGENCES.values()]
    square = np.square(ratios - 1.0)
    return np.column_stack([ratios, *columns, square / 8, square / 2]).tolist()  # type: ignore[no-any-return]


def bound_rows(num_pairs: int, seed: int) -> list[list[Any]]:
    """Rows of divergence, radius, lower bound, smallest, largest, upper bound, whether inside."""
    random = np.random.default_rng(seed)
    rows = []
    for radius in RADII:
        pairs = [
            random_policies(random, int(random.integers(2, 50)), radius) for _ in range(num_pairs)
        ]
        for name, entry in DIVERGENCES.items():
            quotients = [
                divergence(name, *pair) / (entry.coefficient * second_moment(*pair))
                for pair in pairs
            ]
            low, high = quotient_bounds(name, radius)
            rounding = 1e-9
            inside = low - rounding <= min(quotients) and max(quotients) <= high + rounding
            rows.append([name, radius, low, min(quotients), max(quotients), high, inside])
    return rows


def error_rows() -> list[list[Any]]:
    """Rows of divergence, relative error of the approximation, largest |rho - 1|."""
    return [
        [name, error, largest_deviation(name, error)] for name in DIVERGENCES for error in ERRORS
    ]


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def draw(path: Path) -> None:
    """The terms over the ratio: a wide range, and the neighbourhood of 1 where policies live."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    wide, near = figure.subplots(1, 2)
    for axes, ratios in ((wide, np.linspace(0.01, 3.0, 600)), (near, np.linspace(0.8, 1.2, 401))):
        square = np.square(ratios - 1.0)
        for name, entry in DIVERGENCES.items():
            axes.plot(ratios, entry.generator(ratios - 1.0), color=COLORS[name], label=entry.symbol)
        axes.plot(ratios, square / 8, color="black", linestyle=":", label=r"$(\rho-1)^2/8$")
        axes.plot(ratios, square / 2, color="black", linestyle="--", label=r"$(\rho-1)^2/2$")
        axes.set_xlabel(r"ratio $\rho$")
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    wide.set_ylim(top=2.0)
    wide.set_ylabel("contribution of an action (nats)")
    wide.legend(frameon=False)
    canvas.print_png(str(path))


def main() -> int:
    """Parse the command line, write the files, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--pairs", type=int, default=1000, help="random pairs of policies a radius")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.pairs < 1:
        parser.error(f"--pairs {arguments.pairs}: at least 1")
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    names = list(DIVERGENCES)
    header = ["ratio", *names, "square_over_8", "square_over_2"]
    write_csv(output / "lemma_ratio.csv", header, ratio_rows(np.linspace(0.01, 3.0, 300)))
    bounds = bound_rows(arguments.pairs, arguments.seed)
    header = ["divergence", "radius", "lower", "smallest", "largest", "upper", "inside"]
    write_csv(output / "lemma_bounds.csv", header, bounds)
    errors = error_rows()
    write_csv(output / "lemma_errors.csv", ["divergence", "relative_error", "deviation"], errors)
    draw(output / "lemma.png")

    print("divergence / (coefficient x second moment), random pairs within rigorous bounds:")
    for name, radius, low, smallest, largest, high, inside in bounds:
        verdict = "inside" if inside else "OUTSIDE"
        print(
            f"  {name:19} |rho-1| <= {radius:4}: {smallest:.4f} to {largest:.4f} in "
            f"[{low:.4f}, {high:.4f}] {verdict}"
        )
    print("largest |rho - 1| for a relative error of the approximation:")
    for name, error, deviation in errors:
        print(f"  {name:19} {error:4.0%}: {deviation:.3f}")
    return 0 if all(row[-1] for row in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
