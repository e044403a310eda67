"""Every recipe is valid and fits its model, and what should be alike among them is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r2vpo_megatron.cli.explain import derive_counts
from r2vpo_megatron.cli.recipe import load_recipe
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.models.spec import read_model_spec, validate_parallel
from r2vpo_megatron.planning.devices import DEVICES
from r2vpo_megatron.planning.plan import Cluster, make_plan
from r2vpo_megatron.planning.workload import Workload
from r2vpo_megatron.rl.objectives import OBJECTIVES
from recipes import pangu_1b, pangu_7b, qwen_1p5b, smollm2_135m, tiny_cpu
from tests.published_models import PANGU_1B, PANGU_7B, QWEN_1P5B, SMOLLM2_135M

MODELS: dict[Any, dict[str, Any]] = {
    pangu_1b: PANGU_1B,
    pangu_7b: PANGU_7B,
    qwen_1p5b: QWEN_1P5B,
    smollm2_135m: SMOLLM2_135M,
}
OF_PAPER = (pangu_1b, pangu_7b, qwen_1p5b)
BASELINES = ("grpo", "grpo_clip_high", "gppo", "topr")
FOLDER = Path(__file__).parents[2] / "recipes"


def names(module: Any) -> list[str]:
    return [f"{Path(module.__file__).name}:{name}" for name in module.RECIPES]


def load(name: str) -> RunConfig:
    return load_recipe(f"{FOLDER}/{name}")


ALL = [name for module in (*MODELS, tiny_cpu) for name in names(module)]


def test_no_file_is_left_out_of_these_tests() -> None:
    files = {path.name for path in FOLDER.glob("*.py")}
    assert files == {name.partition(":")[0] for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_valid_explained_and_named_after_what_it_does(name: str) -> None:
    config = load(name)
    config.validate()
    counts = derive_counts(config)
    function = name.partition(":")[2]
    assert config.algorithm.objective in OBJECTIVES
    assert function.startswith(config.algorithm.objective + "_o")
    is_on_policy = "_on_policy" in function
    assert (config.replay.capacity_iterations == 1) is is_on_policy
    assert counts["uses of a sample, expected"] == f"{float(config.replay.update_to_data_ratio):g}"
    assert ("_dual" in function) is (config.algorithm.dual_controller != "fixed")
    assert ("_paper_dual" in function) is (config.algorithm.dual_controller == "paper")
    assert ("_async" in function) is (config.pipeline.mode == "asynchronous")
    if is_on_policy:
        assert config.updates_per_iteration == 4


@pytest.mark.parametrize("module", MODELS)
def test_its_layout_fits_its_model(module: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[module]))
    spec = read_model_spec(tmp_path)
    for name in names(module):
        config = load(name)
        parallel = config.parallel
        validate_parallel(spec, parallel)
        assert spec.num_heads % config.rollout.tensor_parallel == 0
        assert config.max_sequence_tokens <= spec.max_positions


@pytest.mark.parametrize("module", OF_PAPER)
@pytest.mark.parametrize(
    ("suffix", "device"), [("", "ascend-910b-64gb"), ("_gpu80", "h100-80gb")], ids=["npu", "gpu"]
)
def test_by_the_plan_it_fits_whole_nodes_of_its_devices(
    module: Any, suffix: str, device: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[module]))
    spec = read_model_spec(tmp_path)
    for name in ("r2vpo_on_policy", "r2vpo_off_policy", "r2vpo_off_policy_async"):
        config = module.RECIPES[f"{name}{suffix}"]()
        num_learning = config.parallel.num_ranks
        num_sampling = config.rollout.num_engines * config.rollout.tensor_parallel
        assert num_learning % 8 == num_sampling % 8 == 0
        cluster = Cluster((num_learning + num_sampling) // 8, 8, DEVICES[device])
        assert make_plan(spec, config, cluster, Workload.of(config)).problems == []


@pytest.mark.parametrize("module", OF_PAPER)
def test_settings_of_the_paper(module: Any) -> None:
    """128 x 8, rate 1e-6, 16,384 tokens, lambda 0.04 and eta 1e-3, FIFO of 4, UTD 2."""
    for name in names(module):
        config = load(name)
        assert config.train.prompts_per_iteration == 128
        assert config.train.responses_per_prompt == 8
        assert config.optimizer.lr == 1e-6
        assert config.rollout.max_response_tokens == 16384
        assert config.algorithm.ratio_penalty == 0.04
        assert config.algorithm.dual_step_size == 1e-3
        assert config.rollout.temperature == 1.0
        assert config.data.reward == "math_dapo"
        if "off_policy" in name:
            assert (config.replay.capacity_iterations, config.replay.update_to_data) == (4, 2.0)


@pytest.mark.parametrize("module", [*MODELS, tiny_cpu])
@pytest.mark.parametrize("regime", ["on_policy", "off_policy"])
def test_a_comparison_differs_by_its_objective_alone(module: Any, regime: str) -> None:
    recipes: dict[str, Callable[[], RunConfig]] = module.RECIPES
    base = recipes[f"r2vpo_{regime}"]()
    for objective in BASELINES:
        config = recipes[f"{objective}_{regime}"]()
        assert config.algorithm.objective == objective
        assert replace(config, algorithm=replace(config.algorithm, objective="r2vpo")) == base


@pytest.mark.parametrize("module", [*MODELS, tiny_cpu])
def test_side_by_side_differs_by_the_pipeline_and_its_denominator_alone(module: Any) -> None:
    base, config = module.r2vpo_off_policy(), module.RECIPES["r2vpo_off_policy_async"]()
    assert (config.pipeline.mode, config.iterations_ahead) == ("asynchronous", 1)
    algorithm = replace(config.algorithm, behavior_logprobs=base.algorithm.behavior_logprobs)
    assert replace(config, pipeline=base.pipeline, algorithm=algorithm) == base


@pytest.mark.parametrize("module", OF_PAPER)
def test_gpus_have_another_layout_and_nothing_else(module: Any) -> None:
    for name, recipe in module.RECIPES.items():
        if name.endswith("_gpu80"):
            npu, gpu = module.RECIPES[name.removesuffix("_gpu80")](), recipe()
            assert gpu.parallel != npu.parallel
            assert gpu.parallel.num_ranks == npu.parallel.num_ranks
            assert replace(gpu, parallel=npu.parallel) == npu


def test_the_self_test_is_small_and_valid() -> None:
    config = tiny_cpu.self_test()
    config.validate()
    assert config.train.num_iterations == 2
    assert config.samples_per_iteration == 64
