"""A folder that appears whole or not at all: kills, full disks, damage, two at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from r2vpo_megatron.conversion import journal
from r2vpo_megatron.conversion.journal import JournaledFolder

JOB = {"direction": "test", "layout": {"tensor": 2, "stages": [1, 2]}}
PIECES = [(f"p{i}", ("a.bin", "sub/b.bin")[i % 2], bytes([65 + i]) * (100 + i)) for i in range(8)]
EXPECTED = {
    file: b"".join(data for _, name, data in PIECES if name == file)
    for file in ("a.bin", "sub/b.bin")
}

KILLED_SCRIPT = """
import os, signal, sys
from r2vpo_megatron.conversion.journal import JournaledFolder
job, output, when = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with JournaledFolder(output, job, resume=False) as folder:
    for i, (piece, file, data) in enumerate(eval(sys.argv[4])):
        if i == when:
            os.kill(os.getpid(), signal.SIGKILL)
        folder.write(piece, file, lambda: [data])
"""


def _write_pieces(folder: JournaledFolder, produced: list[str] | None = None) -> None:
    for piece, file, data in PIECES:

        def produce(piece: str = piece, data: bytes = data) -> Iterator[bytes]:
            if produced is not None:
                produced.append(piece)
            yield data[:40]
            yield data[40:]

        folder.submit(piece, file, produce)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _kill_at(output: Path, piece: int) -> Path:
    """Run the job in a process that kills itself; return the folder it leaves."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED_SCRIPT, repr(JOB), str(output), str(piece), repr(PIECES)],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    return output.with_name(f".{output.name}.converting")


def test_pieces_follow_each_other_and_the_folder_appears_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "made" / "out"
    with JournaledFolder(output, JOB, resume=False) as folder:
        first = folder.write("p", "a.bin", lambda: [b"12", bytearray(b"3")])
        second = folder.write("q", "a.bin", lambda: [memoryview(b"45")])
        (folder.folder / "companion.json").write_text("{}")
        assert not output.exists()
        assert folder.finish() == output
    assert (first.file, first.position, first.length) == ("a.bin", 0, 3)
    assert (second.position, second.length) == (3, 2)
    assert second.crc32 == zlib.crc32(b"45")
    assert _contents(output) == {"a.bin": b"12345", "companion.json": b"{}"}
    assert os.listdir(output.parent) == ["out"]


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with JournaledFolder(tmp_path / "out", JOB, resume=False) as folder:
        _write_pieces(folder)
        folder.finish()
    assert _contents(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_an_output_that_exists_stays_as_it_is(tmp_path: Path, what: str) -> None:
    output = tmp_path / "out"
    if what == "folder":
        output.mkdir()
        (output / "precious").write_text("x")
    elif what == "file":
        output.write_text("x")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exists and is not empty; name a new one"):
        JournaledFolder(output, JOB, resume=True).__enter__()
    assert os.listdir(tmp_path) == ["out"]
    assert what == "link" or [*_contents(tmp_path).values()] == [b"x"]


@pytest.mark.parametrize("piece", [0, 1, 5, 7])
def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, piece: int) -> None:
    output = tmp_path / "out"
    partial = _kill_at(output, piece)
    assert not output.exists()
    with pytest.raises(ValueError, match="stopped half-way; go on with --resume"):
        JournaledFolder(output, JOB, resume=False).__enter__()
    (partial / "companion.json").write_text("written just before the kill")
    produced: list[str] = []
    with JournaledFolder(output, JOB, resume=True) as folder:
        assert folder.num_known_bytes == sum(len(data) for *_, data in PIECES[:piece])
        _write_pieces(folder, produced)
        folder.finish()
    assert produced == [name for name, *_ in PIECES[piece:]]
    assert f"{piece} pieces" in folder.notes[0]
    assert _contents(output) == EXPECTED
    assert os.listdir(tmp_path) == ["out"]


