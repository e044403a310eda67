"""What a user gets for a mistake: one or two lines that name it, exit code 2, nothing started."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import ray

from r2vpo_megatron.cli.train import main
from r2vpo_megatron.testbed.tiny_model import make_tiny_model

RECIPE = "recipes/tiny_cpu.py:r2vpo_off_policy"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "pangu"
    make_tiny_model(folder, "pangu", warm_start=False)
    return folder


@pytest.fixture
def fail(tiny_model, tmp_path, capsys, monkeypatch):
    """Run the command, check that it fails as a user's mistake should, return the message."""
    started = []
    monkeypatch.setattr(ray, "init", lambda *args, **options: started.append(options))

    def run(*overrides: str, recipe: str = RECIPE) -> str:
        fields = {
            "model.testbed": "",
            "model.path": str(tiny_model),
            "data.train-prompts": str(tiny_model / "train.jsonl"),
            "output.dir": str(tmp_path / "out"),
        }
        arguments = [part for name, value in fields.items() for part in (f"--{name}", value)]
        code = main([recipe, *arguments, *overrides])
        message = capsys.readouterr().err
        assert code == 2
        assert started == []
        assert not list((tmp_path / "out").glob("*/"))  # no run folder
        lines = [line for line in message.splitlines() if not line.startswith("traceback: ")]
        assert 1 <= len(lines) <= 2, message
        assert "Traceback (most recent call last)" not in message
        return message

    return run


def test_recipe_that_does_not_exist(fail):
    message = fail(recipe="recipes/tiny_cpu.py:r2vpo_of_policy")
    assert "r2vpo_of_policy" in message
    assert "has: " in message
    assert "r2vpo_off_policy" in message
    assert "recipes/none.py" in fail(recipe="recipes/none.py:r2vpo")


def test_unknown_field_names_the_nearest(fail):
    message = fail("--train.num-iteration", "3")
    assert "--train.num-iteration;" in message
    assert "--train.num-iterations" in message


def test_tensor_parallel_size_that_does_not_divide_the_kv_heads(fail):
    message = fail("--parallel.tensor", "4")
    assert "tensor parallel size 4" in message
    assert "2 KV heads" in message
    assert "valid sizes: 1, 2" in message


def test_model_folder_without_config(fail, tmp_path):
    empty = tmp_path / "model"
    empty.mkdir()
    message = fail("--model.path", str(empty))
    assert str(empty) in message
    assert "config.json" in message


@pytest.mark.parametrize("package", ["vllm", "matplotlib", "tensorboard"])
def test_missing_optional_package(fail, monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find_spec(name, *rest),
    )
    message = fail()
    assert f"the package {package} is not installed" in message
    assert "pip install" in message


def test_prompt_file_with_a_broken_line(fail, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    good = {"prompt_id": "a", "prompt": "1+1=?", "ground_truth": "2"}
    prompts.write_text(json.dumps(good) + '\n{"prompt_id": "b", "prompt": "1+2=?"}\n')
    message = fail("--data.train-prompts", str(prompts))
    assert f"{prompts}:2" in message
    assert "ground_truth" in message


def test_prompts_that_ask_for_a_form_that_the_reward_does_not_read(fail, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    row = {"prompt_id": "a7", "prompt": "1+1=? End with \\boxed{}.", "ground_truth": "2"}
    prompts.write_text(json.dumps(row) + "\n")
    arguments = ("--data.train-prompts", str(prompts), "--data.reward")
    message = fail(*arguments, "math_dapo_minerva")
    assert str(prompts) in message
    assert "a7" in message
    assert "boxed" in message
    assert "data.check_answer_form" in message


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("data.chat-template", "chatml2", "'deepseek_r1'"),
        ("data.thinking", "quick", "fast"),
        ("data.reward", "math_dappo", "math_dapo_minerva"),
        ("algorithm.format-checks", "boxxed", "'boxed'"),
    ],
)
def test_a_name_that_does_not_exist_lists_the_valid_ones(fail, field, value, valid):
    message = fail(f"--{field}", value)
    assert value in message
    assert valid in message


def test_unknown_objective_lists_the_valid_ones(fail):
    message = fail("--algorithm.objective", "ppo")
    assert "'ppo'" in message
    assert "'r2vpo'" in message


def test_taken_run_name_is_not_overwritten(tiny_model, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("mine")
    code = main(
        [
            RECIPE,
            *("--model.testbed", "", "--model.path", str(tiny_model)),
            *("--data.train-prompts", str(tiny_model / "train.jsonl")),
            *("--output.dir", str(tmp_path), "--output.run-name", "run"),
        ]
    )
    assert code == 2
    assert "output.run_name = 'run'" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_text() == "mine"
