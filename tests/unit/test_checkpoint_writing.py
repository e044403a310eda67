"""Checkpoints of the loop: written while it goes on, or said not to be."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from r2vpo_megatron.checkpoint.run_folder import (
    list_checkpoints,
    seal_checkpoint,
    verify_checkpoint,
)
from r2vpo_megatron.orchestration.checkpoints import restore
from r2vpo_megatron.orchestration.cluster import NoAnswer
from r2vpo_megatron.orchestration.loop import train
from r2vpo_megatron.orchestration.run import save_weights
from tests.fake_ring import (
    FakeRollout,
    make_ring,
    push,
    reward,
)
from tests.saved_ring import (
    SavedLearner,
    checkpoints_of,
    config_of,
    parts_of,
    turn,
)

__all__ = ["push"]  # the fixture that stands in for weight pushes


def test_training_goes_on_while_a_checkpoint_is_written_and_a_second_one_waits(
    tmp_path: Path,
) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    learner.may_write = False
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=3)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(ring, learner, root, said)
    checkpoints.save()
    num_updates = len(learner.penalties)
    turn(ring, config, stop_after=6)
    checkpoints.poll()
    assert list_checkpoints(root) == [] and said == []
    threading.Timer(0.2, learner.release.set).start()
    learner.may_write = True
    assert checkpoints.save(wait=True)
    newest, before = list_checkpoints(root)
    assert before.name == "iteration-000000-update-003"
    assert newest.name == "iteration-000001-update-002"
    assert json.loads((before / "learner" / "learner.json").read_text()) == num_updates
    state = json.loads((before / "run_state.json").read_text())
    assert state["guard"]["num_updates"] == num_updates
    assert len(said) == 2 and str(before) in said[0] and str(newest) in said[1]
    assert checkpoints.metrics()["time/checkpoint_seconds"] > 0.1
    assert checkpoints.metrics()["time/checkpoint_seconds"] == 0
    checkpoints.save(wait=True)  # of this place there is one already
    assert len(said) == 2
    checkpoints.__exit__(None, None, None)


def test_a_run_that_goes_on_from_the_latest_does_not_write_it_again(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    root = tmp_path / "checkpoints"
    for number in (1, 2):
        ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
        turn(ring, config, stop_after=number)
        with checkpoints_of(ring, learner, root, []) as checkpoints:
            checkpoints.save(wait=True)
    latest, _ = list_checkpoints(root)
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    restore(latest, ring.replay, parts_of(ring), ring.progress)
    with checkpoints_of(ring, learner, root, said, resumed=latest) as checkpoints:
        manifest = (latest / "manifest.json").read_text()
        assert checkpoints.save(wait=True)
        assert said == []
        assert checkpoints.save(is_asked_for=True)
    assert said == [f"checkpoint: {latest} (it is there already)"]
    assert (latest / "manifest.json").read_text() == manifest


def test_what_cannot_be_written_is_said_and_costs_nothing_that_was_there(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(ring, learner, root, said)
    assert checkpoints.save(wait=True)
    turn(ring, config, stop_after=2)
    learner.error = OSError(28, "No space left on device")
    assert not checkpoints.save(wait=True)
    assert "iteration-000000-update-002 was not written" in said[-1] and "No space" in said[-1]
    assert [folder.name for folder in list_checkpoints(root)] == ["iteration-000000-update-001"]
    verify_checkpoint(list_checkpoints(root)[0])
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    learner.error = None
    assert checkpoints.save(wait=True)
    assert len(list_checkpoints(root)) == 2
    checkpoints.__exit__(None, None, None)


def test_a_rank_that_does_not_answer_ends_the_run_and_is_no_full_disk(tmp_path: Path) -> None:
    config, learner = config_of("synchronous"), SavedLearner()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    checkpoints = checkpoints_of(ring, learner, tmp_path / "checkpoints", [])
    learner.error = NoAnswer("finish_save_state: no answer in 5 s")
    with pytest.raises(NoAnswer, match="no answer"), checkpoints:
        checkpoints.save(wait=True)
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_file_system_that_times_out_ends_nothing(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    learner.error = OSError(errno.ETIMEDOUT, "Connection timed out")
    assert isinstance(learner.error, TimeoutError)  # in Python they are one
    with checkpoints_of(ring, learner, tmp_path / "checkpoints", said) as checkpoints:
        assert not checkpoints.save(wait=True)
    assert "was not written" in said[-1] and "Connection timed out" in said[-1]


def test_a_failure_lets_the_ranks_end_what_they_write(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    learner.may_write = False
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    root = tmp_path / "checkpoints"
    with (
        pytest.raises(ValueError, match="not a number"),
        checkpoints_of(ring, learner, root, said) as checkpoints,
    ):
        checkpoints.save()
        threading.Timer(0.2, learner.release.set).start()
        raise ValueError("a reward is not a number")
    (folder,) = list_checkpoints(root)
    verify_checkpoint(folder)
    assert said == [f"checkpoint: {folder}"]


@pytest.mark.parametrize(
    ("end", "is_kept"),
    [
        (RuntimeError("a stage failed"), True),
        (SystemExit(143), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_failure_waits_for_the_hashing_of_a_checkpoint_and_a_signal_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException, is_kept: bool
) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    root, asked, begun = tmp_path / "checkpoints", list[bool](), threading.Event()

    def slowly(folder: Path, name: str, facts: Any, is_given_up: Any) -> Path:
        begun.set()
        deadline = time.monotonic() + (0.3 if is_kept else 20.0)
        while not is_given_up() and time.monotonic() < deadline:
            time.sleep(0.01)
        asked.append(is_given_up())
        return seal_checkpoint(folder, name, facts, is_given_up)

    monkeypatch.setattr("r2vpo_megatron.orchestration.checkpoints.seal_checkpoint", slowly)
    with pytest.raises(type(end)), checkpoints_of(ring, learner, root, said) as checkpoints:
        checkpoints.save()
        while not begun.wait(0.01):
            checkpoints.poll()  # until only hashing is left
        raise end
    assert asked == [not is_kept]
    assert [path.name for path in list_checkpoints(root)] == [
        "iteration-000000-update-001"
    ] * is_kept
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert len(said) == 1 and ("was not written" in said[0]) is not is_kept


def test_the_newest_are_kept_and_those_of_every_other_iteration(tmp_path: Path) -> None:
    config, learner, said = config_of("synchronous"), SavedLearner(), list[str]()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(
        ring, learner, root, said, every_iterations=1, keep_last=1, keep_every_iterations=2
    )
    for _ in train(config, ring, lambda number, metrics: None):
        checkpoints.after_iteration()
    assert checkpoints.save(wait=True)
    names = [folder.name for folder in list_checkpoints(root)]
    assert names == ["iteration-000004", "iteration-000002"]
    checkpoints.__exit__(None, None, None)


def test_weights_that_are_not_finite_end_the_run_and_leave_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    config, learner = config_of("synchronous"), SavedLearner()
    ring = make_ring(config, learner, FakeRollout(), reward, tmp_path)
    turn(ring, config, stop_after=1)
    root = tmp_path / "checkpoints"
    checkpoints = checkpoints_of(ring, learner, root, [])
    assert checkpoints.save(wait=True)
    turn(ring, config, stop_after=2)

    def refuse(folder: Path) -> None:
        raise FloatingPointError("weight x is not finite")

    learner.begin_save_state = refuse  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError):
        checkpoints.save(wait=True)
    (kept,) = list_checkpoints(root)
    assert kept.name == "iteration-000000-update-001"
    verify_checkpoint(kept)


def test_exported_weights_replace_those_of_before_and_only_when_they_are_whole(
    tmp_path: Path,
) -> None:
    """A run that went back exports other weights under the name of the same place."""
    learner, folder = mock.Mock(), tmp_path / "exports" / "iteration-000002"
    text = ["first"]

    def save_hf(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text[0])
        if text[0] == "cut off":
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "model.safetensors").write_text(text[0])

    learner.save_hf = save_hf
    for text[0] in ("first", "second"):
        save_weights(learner, folder)
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "config.json": text[0],
            "model.safetensors": text[0],
        }
    text[0] = "cut off"
    with pytest.raises(OSError, match="No space"):
        save_weights(learner, folder)
    assert (folder / "config.json").read_text() == "second"
    text[0] = "third"
    save_weights(learner, folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").read_text() == "third"
