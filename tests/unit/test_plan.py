"""What the plan counts, by hand; the search; the command."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from r2vpo_megatron.cli.plan import main
from r2vpo_megatron.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PipelineConfig,
    RolloutConfig,
    RunConfig,
)
from r2vpo_megatron.models.spec import ModelSpec, padded_vocab_size
from r2vpo_megatron.planning.activations import LayerActivations
from r2vpo_megatron.planning.devices import find_device, parse_bytes
from r2vpo_megatron.planning.engine_memory import engine_memory
from r2vpo_megatron.planning.known_models import KNOWN_MODELS
from r2vpo_megatron.planning.learner_memory import learner_memory
from r2vpo_megatron.planning.learner_time import LearnerTimes, learner_times
from r2vpo_megatron.planning.pack_load import PackLoad
from r2vpo_megatron.planning.parameters import stage_parameters, total_parameters
from r2vpo_megatron.planning.plan import Cluster, make_plan
from r2vpo_megatron.planning.report import options
from r2vpo_megatron.planning.rollout_time import EngineRates, rollout_times
from r2vpo_megatron.planning.schedule import idle_share, peak_in_flight
from r2vpo_megatron.planning.search import search
from r2vpo_megatron.planning.workload import Workload

PANGU_7B = KNOWN_MODELS["openpangu-embedded-7b"]
PANGU_1B = KNOWN_MODELS["openpangu-embedded-1b"]
NPU = find_device("ascend-910b-64gb")


def run_config(**parallel: object) -> RunConfig:
    """bf16, responses of up to 4,096 tokens; engines that leave room for a learner."""
    return RunConfig(
        model=ModelConfig(path="unused"),
        rollout=RolloutConfig(num_engines=8, max_prompt_tokens=1024, max_response_tokens=4096),
        parallel=ParallelConfig(**{"max_tokens_per_micro_batch": 8192, **parallel}),
    )


def test_known_models_have_their_checkpoints_numbers_of_parameters() -> None:
    numbers = {name: spec.num_parameters for name, spec in KNOWN_MODELS.items()}
    assert numbers == {
        "openpangu-embedded-7b": 8_030_887_936,
        "openpangu-embedded-1b": 1_155_912_192,
        "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    }


@pytest.mark.parametrize("spec", [PANGU_7B, PANGU_1B], ids=["untied", "tied"])
def test_a_single_rank_holds_the_checkpoint_and_its_padding(spec: ModelSpec) -> None:
    (chunks,) = stage_parameters(spec, ParallelConfig())
    copies = 1 if spec.tied_embeddings else 2
    padding = (padded_vocab_size(spec.vocab_size, 1) - spec.vocab_size) * spec.hidden_size
    assert total_parameters(chunks) == spec.num_parameters + copies * padding


def test_a_tied_head_on_a_stage_of_its_own_is_a_copy() -> None:
    stages = stage_parameters(PANGU_1B, ParallelConfig(pipeline=2))
    embedding = padded_vocab_size(PANGU_1B.vocab_size, 1) * PANGU_1B.hidden_size
    (alone,) = stage_parameters(PANGU_1B, ParallelConfig())
    both = total_parameters(stages[0]) + total_parameters(stages[1])
    assert both == total_parameters(alone) + embedding


def test_state_of_bf16_parameters() -> None:
    config = run_config(tensor=4, data=4)
    (rank,) = learner_memory(PANGU_7B, config, NPU, num_micro_batches=4)
    assert rank.weights == pytest.approx(2 * rank.num_parameters, rel=1e-3)
    assert rank.gradients == pytest.approx(4 * rank.num_parameters, rel=1e-3)
    # Two moments and the fp32 parameter, shared by four ranks.
    assert rank.optimizer == pytest.approx(12 * rank.num_parameters / 4, rel=1e-3)
    whole = replace(config, optimizer=OptimizerConfig(distributed=False))
    (rank,) = learner_memory(PANGU_7B, whole, NPU, num_micro_batches=4)
    assert rank.optimizer == 12 * rank.num_parameters


def test_what_a_layer_keeps_by_hand() -> None:
    load, parallel = PackLoad(100, 80, 100), ParallelConfig(tensor=2)
    layer = LayerActivations.of(PANGU_7B, parallel, load, 2, is_cpu=False)
    assert layer.stream == 100 * 4096 * 2
    norms = 100 * (4 * 4096 * 2 + 2 * 4)  # two inputs, two outputs, a number a token of each
    query, kv = 16 * 128, 4 * 128
    attention = 100 * 2 * ((query + 2 * kv) + (query + kv) + query) + 100 * 16 * 4
    mlp = 100 * 2 * 3 * 6400
    assert layer.kept("none") == norms + attention + mlp
    assert layer.kept("mlp") == norms + attention
    assert layer.kept("full") == layer.stream
    # qkv, the query cut out of it, the output.
    assert layer.kept("core_attn") == norms + mlp + 100 * 2 * (3 * query + 2 * kv)
    split = replace(parallel, sequence_parallel=True)
    halved = LayerActivations.of(PANGU_7B, split, load, 2, is_cpu=False)
    assert halved.kept("none") == norms // 2 + attention + mlp


def test_one_forward_one_backward_holds_as_many_as_stages_follow() -> None:
    def held(stage: int, pipeline: int, count: int) -> int:
        ((_, size, number),) = peak_in_flight([10], stage, pipeline, count)
        assert size == 10 * number
        return number

    assert [held(stage, 4, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [held(stage, 4, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert held(0, 1, 7) == 1


def test_interleaved_stages_hold_more_of_smaller_chunks() -> None:
    # Two stages of two chunks: warm-up of 2 (2 - 0 - 1) + (2 - 1) 2 = 4 and 2, and one more.
    by_stage = [peak_in_flight([1, 1], stage, 2, 8) for stage in range(2)]
    assert [max(size for _, size, _ in states) for states in by_stage] == [5, 3]
    # The second stage goes F0 F0, then F1 B1 F1 B1 F0 B0 F0 B0 ...: three of the lower chunk.
    assert max(size for _, size, _ in peak_in_flight([100, 1], 1, 2, 8)) == 3 * 100
    assert idle_share(4, 1, 12) == 0.25 and idle_share(4, 2, 12) == 0.125


@pytest.mark.parametrize("mean", [400, 2048, 3500])
def test_lengths_have_the_mean_that_was_asked_for(mean: float) -> None:
    workload = Workload.of(run_config(), response_tokens=mean)
    lengths = workload.response_lengths(4000)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=2e-3)
    assert lengths == sorted(lengths, reverse=True) and max(lengths) <= 4096


def test_mean_lengths_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--mean-response-tokens = 5000.*at most .* 4096"):
        Workload.of(run_config(), response_tokens=5000)


def test_decoding_one_response_takes_its_steps() -> None:
    rates = EngineRates.of(PANGU_7B, run_config(), NPU)
    config = replace(run_config(), rollout=RolloutConfig(max_num_seqs=1))
    workload = Workload(1, 1, 100.0, 1000.0, 1000, 1.0, 1)
    length = workload.response_lengths(1)[0]
    times = rollout_times(PANGU_7B, config, NPU, workload, engine_memory(PANGU_7B, config, NPU))
    assert times.decode == pytest.approx(length * rates.step(1, 100 + length / 2))


def test_twice_the_responses_than_fit_take_twice_as_long() -> None:
    def seconds(num_responses: int) -> float:
        config = replace(run_config(), rollout=RolloutConfig(max_num_seqs=32))
        memory = engine_memory(PANGU_7B, config, NPU)
        workload = Workload(1, num_responses, 100.0, 1000.0, 1000, 1.0, 1)
        return rollout_times(PANGU_7B, config, NPU, workload, memory).decode

    assert seconds(64) == pytest.approx(2 * seconds(32), rel=0.02)


def test_side_by_side_the_longest_response_has_the_iterations_that_run_ahead() -> None:
    def steady(max_staleness: int, num_engines: int) -> float:
        config = replace(
            run_config(),
            rollout=replace(run_config().rollout, num_engines=num_engines),
            pipeline=PipelineConfig(mode="asynchronous", max_staleness=max_staleness),
        )
        memory = engine_memory(PANGU_7B, config, NPU)
        return rollout_times(PANGU_7B, config, NPU, Workload.of(config), memory).steady

    # One response an engine: its own steps, in the time of two or of four iterations.
    assert steady(1, 1024) / steady(3, 1024) == pytest.approx(2.0, rel=0.15)
    # Engines that are full take as long as their tokens.
    assert steady(1, 2) == pytest.approx(steady(3, 2), rel=0.01)


def test_work_of_the_learner_shrinks_with_ranks_and_grows_with_recomputation() -> None:
    workload = Workload.of(run_config())

    def times(**parallel: object) -> LearnerTimes:
        return learner_times(PANGU_7B, run_config(**parallel), NPU, workload, 8)

    one, two = times(), times(data=2)
    assert two.forward == pytest.approx(one.forward / 2, rel=0.05)
    assert one.reduction == 0.0 < two.reduction
    full = times(recompute="full")
    assert full.recompute == pytest.approx(0.9 * full.forward, rel=0.12)  # all but the LM head
    assert 0.0 == times(recompute="none").recompute < times(recompute="core_attn").recompute
    # Six operations a parameter and token, and no more than attention and memory on top.
    tokens = workload.updates * workload.samples_per_update * workload.sequence_tokens
    least = 6 * PANGU_7B.num_parameters * tokens / NPU.matmul_rate
    assert least * 0.9 < one.forward + one.backward < 1.6 * least


def test_side_by_side_the_slower_sets_the_pace() -> None:
    cluster = Cluster(2, 8, NPU)
    in_turn = make_plan(PANGU_7B, run_config(tensor=8), cluster, Workload.of(run_config()))
    assert in_turn.iteration_seconds == pytest.approx(
        in_turn.rollout_seconds + in_turn.learner_seconds + in_turn.push_seconds
    )
    config = run_config(tensor=8)
    config = replace(
        config,
        algorithm=replace(config.algorithm, behavior_logprobs="rollout"),
        pipeline=PipelineConfig(mode="asynchronous"),
    )
    plan = make_plan(PANGU_7B, config, cluster, Workload.of(config))
    slower = max(plan.rollout_seconds, plan.learner_seconds)
    assert plan.iteration_seconds == pytest.approx(slower + plan.push_seconds)
    assert plan.learner_times.logprobs == 0.0


def test_the_search_keeps_to_the_cluster_and_its_memory() -> None:
    config = run_config()
    workload = Workload.of(config)
    found = search(PANGU_7B, config, Cluster(4, 8, NPU), workload)
    assert found.ranked
    for plan in found.ranked:
        assert plan.problems == []
        assert plan.learner_devices + plan.rollout_devices <= 32
        assert all(rank.device_bytes <= 0.95 * NPU.memory_bytes for rank in plan.learner)
        assert plan.config.parallel.max_tokens_per_micro_batch >= config.max_sequence_tokens
    seconds = [plan.iteration_seconds for plan in found.ranked]
    assert seconds == sorted(seconds)
    smaller = Cluster(4, 8, replace(NPU, memory_bytes=40 * 10**9))
    assert search(PANGU_7B, config, smaller, workload).ranked[0].iteration_seconds >= seconds[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [("64GB", 64 * 10**9), ("80 GiB", 80 * 2**30), ("512mb", 512 * 10**6), ("1.5TB", 15 * 10**11)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--device-memory") == size


@pytest.mark.parametrize("text", ["64", "GB", "-1GB", "0GB", "64XB", ""])
def test_sizes_that_do_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="--device-memory"):
        parse_bytes(text, "--device-memory")


RECIPE = """
from r2vpo_megatron.config import DataConfig, ModelConfig, ParallelConfig, RolloutConfig, RunConfig


