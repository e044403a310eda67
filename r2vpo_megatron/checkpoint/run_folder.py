"""Folders of a run's checkpoints: whole or not there, whatever happens while one is written.

    ROOT/iteration-000012/            after 12 iterations
    ROOT/iteration-000012-update-004/ after 4 mini-batches more
    ROOT/latest                       name of the newest
    ROOT/abandoned/                   those of branches that the run went back from
    ROOT/.*                           what is being written or removed; nobody reads it

A checkpoint is written into a hidden folder, hashed, brought to the disk, and renamed. Its manifest
says what must be in it. One of the same name goes aside meanwhile, and comes back after a kill.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.durable import synchronize, synchronize_one
from r2vpo_megatron.checkpoint.position import Position, is_position

CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
ABANDONED_FOLDER = "abandoned"
_FORMAT = 2
_HASHING_THREADS = 4
_HASHED_BYTES = 1 << 20  # at a time
_MOST_NAMED = 5
_REPLACED, _REMOVED = ".replaced-", ".removed-"  # before the name of a checkpoint


class CheckpointNotWritten(RuntimeError):
    """The disk is full or failed; what was there before is as it was."""


class CheckpointDamaged(ValueError):
    """A checkpoint is not what its manifest says."""


@dataclass(frozen=True)
class Manifest:
    """What a sound checkpoint is.

    Attributes:
        folder: where it lies.
        facts: what its writer said of it.
        files: (bytes, sha256) by path within the folder.
    """

    folder: Path
    facts: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]


def begin_checkpoint(root: Path, name: str) -> Path:
    """Make a hidden folder to write a checkpoint into; those of dead attempts are removed.

    Args:
        root: of the run's checkpoints, made if missing. One process writes there at a time.
        name: of the checkpoint to be.

    Raises:
        OSError: the disk is full or failed.
    """
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    _restore_replaced(root)
    for path in root.iterdir():
        if path.name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = root / f".{name}-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)  # whatever the umask lets into it, others cannot reach it
    return folder


def discard_checkpoint(partial: Path) -> None:
    """Remove what `begin_checkpoint` made, as far as it is there."""
    shutil.rmtree(partial, ignore_errors=True)


def seal_checkpoint(
    partial: Path,
    name: str,
    facts: Mapping[str, Any],
    is_given_up: Callable[[], bool] = lambda: False,
) -> Path:
    """Make a written folder the checkpoint of this name, and the latest.

    Args:
        partial: from `begin_checkpoint`, complete but for its manifest.
        name: of the checkpoint; one that is there already is replaced.
        facts: JSON values for the manifest.
        is_given_up: asked again and again until the checkpoint has its name, by any thread.

    Returns:
        Its folder, which is on the disk with all that is in it.

    Raises:
        CheckpointNotWritten: the disk is full or failed, or it was given up. `partial` is gone, and
            what was there is still there; `latest` may name either.
    """
    root = partial.parent
    try:
        _make_private(partial)
        content = {"facts": dict(facts), "files": _hash_files(partial, is_given_up)}
        manifest = {"format": _FORMAT, "sha256": _content_digest(content), **content}
        _write_durably(partial / MANIFEST_FILE, json.dumps(manifest, indent=1))
        synchronize(partial, is_given_up)
        final = root / name
        if final.exists():
            final.rename(root / f"{_REPLACED}{name}")
        partial.rename(final)
        synchronize_one(root)
        _write_latest(root, name)
    except OSError as error:
        discard_checkpoint(partial)
        with suppress(OSError):  # it comes back when the next one begins, or is looked for
            _restore_replaced(root)
        raise CheckpointNotWritten(f"{root / name}: {error.strerror or error}") from error
    discard_checkpoint(root / f"{_REPLACED}{name}")
    return final


def go_back_to(root: Path, name: str) -> list[str]:
    """Make a checkpoint the latest, and put those beyond it where none goes on from them.

    They stay on the disk, in ROOT/abandoned: what the run does from here on is another branch.

    Args:
        root: of the run's checkpoints; the caller is alone there.
        name: of one of them.

    Returns:
        Names of those that were put aside, the oldest first.

    Raises:
        OSError: the disk is full or failed.
    """
    _write_latest(root, name)
    _, beyond = by_latest(root)
    for folder in reversed(beyond):
        aside = root / ABANDONED_FOLDER
        aside.mkdir(mode=0o755, exist_ok=True)
        place = aside / folder.name
        if place.exists():  # of a branch before this one
            place = aside / f"{folder.name}-{secrets.token_hex(4)}"
        folder.rename(place)
    synchronize_one(root)
    return [folder.name for folder in reversed(beyond)]


def list_checkpoints(root: Path) -> list[Path]:
    """Folders with the name of a checkpoint, the newest first; sound or not."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir() and is_position(path.name)]
    return sorted(folders, key=lambda path: Position.parse(path.name), reverse=True)


