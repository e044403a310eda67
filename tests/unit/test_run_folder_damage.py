"""Checkpoints that are damaged, or that others may write to: named, and never loaded."""

import os
import shutil
from pathlib import Path

import pytest

from r2vpo_megatron.checkpoint.run_folder import (
    CheckpointDamaged,
    begin_checkpoint,
    newest_sound,
    require_private,
    verify_checkpoint,
)
from tests.unit.test_run_folder import refuse, write


def truncate(folder: Path) -> None:
    os.truncate(folder / "run_state.json", 1)


def flip(folder: Path) -> None:
    (folder / "run_state.json").write_text("x23")


def delete(folder: Path) -> None:
    (folder / "run_state.json").unlink()


def add(folder: Path) -> None:
    (folder / "learner" / "more").touch()


def link(folder: Path) -> None:
    (folder / "run_state.json").rename(folder.parent / "aside")
    (folder / "run_state.json").symlink_to(folder.parent / "aside")


def change_facts(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"facts"', '"fads"', 1))


def change_value(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"text": "', '"text": "x', 1))


def break_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 20)


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def change_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "run_state.json: 1 bytes, 3 bytes were written"),
        (flip, "run_state.json: its content has changed"),
        (delete, "run_state.json: missing"),
        (add, "learner/more: not of this checkpoint"),
        (link, "run_state.json: a link"),
        (break_manifest, "no manifest can be read"),
        (drop_manifest, "no manifest can be read"),
        (change_facts, "no manifest can be read"),
        (change_value, "manifest.json: its content has changed"),
        (change_format, "its format is 3; this version reads 2"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, damage, message):
    write(tmp_path, "iteration-000001", "old")
    damage(write(tmp_path, "iteration-000002", "123"))
    told = []
    manifest = newest_sound(tmp_path, told.append)
    assert manifest is not None and manifest.facts == {"text": "old"}
    (line,) = told
    assert "iteration-000002" in line and message in line


def test_all_damage_is_named_at_once(tmp_path):
    folder = write(tmp_path, "iteration-000001", "123")
    (folder / "learner" / "rank-0").unlink()
    flip(folder)
    add(folder)
    with pytest.raises(CheckpointDamaged) as caught:
        verify_checkpoint(folder)
    assert str(caught.value).endswith(
        "learner/more: not of this checkpoint; learner/rank-0: missing; "
        "run_state.json: its content has changed"
    )


def test_where_none_is_sound_there_is_none(tmp_path):
    assert newest_sound(tmp_path / "nowhere", refuse) is None
    assert newest_sound(tmp_path, refuse) is None
    delete(write(tmp_path, "iteration-000001"))
    told = []
    assert newest_sound(tmp_path, told.append) is None
    assert len(told) == 1


def test_whatever_the_umask_others_cannot_write(tmp_path):
    before = os.umask(0)
    try:
        root = tmp_path / "checkpoints"
        partial = begin_checkpoint(root, "iteration-000001")
        assert partial.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(partial)
        folder = write(root, "iteration-000001")
    finally:
        os.umask(before)
    require_private(folder)
    for path in (root, root / "latest", folder / "manifest.json", folder / "learner"):
        assert not path.stat().st_mode & 0o022, path


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_what_others_may_write_is_refused(tmp_path, mode):
    folder = write(tmp_path, "iteration-000001")
    (folder / "learner" / "rank-0").chmod(mode)
    with pytest.raises(ValueError, match=r"1 files .*rank-0.*chmod -R go-w"):
        verify_checkpoint(folder)
    (folder / "learner" / "rank-0").chmod(0o644)
    verify_checkpoint(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_others_is_refused(tmp_path):
    folder = write(tmp_path, "iteration-000001")
    os.chown(folder / "run_state.json", 12345, -1)
    with pytest.raises(ValueError, match="run_state.json"):
        newest_sound(tmp_path, refuse)