def test_damaged_pieces_and_all_after_them_are_written_anew(tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = _kill_at(output, 7)
    damaged = bytearray((partial / "a.bin").read_bytes())
    damaged[len(PIECES[0][2]) + 3] ^= 1  # in p2
    (partial / "a.bin").write_bytes(damaged)
    produced: list[str] = []
    with JournaledFolder(output, JOB, resume=True) as folder:
        _write_pieces(folder, produced)
        folder.finish()
    assert produced == [name for name, *_ in PIECES[2:]]
    assert _contents(output) == EXPECTED


@pytest.mark.parametrize("cut", [1, 30, 200, -1, -40])
def test_a_torn_journal_costs_only_what_it_does_not_tell(tmp_path: Path, cut: int) -> None:
    output = tmp_path / "out"
    partial = _kill_at(output, 6)
    lines = (partial / "journal.jsonl").read_bytes()
    (partial / "journal.jsonl").write_bytes(lines[:cut])
    with JournaledFolder(output, JOB, resume=True) as folder:
        _write_pieces(folder)
        folder.finish()
    assert _contents(output) == EXPECTED
    if cut in (1, 30):  # not even the job is legible
        assert folder.notes == ["there is nothing to resume: starting from nothing"]


@pytest.mark.parametrize(
    "line",
    [
        {"piece": "x", "file": "../../escaped", "position": 0, "length": 0, "crc32": 0},
        {"piece": "x", "file": "a.bin", "position": 10**6, "length": 1, "crc32": 0},
        {"piece": "x", "file": ["a"], "position": 0, "length": 1, "crc32": 0},
        {"piece": "x"},
        [1],
    ],
)
def test_journal_lines_that_make_no_sense_end_what_is_known(tmp_path: Path, line: object) -> None:
    output = tmp_path / "deep" / "out"
    partial = _kill_at(output, 4)
    with open(partial / "journal.jsonl", "a") as stream:
        stream.write(json.dumps(line) + "\n")
    with JournaledFolder(output, JOB, resume=True) as folder:
        _write_pieces(folder)
        folder.finish()
    assert _contents(output) == EXPECTED
    assert os.listdir(tmp_path) == ["deep"]


def test_resuming_with_another_job_names_the_difference(tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = _kill_at(output, 3)
    before = _contents(partial)
    other = {**JOB, "layout": {"tensor": 4, "stages": [1, 2]}}
    with pytest.raises(ValueError, match=r"layout\.tensor is 2 there and 4 here"):
        JournaledFolder(output, other, resume=True).__enter__()
    assert _contents(partial) == before


def test_resuming_nothing_starts_with_a_note(tmp_path: Path) -> None:
    with JournaledFolder(tmp_path / "out", JOB, resume=True) as folder:
        _write_pieces(folder)
        folder.finish()
    assert folder.notes == ["there is nothing to resume: starting from nothing"]
    assert _contents(tmp_path / "out") == EXPECTED


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with JournaledFolder(output, JOB, resume=False) as first:
        first.write(*PIECES[0][:2], lambda: [PIECES[0][2]])
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing it"):
                JournaledFolder(output, JOB, resume=resume).__enter__()
        _write_pieces(first)
        first.finish()
    assert _contents(output) == EXPECTED


def test_a_full_disk_keeps_the_finished_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, budget = tmp_path / "out", [350]
    write_all = journal.write_all

    def limited(stream, buffer):
        if str(stream.name).endswith("journal.jsonl"):
            return write_all(stream, buffer)
        write_all(stream, buffer[: budget[0]])
        budget[0] -= len(buffer)
        if budget[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_all", limited)
        with (
            pytest.raises(OSError, match="disk is full; 3 finished pieces are kept in .*resume"),
            JournaledFolder(output, JOB, resume=False) as folder,
        ):
            _write_pieces(folder)
            folder.finish()
    assert not output.exists()
    produced: list[str] = []
    with JournaledFolder(output, JOB, resume=True) as folder:
        _write_pieces(folder, produced)
        folder.finish()
    assert produced == [name for name, *_ in PIECES[3:]]
    assert _contents(output) == EXPECTED


def test_an_error_before_the_first_piece_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="bad source"),
        JournaledFolder(tmp_path / "out", JOB, resume=False) as folder,
    ):
        folder.write("p", "a.bin", lambda: _raise())
    assert os.listdir(tmp_path) == []


def _raise() -> list[bytes]:
    raise ValueError("bad source")


@pytest.mark.parametrize("file", ["../x", "/x", "a/../../x", "", "journal.jsonl", "a\0b"])
def test_no_file_outside_the_folder(tmp_path: Path, file: str) -> None:
    with (
        pytest.raises(ValueError, match="must be a path inside the output folder"),
        JournaledFolder(tmp_path / "out", JOB, resume=False) as folder,
    ):
        folder.write("p", file, lambda: [b"x"])
    assert os.listdir(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="exists and is not empty"),
        JournaledFolder(output, JOB, resume=False) as folder,
    ):
        _write_pieces(folder)
        output.mkdir()
        (output / "precious").write_text("x")
        folder.finish()
    assert _contents(output) == {"precious": b"x"}