def by_latest(root: Path) -> tuple[list[Path], list[Path]]:
    """Checkpoints, newest first: the latest and those before it, and those beyond it.

    A run goes on from the first of the former that is sound, else of the latter.
    """
    folders = list_checkpoints(root)
    try:
        name = (root / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return folders, []
    names = [folder.name for folder in folders]
    first = names.index(name) if name in names else 0
    return folders[first:], folders[:first]


def retain(root: Path, keep_last: int, keep_every_iterations: int) -> list[str]:
    """Remove checkpoints that are not to be kept.

    Those beyond the latest, which a run that went back left, neither count nor go.

    Args:
        root: of the run's checkpoints.
        keep_last: so many of the newest stay, with the one that `latest` names; 1 or more.
        keep_every_iterations: those after a multiple of so many iterations stay; 0: no others.

    Returns:
        Names of those that are gone, the oldest first.
    """
    assert keep_last >= 1, keep_last
    every, (up_to_latest, _) = keep_every_iterations, by_latest(root)
    removed = []
    for folder in reversed(up_to_latest[keep_last:]):
        position = Position.parse(folder.name)
        if every > 0 and not position.num_mini_batches and position.iteration % every == 0:
            continue
        hidden = root / f"{_REMOVED}{folder.name}-{secrets.token_hex(4)}"
        folder.rename(hidden)  # a kill in the middle leaves no half of a checkpoint
        discard_checkpoint(hidden)
        removed.append(folder.name)
    return removed


def verify_checkpoint(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and compare every file with it.

    Raises:
        CheckpointDamaged: naming all that is missing, superfluous, different or illegible.
        ValueError: others may write to it; see `require_private`.
    """
    require_private(folder)
    manifest = _read_manifest(folder)
    present = {  # a link is never of a checkpoint: it has no file's size, or has another's content
        str(path.relative_to(folder)): -1 if path.is_symlink() else path.stat().st_size
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and path != folder / MANIFEST_FILE
    }
    faults = [f"{name}: missing" for name in manifest.files.keys() - present.keys()]
    faults += [f"{name}: not of this checkpoint" for name in present.keys() - manifest.files.keys()]
    intact = []
    for name in sorted(manifest.files.keys() & present.keys()):
        size = manifest.files[name][0]
        if present[name] != size:
            there = "a link" if present[name] < 0 else f"{present[name]} bytes"
            faults.append(f"{name}: {there}, {size} bytes were written")
        else:
            intact.append(name)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = pool.map(
            lambda name: _content_fault(folder / name, manifest.files[name][1]), intact
        )
    faults += [f"{name}: {fault}" for name, fault in zip(intact, found, strict=True) if fault]
    if faults:
        raise CheckpointDamaged(f"{folder} is damaged: {'; '.join(sorted(faults))}")
    return manifest


def newest_sound(root: Path, on_damaged: Callable[[str], None]) -> Manifest | None:
    """The newest checkpoint that is sound; None if there is none.

    That is the one that `latest` names, else one before it, else one beyond it: a run that went
    back to an earlier checkpoint does not go on from the later ones that it left. Where `latest`
    names none, it is the one furthest on. Call it while nobody writes there.

    Args:
        root: of the run's checkpoints.
        on_damaged: is told of each better one that is passed over.

    Raises:
        ValueError: others may write to one; see `require_private`.
        OSError: the folder cannot be read.
    """
    if root.is_dir():
        _restore_replaced(root)
    up_to_latest, beyond = by_latest(root)
    for folder in (*up_to_latest, *beyond):
        try:
            return verify_checkpoint(folder)
        except CheckpointDamaged as error:
            on_damaged(str(error))
    return None


def require_private(folder: Path) -> None:
    """Refuse what other users can change: it might be read as this user's own.

    Raises:
        ValueError: naming the first few such files, and what mends it.
    """
    own = {os.getuid(), 0}
    open_ones = [
        path
        for path in (folder, *folder.rglob("*"))
        if (status := path.lstat()).st_uid not in own
        or (status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not path.is_symlink())
    ]
    if open_ones:
        named = ", ".join(str(path) for path in open_ones[:_MOST_NAMED])
        raise ValueError(
            f"others may write to {len(open_ones)} files of {folder} ({named}): "
            f"chmod -R go-w {folder}, and chown them, if they are what you wrote"
        )


def _restore_replaced(root: Path) -> None:
    """Give back its name to what was about to be replaced when the writer was killed."""
    for path in root.glob(f"{_REPLACED}*"):
        final = root / path.name.removeprefix(_REPLACED)
        if not final.exists():
            path.rename(final)


def _read_manifest(folder: Path) -> Manifest:
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise CheckpointDamaged(
                f"{folder}: its format is {content['format']!r}; this version reads {_FORMAT}"
            )
        parts = {"facts": content["facts"], "files": content["files"]}
        if content["sha256"] != _content_digest(parts):
            raise CheckpointDamaged(
                f"{folder} is damaged: {MANIFEST_FILE}: its content has changed"
            )
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()
        }
        return Manifest(folder, content["facts"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointDamaged):
            raise
        raise CheckpointDamaged(f"{folder}: no manifest can be read: {error}") from error


def _content_digest(content: Mapping[str, Any]) -> str:
    """Of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_files(folder: Path, is_given_up: Callable[[], bool]) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(path, is_given_up), paths))
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def _digest(path: Path, is_given_up: Callable[[], bool] = lambda: False) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if is_given_up():
                raise InterruptedError(errno.EINTR, "given up")
    return digest.hexdigest()


def _content_fault(path: Path, sha256: str) -> str:
    try:
        return "" if _digest(path) == sha256 else "its content has changed"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _make_private(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    folder.chmod(0o755)


def _write_latest(root: Path, name: str) -> None:
    _write_durably(root / f".{LATEST_FILE}", f"{name}\n")
    (root / f".{LATEST_FILE}").replace(root / LATEST_FILE)
    synchronize_one(root)


def _write_durably(path: Path, text: str) -> None:
    def private(name: str, flags: int) -> int:
        return os.open(name, flags, 0o644)

    with open(path, "w", encoding="utf-8", opener=private) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
