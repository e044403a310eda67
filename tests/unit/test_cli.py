from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest

from r2vpo_megatron.cli import explain, train
from r2vpo_megatron.cli.overrides import apply_overrides, list_config_fields
from r2vpo_megatron.cli.recipe import load_recipe
from r2vpo_megatron.config import RunConfig
from recipes.tiny_cpu import r2vpo_off_policy
from tests.command_lines import RECIPE, Outcome, in_checkout, install_training, run

__all__ = ["in_checkout", "run"]  # fixtures


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[RunConfig, str]]:
    """Stands in for the training, and keeps what it was called with."""
    calls: list[tuple[RunConfig, str]] = []

    def prepare_run(config: RunConfig, recipe: str) -> types.SimpleNamespace:
        calls.append((config, recipe))
        return types.SimpleNamespace(run_dir=tmp_path)

    install_training(monkeypatch, prepare_run)
    return calls


# Overrides


def test_overrides_reach_the_training(
    trained: list[tuple[RunConfig, str]], run: Callable[..., Outcome]
) -> None:
    arguments = [
        "--train.num-iterations", "20", "--optimizer.lr=1e-5", "--model.dtype", "bfloat16",
        "--output.tensorboard", "false", "--train.num_iterations", "21",
    ]  # fmt: skip
    code, _, error = run(train.main, RECIPE, *arguments)
    assert (code, error) == (0, "")
    ((config, recipe),) = trained
    assert recipe == RECIPE
    assert config.train.num_iterations == 21  # the last one counts
    assert config.optimizer.lr == 1e-5
    assert config.model.dtype == "bfloat16"
    assert config.output.tensorboard is False
    untouched = r2vpo_off_policy()
    assert config.rollout == untouched.rollout
    assert config.train.prompts_per_iteration == untouched.train.prompts_per_iteration


def test_fields_that_depend_on_each_other_can_change_together() -> None:
    config = apply_overrides(
        RunConfig(),
        ["--algorithm.ratio-penalty-min", "2e3", "--algorithm.ratio-penalty-max", "3e3"],
    )
    assert config.algorithm.ratio_penalty_min == 2000.0


@pytest.mark.parametrize(("value", "expected"), [("3/2", "3/2"), ("1.5", 1.5), ("2", 2.0)])
def test_the_utd_is_a_number_or_a_ratio(value: str, expected: float | str) -> None:
    config = apply_overrides(RunConfig(), ["--replay.update-to-data", value])
    assert config.replay.update_to_data == expected


def test_negative_numbers_are_values() -> None:
    with pytest.raises(ValueError, match="train.seed = -3 is not valid: at least 0"):
        apply_overrides(RunConfig(), ["--train.seed", "-3"])


def test_every_field_can_be_overridden() -> None:
    sections = get_type_hints(RunConfig)
    flags = list_config_fields()
    assert len(flags) == sum(len(get_type_hints(section)) for section in sections.values())
    text = {bool: "true", int: "1", float: "0.5", str: "x", float | str: "3/2"}
    for field in flags.values():
        assert field.type in text, f"{field.flag}: overrides cannot read a {field.type}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.num-iteration", "3"], "did you mean --train.num-iterations?"),
        (["--train.num_itrations", "3"], "did you mean --train.num-iterations?"),
        (["--num-iterations", "3"], "did you mean --train.num-iterations?"),
        (["--data.seed", "3"], "unknown field --data.seed; did you mean --train.seed?"),
        (["--optimiser.lr", "3"], "did you mean --optimizer.lr?"),
        (["--replay.zzz", "3"], "replay has: --replay.capacity-iterations, --replay.update-to-"),
        (["--zzz.zzz", "3"], "unknown field --zzz.zzz; sections are: model, data, rollout,"),
        (["stray"], "unexpected argument 'stray'"),
        (["--train.seed", "abc"], "--train.seed abc: not valid, must be an integer"),
        (["--train.seed=1.5"], "--train.seed 1.5: not valid, must be an integer"),
        (["--optimizer.lr", "fast"], "--optimizer.lr fast: not valid, must be a number"),
        (["--output.tensorboard", "yes"], "--output.tensorboard yes: not valid, must be true or f"),
        (["--train.seed"], "--train.seed needs a value (an integer)"),
        (["--train.seed", "--optimizer.lr", "1"], "--train.seed needs a value"),
        (["--train.num-iterations", "0"], "train.num_iterations = 0 is not valid: at least 1"),
        (["--train.mini-batch-samples", "9999"], "train.mini_batch_samples = 9999 is not valid: a"),
        (["--replay.update-to-data", "twice"], "replay.update_to_data = 'twice' is not valid: a"),
        (["--model.dtype", "fp8"], "model.dtype = 'fp8' is not valid: one of 'float32', 'bfloat"),
    ],
)
def test_bad_overrides_get_a_short_message(
    arguments: list[str],
    message: str,
    trained: list[tuple[RunConfig, str]],
    run: Callable[..., Outcome],
) -> None:
    code, output, error = run(train.main, RECIPE, *arguments)
    assert message in error
    assert code == 2
    assert output == ""
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 2
    assert trained == []