def seven() -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="/nowhere"),
        data=DataConfig(train_prompts="unused"),
        rollout=RolloutConfig(num_engines=8, max_prompt_tokens=1024, max_response_tokens=4096),
        parallel=ParallelConfig(
            tensor=8, sequence_parallel=True, recompute="full", max_tokens_per_micro_batch=8192
        ),
    )
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return f"{path}:seven"


SHAPE = ("--model-shape", "openpangu-embedded-7b")


def test_the_command_prints_a_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([recipe, "--nodes", "2", "--device-memory=64GB", *SHAPE]) == 0
    text = capsys.readouterr().out
    assert "8,030,887,936 parameters" in text and "it fits" in text
    assert "TP 8 PP 1 CP 1 DP 1, recompute full, 8,192 tokens; 8 engines of TP 1" in text
    assert "--rollout.num-engines" in text


def test_nothing_that_fits_ends_with_1_and_the_nearest_miss(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe, "--nodes", "2", "--device-memory", "16GB", *SHAPE]) == 1
    text = capsys.readouterr().out
    assert "nothing fits" in text and "the nearest miss" in text and "an engine lacks" in text
    own_alone = [recipe, "--nodes", "1", "--top", "0", *SHAPE]
    assert main(own_alone) == 1
    assert "needs 16 devices (8 learner + 8 rollout), 8 are there" in capsys.readouterr().out


