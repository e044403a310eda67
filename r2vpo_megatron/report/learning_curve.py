"""The learning curve of one run as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2vpo_megatron.observability import metric_names, read_metrics

# Okabe and Ito's palette: told apart with every common colour vision deficiency.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"

# Above the axes, where it covers no line.
_LEGEND_ABOVE: dict[str, Any] = {
    "frameon": False,
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 0.99),
    "ncols": 3,
}


def plot_learning_curve(metrics_path: Path, output_png: Path, title: str = "") -> Path:
    """Draw reward and held-out accuracy, ratio second moment and lambda, and response length.

    Args:
        metrics_path: `metrics.jsonl` of a run.
        output_png: Figure to write; its folder must exist.
        title: Heading of the figure.

    Returns:
        `output_png`.

    Raises:
        ValueError: the file holds no iteration.
        ModuleNotFoundError: matplotlib is not installed.
    """
    # An extra, so imported where it is used. Figure without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    if not records:
        raise ValueError(f"{metrics_path} holds no iteration yet: nothing to draw")
    figure = Figure(figsize=(7.5, 9.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    score_axes, ratio_axes, length_axes = figure.subplots(3, 1, sharex=True)
    if title:
        figure.suptitle(title, fontsize=12)
    _draw_scores(score_axes, records)
    _draw_ratio(ratio_axes, records)
    _draw_length(length_axes, records)
    for axes in (score_axes, ratio_axes, length_axes):
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["top"].set_visible(False)
    length_axes.set_xlabel("iteration")
    length_axes.xaxis.get_major_locator().set_params(integer=True)
    canvas.print_png(str(output_png))
    return output_png


def _series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Iterations and values of a metric, where it was recorded."""
    points = [(r["iteration"], float(r[name])) for r in records if r.get(name) is not None]
    return [iteration for iteration, _ in points], [value for _, value in points]


def _draw_scores(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    axes.plot(*_series(records, metric_names.REWARD_MEAN), color=BLUE, label="training reward")
    axes.plot(
        *_series(records, metric_names.EVALUATION_ACCURACY),
        color=VERMILLION,
        marker="o",
        markersize=4,
        label="held-out accuracy",
    )
    axes.set_ylabel("reward, accuracy")
    axes.legend(**_LEGEND_ABOVE)


def _draw_ratio(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    lines = axes.plot(
        *_series(records, metric_names.RATIO_SECOND_MOMENT),
        color=GREEN,
        label=r"ratio second moment $E[(\rho-1)^2]$",
    )
    iterations, targets = _series(records, metric_names.RATIO_TARGET)
    if targets:
        lines += axes.plot(
            iterations, targets, color="0.45", linestyle=":", label=r"target $\delta$"
        )
    _use_log_scale(axes)
    axes.set_ylabel("ratio second moment")

    penalty_axes = axes.twinx()
    lines += penalty_axes.plot(
        *_series(records, metric_names.RATIO_PENALTY),
        color=PURPLE,
        linestyle="--",
        label=r"penalty $\lambda$ (right)",
    )
    _use_log_scale(penalty_axes)
    penalty_axes.set_ylabel(r"penalty $\lambda$")
    penalty_axes.spines["top"].set_visible(False)
    axes.legend(lines, [line.get_label() for line in lines], **_LEGEND_ABOVE)


def _use_log_scale(axes: Any) -> None:
    # A run's first record, or a lambda of 0, has nothing that a logarithm could show.
    if any(value > 0 for line in axes.get_lines() for value in line.get_ydata()):
        axes.set_yscale("log", nonpositive="mask")


def _draw_length(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    axes.plot(*_series(records, metric_names.RESPONSE_TOKENS_MEAN), color=BLUE)
    axes.set_ylabel("response length (tokens)")
    axes.set_ylim(bottom=0)
