"""Checkpoints are whole or not there: killed anywhere, on a full disk, damaged, open to others."""

import errno
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from r2vpo_megatron.checkpoint import durable
from r2vpo_megatron.checkpoint.position import Position
from r2vpo_megatron.checkpoint.run_folder import (
    CheckpointNotWritten,
    begin_checkpoint,
    go_back_to,
    list_checkpoints,
    newest_sound,
    retain,
    seal_checkpoint,
    verify_checkpoint,
)

FORK = multiprocessing.get_context("fork")
ACTIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.scandir")
NAMES_WITHIN = ("learner", "rank-0", "run_state.json", "manifest.json")
DIED, FAILED = 17, 18  # exit statuses of children


def write(root: Path, name: str, text: str = "") -> Path:
    """A checkpoint of two files, one in a folder."""
    partial = begin_checkpoint(root, name)
    (partial / "learner").mkdir()
    (partial / "learner" / "rank-0").write_text(f"{name} {text}")
    (partial / "run_state.json").write_text(text)
    return seal_checkpoint(partial, name, {"text": text})


def names(root: Path) -> list[str]:
    return [folder.name for folder in list_checkpoints(root)]


def refuse(message: str) -> None:
    raise AssertionError(message)


def sound_text(root: Path) -> str:
    """Of the newest sound checkpoint, none of the others being damaged."""
    manifest = newest_sound(root, refuse)
    assert manifest is not None
    return manifest.facts["text"]


@pytest.mark.parametrize(
    ("position", "name"),
    [
        (Position(12), "iteration-000012"),
        (Position(12, 4), "iteration-000012-update-004"),
        (Position(1234567, 1000), "iteration-1234567-update-1000"),
    ],
)
def test_positions_and_names(position, name):
    assert position.name == name
    assert Position.parse(name) == position


@pytest.mark.parametrize("name", ["", ".iteration-000012", "iteration-12", "iteration-000012x"])
def test_other_names_are_no_positions(name):
    with pytest.raises(ValueError, match="not the name of a checkpoint"):
        Position.parse(name)


def test_a_sealed_checkpoint_says_what_is_in_it(tmp_path):
    folder = write(tmp_path, "iteration-000001", "abc")
    manifest = verify_checkpoint(folder)
    # sha256 of "abc", from the standard that defines it (FIPS 180-2, appendix B.1).
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.files["run_state.json"] == (3, abc)
    assert manifest.files.keys() == {"run_state.json", "learner/rank-0"}
    assert manifest.facts == {"text": "abc"}
    assert (tmp_path / "latest").read_text() == "iteration-000001\n"
    assert sorted(os.listdir(tmp_path)) == ["iteration-000001", "latest"]


def test_leftovers_of_dead_attempts_go_when_the_next_one_begins(tmp_path):
    write(tmp_path, "iteration-000001")
    begin_checkpoint(tmp_path, "iteration-000002")
    (tmp_path / ".latest").write_text("iteration")
    partial = begin_checkpoint(tmp_path, "iteration-000003")
    assert set(os.listdir(tmp_path)) == {partial.name, "iteration-000001", "latest"}


def run_child(target, *arguments) -> int:
    child = FORK.Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def interrupt_at(root: Path, number: int, act) -> None:
    """Call `act` before this process's numbered action on a file in `root`."""
    num_actions = 0

    def hook(event, arguments):
        nonlocal num_actions
        # Whole folders are deleted by names that are relative to an open one.
        is_ours = event in ACTIONS and str(arguments[0]).startswith((str(root), *NAMES_WITHIN))
        if is_ours:
            num_actions += 1
            if num_actions == number:
                act()

    sys.addaudithook(hook)


def die_writing(root: Path, name: str, number: int) -> None:
    interrupt_at(root, number, lambda: os._exit(DIED))
    write(root, name, "new")
    retain(root, 1, 0)


@pytest.mark.parametrize("name", ["iteration-000002", "iteration-000003"])
def test_death_before_any_action_leaves_the_old_or_the_new_checkpoint(tmp_path, name):
    """`iteration-000002` is there already and is replaced."""
    for number in range(1, 1000):
        root = tmp_path / str(number)
        write(root, "iteration-000001", "oldest")
        write(root, "iteration-000002", "old")
        status = run_child(die_writing, root, name, number)
        assert sound_text(root) in ("old", "new"), number
        for folder in list_checkpoints(root):
            verify_checkpoint(folder)
        write(root, "iteration-000004", "next")
        assert not [entry for entry in os.listdir(root) if entry.startswith(".")], number
        if status == 0:
            break
        assert status == DIED
    assert number > 15
    assert names(root) == ["iteration-000004", name]


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def seal_without_room(root: Path, name: str, number: int) -> None:
    partial = begin_checkpoint(root, name)
    (partial / "run_state.json").write_text("new")
    interrupt_at(root, number, no_space)
    try:
        seal_checkpoint(partial, name, {"text": "new"})
    except CheckpointNotWritten as error:
        assert name in str(error) and "No space left on device" in str(error)
        assert not partial.exists()
        sys.exit(FAILED)


@pytest.mark.parametrize("name", ["iteration-000002", "iteration-000003"])
def test_a_full_disk_at_any_action_leaves_what_was_there(tmp_path, name):
    num_failed = 0
    for number in range(1, 1000):
        root = tmp_path / str(number)
        write(root, "iteration-000001", "oldest")
        write(root, "iteration-000002", "old")
        status = run_child(seal_without_room, root, name, number)
        assert status in (0, FAILED), number
        num_failed += status == FAILED
        text = sound_text(root)
        assert text == "new" if status == 0 else text in ("old", "new"), number
        assert {"iteration-000001", "iteration-000002"} <= set(names(root)), number
        if status == 0 and text == "new" and number > num_failed + 20:
            break
    assert num_failed > 5