def test_large_pieces_are_written_whole(tmp_path: Path) -> None:
    data = os.urandom(5 * (1 << 20) + 3)
    with JournaledFolder(tmp_path / "out", JOB, resume=False) as folder:
        written = folder.write("p", "a.bin", lambda: [data])
        folder.finish()
    assert written.crc32 == zlib.crc32(data)
    assert (tmp_path / "out" / "a.bin").read_bytes() == data


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EACCES])
def test_a_folder_that_cannot_get_its_name_keeps_all_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    output, rename = tmp_path / "out", os.rename

    def refused(source, target):
        if Path(target) == output:
            raise OSError(number, os.strerror(number))
        rename(source, target)

    monkeypatch.setattr(journal.os, "rename", refused)
    message = f"{output}: {os.strerror(number)}; 8 finished pieces are kept in .*--resume"
    with (
        pytest.raises(OSError, match=message),
        JournaledFolder(output, JOB, resume=False) as folder,
    ):
        _write_pieces(folder)
        folder.finish()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [".out.converting"]
    produced: list[str] = []
    with JournaledFolder(output, JOB, resume=True) as folder:
        _write_pieces(folder, produced)
        folder.finish()
    assert produced == []
    assert _contents(tmp_path) == {f"out/{name}": data for name, data in EXPECTED.items()}


def test_a_kill_just_before_the_folder_gets_its_name_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    partial = _kill_at(output, 7)
    os.rename(partial / "journal.jsonl", tmp_path / ".out.converting.journal")
    produced: list[str] = []
    with JournaledFolder(output, JOB, resume=True) as folder:
        _write_pieces(folder, produced)
        folder.finish()
    assert produced == ["p7"]
    assert _contents(tmp_path) == {f"out/{name}": data for name, data in EXPECTED.items()}


def test_a_journal_left_over_is_not_taken_for_another_folder(tmp_path: Path) -> None:
    (tmp_path / ".out.converting.journal").write_text(json.dumps({"job": JOB}) + "\n")
    with JournaledFolder(tmp_path / "out", JOB, resume=True) as folder:
        assert folder.notes == ["there is nothing to resume: starting from nothing"]
        assert not (tmp_path / ".out.converting.journal").exists()
        _write_pieces(folder)
        folder.finish()
    assert _contents(tmp_path) == {f"out/{name}": data for name, data in EXPECTED.items()}


def test_a_mount_point_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    with pytest.raises(ValueError, match="is a mount point.*name a folder inside it"):
        JournaledFolder(output, JOB, resume=False).__enter__()
    assert os.listdir(tmp_path) == ["out"]


def test_reading_again_what_is_there_is_told(tmp_path: Path) -> None:
    output = tmp_path / "out"
    _kill_at(output, 6)
    known = sum(len(data) for *_, data in PIECES[:6])
    told: list[object] = []

    def stage(title: str, num_bytes: int) -> Callable[[int], None]:
        told.append((title, num_bytes))
        return told.append

    with JournaledFolder(output, JOB, resume=True, stage=stage) as folder:
        assert told == [("checking what is there", known), *(len(d) for *_, d in PIECES[:6])]
        _write_pieces(folder)
        folder.finish()