def test_traceback_flag_shows_where(run: Callable[..., Outcome]) -> None:
    code, _, error = run(train.main, RECIPE, "--zzz.zzz", "3", "--traceback")
    assert code == 2
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: unknown field --zzz.zzz")


# Recipes


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("recipes/tiny_cpu.py", "no function named; recipes/tiny_cpu.py has: "),
        ("recipes/tiny_cpu.py:r2vpo_of_policy", "did you mean 'r2vpo_off_policy'?"),
        ("recipes/tiny_cpu.py:replace", "no function 'replace'"),  # imported there, no recipe
        ("recipes/tinycpu.py:x", "no such file 'recipes/tinycpu.py'; there are: recipes/"),
        ("nowhere/x.py:y", "there are: recipes/"),
        ("README:y", "no such file 'README'"),
    ],
)
def test_a_recipe_that_is_not_there(recipe: str, message: str, run: Callable[..., Outcome]) -> None:
    code, _, error = run(train.main, recipe)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f():\n    return 1 / 0\n", "r.py:2: ZeroDivisionError: division by zero"),
        ("def f(:\n", "r.py:1: SyntaxError: "),
        (
            "import absent_package\ndef f(): ...\n",
            "r.py:1: ModuleNotFoundError: No module named 'a",
        ),
        ("def f(): return 3\n", "returned int, must be a RunConfig"),
        ("def f(x): ...\n", "has: none (a recipe is a function without parameters)"),
        (
            "from r2vpo_megatron.config import TrainConfig\n"
            "def f():\n    return TrainConfig(num_iterations=0)\n",
            "r.py:3: ValueError: train.num_iterations = 0 is not valid",
        ),
    ],
)
def test_a_recipe_that_fails(
    body: str, message: str, tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    (tmp_path / "r.py").write_text(body)
    code, _, error = run(train.main, f"{tmp_path}/r.py:f")
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_recipe_may_define_dataclasses_and_default_parameters(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, replace\n"
        "from r2vpo_megatron.config import RunConfig, TrainConfig\n"
        "@dataclass\nclass Sizes:\n    seed: int = 5\n"
        "def f(sizes=Sizes()):\n    return RunConfig(train=TrainConfig(seed=sizes.seed))\n"
    )
    assert load_recipe(f"{tmp_path}/r.py:f").train.seed == 5


def test_no_recipe_prints_the_usage(run: Callable[..., Outcome]) -> None:
    code, _, error = run(train.main)
    assert code == 2
    assert "no recipe given. Usage: python -m r2vpo_megatron.cli.train RECIPE_FILE" in error
    assert len(error.splitlines()) == 2


# Help


def get_help(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        train.main([*arguments, "--help"])
    assert exit_info.value.code == 0
    # Boxes and line breaks depend on the terminal.
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_shows_every_field_with_meaning_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = get_help(capsys)
    for flag in list_config_fields():
        assert f"{flag} " in text
    assert text.count("(default: ") == len(list_config_fields())
    assert (
        "--train.num-iterations INT Iterations of rollout, update and weight push. (default: 100)"
        in text
    )


def test_help_shows_the_recipes_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = get_help(capsys, RECIPE)
    assert "Prompts sampled from per iteration. (default: 64)" in text


# Processes


def test_bad_input_fails_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys; from r2vpo_megatron.cli.train import main; "
        f"code = main(['{RECIPE}', '--train.sed', '1']); "
        "print(code, sorted({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "2 []\n"
    assert result.stderr == "error: unknown field --train.sed; did you mean --train.seed?\n"


def test_the_module_exits_with_the_commands_code() -> None:
    command = [sys.executable, "-m", "r2vpo_megatron.cli.train", "nowhere.py:f"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: recipe 'nowhere.py:f': no such file")


# Explain


def test_explain_prints_the_derived_counts(run: Callable[..., Outcome]) -> None:
    code, output, _ = run(
        explain.main, RECIPE, "--parallel.data", "2", "--rollout.num-engines", "3",
        "--rollout.tensor-parallel", "2",
    )  # fmt: skip
    assert code == 0
    lines = {line.strip()[:26].strip(): line.strip()[26:].strip() for line in output.splitlines()}
    assert lines["responses per iteration"] == "512 (8 per prompt)"
    assert lines["updates per iteration"] == "4"
    assert lines["samples per update"] == "256 (128 per data parallel rank)"
    assert lines["samples in the full buffer"] == "2048 (4 iterations)"
    assert lines["uses of a sample, expected"] == "2"
    assert lines["age of a sample at use"].startswith("0 to 3, 1.5 on average")
    assert lines["iterations, updates in all"] == "30, 120"
    assert lines["learner ranks"] == "4 (tensor 2 x pipeline 1 x context 1 x data 2)"
    assert lines["rollout ranks"] == "6 (3 engines x tensor 2)"


def test_explain_of_algorithm_1(run: Callable[..., Outcome]) -> None:
    _, output, _ = run(explain.main, "recipes/tiny_cpu.py:r2vpo_on_policy")
    assert "uses of a sample, expected  1\n" in output
    assert "age of a sample at use      0 (iterations" in output