def test_a_disk_that_fails_to_synchronize_leaves_what_was_there(tmp_path, monkeypatch):
    write(tmp_path, "iteration-000001", "old")
    partial = begin_checkpoint(tmp_path, "iteration-000002")

    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable.os, "fsync", fail)
    with pytest.raises(CheckpointNotWritten, match="iteration-000002: Input/output error"):
        seal_checkpoint(partial, "iteration-000002", {})
    assert sorted(os.listdir(tmp_path)) == ["iteration-000001", "latest"]
    assert sound_text(tmp_path) == "old"


@pytest.mark.parametrize("num_asked", [1, 2, 3, 4, 5])
def test_one_that_is_given_up_leaves_what_was_there(tmp_path, num_asked):
    """At either file's hashing, or before either is brought to the disk."""
    write(tmp_path, "iteration-000001", "old")
    partial = begin_checkpoint(tmp_path, "iteration-000001")
    for name in ("a", "b"):
        (partial / name).write_text(name)
    answers = iter([False] * (num_asked - 1) + [True] * 9)
    with pytest.raises(CheckpointNotWritten, match="given up"):
        seal_checkpoint(partial, "iteration-000001", {}, lambda: next(answers))
    assert sound_text(tmp_path) == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration-000001", "latest"]


def write_without_end(root: Path, first: int, sealed) -> None:
    """Every position twice, as a run does that is resumed; tells of each that is sealed."""
    for iteration in range(first, first + 10**6):
        for text in ("first", "again"):
            write(root, Position(iteration).name, text)
            sealed.send(iteration)
            retain(root, 2, 10)


def test_kill_9_at_random_moments_loses_nothing_that_was_sealed(tmp_path):
    generator = random.Random(0)
    newest = 0
    for _ in range(40):
        receiver, sender = FORK.Pipe(duplex=False)
        child = FORK.Process(target=write_without_end, args=(tmp_path, newest + 1, sender))
        child.start()
        sender.close()
        last = receiver.recv()  # it is at work
        child.join(generator.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        try:
            while True:
                last = receiver.recv()
        except EOFError:
            receiver.close()
        manifest = newest_sound(tmp_path, refuse)
        assert manifest is not None
        newest = Position.parse(manifest.folder.name).iteration
        assert last <= newest <= last + 1
    kept = [Position.parse(name).iteration for name in names(tmp_path)]
    assert set(range(10, newest, 10)) <= set(kept)
    assert len([number for number in kept if number % 10]) <= 4


def test_retention_keeps_the_last_and_every_so_many(tmp_path):
    for position in (
        Position(1),
        Position(2),
        Position(2, 3),
        Position(3),
        Position(4),
        Position(5),
    ):
        write(tmp_path, position.name)
    assert retain(tmp_path, 2, 2) == [
        "iteration-000001",
        "iteration-000002-update-003",
        "iteration-000003",
    ]
    assert names(tmp_path) == ["iteration-000005", "iteration-000004", "iteration-000002"]
    assert retain(tmp_path, 1, 0) == ["iteration-000002", "iteration-000004"]
    assert retain(tmp_path, 1, 0) == []


def test_a_branch_that_was_left_is_put_aside_for_good(tmp_path):
    for place in (Position(1), Position(2), Position(2, 4), Position(3)):
        write(tmp_path, place.name, "first")
    assert go_back_to(tmp_path, Position(2).name) == [Position(2, 4).name, Position(3).name]
    assert sound_text(tmp_path) == "first" and names(tmp_path)[0] == Position(2).name
    assert go_back_to(tmp_path, Position(2).name) == []
    write(tmp_path, Position(3).name, "second")
    write(tmp_path, Position(4).name, "second")
    assert retain(tmp_path, keep_last=2, keep_every_iterations=0) == [
        Position(1).name,
        Position(2).name,
    ]
    (tmp_path / Position(4).name / "run_state.json").write_text("x")
    assert newest_sound(tmp_path, lambda text: None).folder.name == Position(3).name
    assert newest_sound(tmp_path, lambda text: None).facts["text"] == "second"
    assert go_back_to(tmp_path, Position(3).name) == [Position(4).name]
    aside = sorted(path.name for path in (tmp_path / "abandoned").iterdir())
    assert aside == [Position(2, 4).name, Position(3).name, Position(4).name]
    write(tmp_path, Position(4).name, "third")
    assert go_back_to(tmp_path, Position(3).name) == [Position(4).name]
    assert len(list((tmp_path / "abandoned").iterdir())) == 4  # nothing of before is lost


def test_a_run_that_went_back_goes_on_from_what_it_wrote_since(tmp_path):
    for iteration in (1, 2, 5, 6):
        write(tmp_path, Position(iteration).name, f"first {iteration}")
    write(tmp_path, Position(3).name, "back")
    assert sound_text(tmp_path) == "back"
    assert retain(tmp_path, 1, 0) == ["iteration-000001", "iteration-000002"]
    assert names(tmp_path) == ["iteration-000006", "iteration-000005", "iteration-000003"]


@pytest.mark.parametrize("latest", [None, "", "iteration-000009\n", "../elsewhere", "\ud800"])
def test_without_a_latest_that_names_one_it_is_the_furthest(tmp_path, latest):
    for iteration in (1, 2):
        write(tmp_path, Position(iteration).name, str(iteration))
    if latest is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(latest.encode("utf-8", "surrogatepass"))
    assert sound_text(tmp_path) == "2"
