"""How a command ends: its message, its exit code, and what is kept."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import pytest

from r2vpo_megatron.checkpoint.run_folder import begin_checkpoint, seal_checkpoint
from r2vpo_megatron.cli import train
from r2vpo_megatron.cli.errors import run_command, user_message
from r2vpo_megatron.config import RunConfig
from tests.command_lines import RECIPE, Outcome, in_checkout, install_training, run

__all__ = ["in_checkout", "run"]  # fixtures


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("parallel.tensor = 4 is not valid"), 2, "error: parallel.tensor = 4"),
        (FileNotFoundError(2, "No such file", "m/config.json"), 2, "m/config.json: No such file"),
        (ModuleNotFoundError("no", name="vllm.engine"), 2, "the package vllm is not installed. It"),
        (ModuleNotFoundError("no", name="matplotlib"), 2, "'r2vpo-megatron[report]'"),
        (ModuleNotFoundError("no", name="megatron"), 2, "megatron is not installed: `make setup`"),
    ],
)
def test_a_users_mistake_found_late_is_as_short_and_keeps_its_traceback(
    error: Exception,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., Outcome],
) -> None:
    def fail(config: RunConfig, recipe: str) -> int:
        raise error

    install_training(monkeypatch, fail)
    result, _, text = run(train.main, RECIPE, "--output.dir", str(tmp_path / "out"))
    assert result == code
    assert message in text
    assert len(text.splitlines()) == 1


def test_a_failed_run_shows_its_traceback(run: Callable[..., Outcome]) -> None:
    def fail(arguments: list[str]) -> int:
        raise RuntimeError("worker died")

    code, _, error = run(lambda arguments: run_command(fail, arguments))
    assert code == 1
    assert "in fail" in error
    assert "RuntimeError: worker died" in error


def test_a_missing_module_of_our_own_is_no_users_mistake() -> None:
    assert user_message(ModuleNotFoundError("no", name="r2vpo_megatron.x")) is None


def test_ctrl_c(run: Callable[..., Outcome]) -> None:
    def interrupt(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    code, _, error = run(lambda arguments: run_command(interrupt, arguments))
    assert (code, error) == (130, "interrupted\n")


def test_a_failed_run_names_the_workers_error_and_keeps_the_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Outcome]
) -> None:
    class RemoteError(Exception):
        cause = FloatingPointError("the gradient norm is not finite: nan\nmore")

    def fail(prepared: object) -> None:
        raise RemoteError("long remote traceback")

    prepared = types.SimpleNamespace(run_dir=tmp_path)
    install_training(monkeypatch, lambda config, recipe: prepared, fail)
    code, _, error = run(train.main, RECIPE)
    assert code == 1
    assert error.splitlines() == [
        "error: the run failed: FloatingPointError: the gradient norm is not finite: nan",
        f"traceback: {tmp_path / 'error.txt'}",
    ]
    kept = (tmp_path / "error.txt").read_text()
    assert "in fail" in kept
    assert "long remote traceback" in kept


def test_a_failed_run_is_told_where_it_goes_on_and_a_success_clears_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Outcome]
) -> None:
    def fail(prepared: object) -> None:
        raise RuntimeError("no more")

    root = tmp_path / "checkpoints"
    for name in ("iteration-000003", "iteration-000001", "iteration-000002"):  # it went back
        seal_checkpoint(begin_checkpoint(root, name), name, {})
    prepared = types.SimpleNamespace(run_dir=tmp_path)
    install_training(monkeypatch, lambda config, recipe: prepared, fail)
    code, _, error = run(train.main, RECIPE)
    assert code == 1
    assert error.splitlines()[-1] == (
        f"the last checkpoint is {root / 'iteration-000002'}: --resume {tmp_path} goes on from "
        "there"
    )
    assert (tmp_path / "error.txt").exists()
    install_training(monkeypatch, lambda config, recipe: prepared)
    assert run(train.main, RECIPE)[0] == 0
    assert not (tmp_path / "error.txt").exists()


def test_a_value_error_of_a_started_run_is_not_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Outcome]
) -> None:
    def fail(prepared: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    prepared = types.SimpleNamespace(run_dir=tmp_path)
    install_training(monkeypatch, lambda config, recipe: prepared, fail)
    code, _, error = run(train.main, RECIPE)
    assert code == 1
    assert error.startswith("error: the run failed: ValueError: zip()")
