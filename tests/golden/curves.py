"""The golden loss curves: 20 updates of the tiny model with every objective, as they once were.

    python -m tests.golden.curves    writes tests/golden/*.json anew

Do that after a change that is meant to change them, and say in the commit by how much they did.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from r2vpo_megatron.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from r2vpo_megatron.rl.objectives import OBJECTIVES
from r2vpo_megatron.testbed.tiny_model import make_tiny_model
from tests.distributed.ranks import run_ranks

FOLDER = Path(__file__).parent
NUM_UPDATES = 20
# What a changed objective, aggregation, controller, gradient, clipping or optimizer moves.
METRICS = (
    "objective/mean",
    "optimizer/gradient_norm",
    "ratio/second_moment",
    "ratio/penalty",
)
Curve = dict[str, list[float]]

# A lambda that counts beside advantages of about 1.
_R2VPO = AlgorithmConfig(objective="r2vpo", ratio_penalty=0.5)
ALGORITHMS = {
    **{name: replace(_R2VPO, objective=name) for name in OBJECTIVES},
    "r2vpo_paper_dual": replace(
        _R2VPO, dual_controller="paper", dual_target=0.04, dual_step_size=0.1
    ),
    "r2vpo_multiplicative_dual": replace(
        _R2VPO, dual_controller="multiplicative", dual_target=0.04, dual_gain=0.1
    ),
    "grpo_sequence_mean": replace(_R2VPO, objective="grpo", aggregation="sequence_mean"),
}


def make_model(folder: Path) -> Path:
    """The tiny model with random weights."""
    make_tiny_model(folder / "model", "pangu", warm_start=False)
    return folder / "model"


def measure_curve(algorithm: AlgorithmConfig, model_dir: Path) -> Curve:
    """Metric -> its value at each update, on one rank with several micro-batches an update."""
    config = RunConfig(
        model=ModelConfig(path=str(model_dir), dtype="float32"),
        algorithm=algorithm,
        # Weight decay and clipping take part. A large eps, or Adam would blow the rounding errors
        # of small gradients up to whole steps.
        optimizer=OptimizerConfig(lr=5e-5, eps=1e-4, weight_decay=0.1, max_gradient_norm=5.0),
        parallel=ParallelConfig(max_tokens_per_micro_batch=128),
    )
    (updates,) = run_ranks(1, _updates, config, model_dir)
    return {name: [metrics[name] for metrics in updates] for name in METRICS}


def _updates(
    rank: int, world_size: int, init_method: str, config: RunConfig, model_dir: Path
) -> list[dict[str, float]]:
    from r2vpo_megatron.orchestration.fixed_updates import start_fixed_run
    from r2vpo_megatron.parallel.state import destroy_parallel

    curve = list(start_fixed_run(rank, init_method, config, model_dir).updates(NUM_UPDATES))
    destroy_parallel()
    return curve


def path_of(name: str) -> Path:
    """The file of a curve."""
    return FOLDER / f"{name}.json"


def main() -> None:
    """Write every curve's file, and remove those of curves that are no more."""
    for path in FOLDER.glob("*.json"):
        path.unlink()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = make_model(Path(folder))
        for name, algorithm in ALGORITHMS.items():
            curve = measure_curve(algorithm, model_dir)
            path_of(name).write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
            print(f"{path_of(name)}: {', '.join(f'{x:.6g}' for x in curve[METRICS[0]][-3:])}")


if __name__ == "__main__":
    main()