def test_a_recipe_that_does_not_fit_beside_layouts_that_do(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--parallel.tensor", "3", "--parallel.max-tokens-per-micro-batch", "8193"]
    assert main([recipe, "--nodes", "4", *SHAPE, *wrong]) == 0
    text = capsys.readouterr().out
    assert "NOT VALID: tensor parallel size 3" in text and "layouts that fit" in text


def test_the_options_of_a_found_layout_make_it_the_recipes_own(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config()
    found = search(PANGU_7B, config, Cluster(4, 8, NPU), Workload.of(config))
    best = found.ranked[0]
    base = [recipe, "--nodes", "4", "--top", "0", *SHAPE]
    plain = ["--parallel.sequence-parallel", "false", "--parallel.recompute", "none"]
    assert main([*base, "--parallel.tensor", "1", *plain, *options(best)]) == 0
    text = capsys.readouterr().out
    printed = float(text.split("iteration  ")[1].split()[0])
    assert math.isclose(printed, best.iteration_seconds, abs_tol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--nodes = 0 is not valid"),
        (["--nodes", "x"], "--nodes x: not valid, must be a number"),
        (["--nodes", "1", "--device", "tpu"], "--device = 'tpu'.*ascend-910b-64gb"),
        (["--nodes", "1", "--device-memory", "64"], "--device-memory = '64'.*GB"),
        (["--nodes", "1", "--model-shape", "gpt"], "--model-shape = 'gpt'.*openpangu"),
        (["--nodes", "1"], "model folder /nowhere.*--model-shape"),
        (["--nodes", "1", "--matmul-efficiency", "2"], "--matmul-efficiency = 2.0"),
        (["--nodes", "1", "--parallel.tensr", "2"], "did you mean --parallel.tensor"),
    ],
)
def test_bad_input_names_field_value_and_what_is_valid(
    recipe: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe, *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
