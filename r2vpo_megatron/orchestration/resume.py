"""Where a run goes on: its folder, kept from others, its checkpoint, and whether it is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.position import is_position
from r2vpo_megatron.checkpoint.run_differences import check_differences
from r2vpo_megatron.checkpoint.run_folder import (
    CHECKPOINTS_FOLDER,
    Manifest,
    list_checkpoints,
    newest_sound,
    verify_checkpoint,
)
from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.conversion.folder_lock import take_lock

AUTO = "auto"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class ResumePoint:
    """A run that is there already.

    Attributes:
        run_dir: its folder.
        checkpoint: the one to go on from; None: its newest sound one.
    """

    run_dir: Path
    checkpoint: Path | None = None


class RunLock:
    """Keeps other processes from a run's folder, until it is released or this process ends.

    Args:
        run_dir: the folder.

    Raises:
        ValueError: another process is at work there.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._descriptor = take_lock(self._path)
        if self._descriptor is None:
            raise ValueError(f"{run_dir}: another process is at work on this run; wait for its end")

    def release(self) -> None:
        """Let others in; once more does nothing."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def find_resume_point(config: RunConfig) -> ResumePoint | None:
    """What `checkpoint.resume` names; None for a new run. Nothing of it is read or changed yet.

    Raises:
        ValueError: the value leads to no run, or its run is another than output.run_name.
    """
    resume = config.checkpoint.resume
    if not resume:
        return None
    if resume == AUTO:
        return _find_by_name(config)
    folder = Path(resume).resolve()
    if is_position(folder.name) and folder.parent.name == CHECKPOINTS_FOLDER and folder.is_dir():
        point = ResumePoint(folder.parent.parent, folder)
    elif (folder / CHECKPOINTS_FOLDER).is_dir():
        point = ResumePoint(folder)
    else:
        raise ValueError(
            f"checkpoint.resume = {resume!r} is not valid: 'auto', the folder of a run that has "
            f"checkpoints, or one of RUN/{CHECKPOINTS_FOLDER}"
        )
    name = config.output.run_name
    if name and name != point.run_dir.name:
        raise ValueError(
            f"output.run_name = {name!r} is not valid with checkpoint.resume = {resume!r}: a run "
            f"goes on in its own folder, {point.run_dir.name!r}; leave the name out"
        )
    return point


def choose_checkpoint(
    point: ResumePoint, config: RunConfig, say: Callable[[str], None]
) -> Manifest | None:
    """The sound checkpoint to go on from; None where the run has not come to one.

    Args:
        point: of `find_resume_point`; this process has the run's lock.
        config: of this run.
        say: is told of checkpoints that are damaged and passed over.

    Raises:
        ValueError: the one that is named is damaged, or all are.
    """
    if point.checkpoint is not None:
        return verify_checkpoint(point.checkpoint)
    root = point.run_dir / CHECKPOINTS_FOLDER
    manifest = newest_sound(root, say) if root.is_dir() else None
    is_named = config.checkpoint.resume != AUTO
    if manifest is None and (is_named or list_checkpoints(root)):
        raise ValueError(
            f"checkpoint.resume = {config.checkpoint.resume!r}: no checkpoint of {root} can be "
            "read as it was written; valid: a run with a sound one, or another output.run_name to "
            "begin anew"
        )
    if manifest is None:
        say(f"{point.run_dir} has no checkpoint: the run begins anew there")
    return manifest


def _find_by_name(config: RunConfig) -> ResumePoint | None:
    if not config.output.run_name:
        raise ValueError(
            "output.run_name = '' is not valid with checkpoint.resume = 'auto': the name of the "
            "run that goes on, or begins"
        )
    run_dir = (Path(config.output.dir) / config.output.run_name).resolve()
    return ResumePoint(run_dir) if run_dir.exists() else None


def require_same_run(
    manifest: Manifest, facts: Mapping[str, Any], config: RunConfig, say: Callable[[str], None]
) -> None:
    """Check that what was saved and what is to go on are one run.

    Args:
        manifest: of the checkpoint.
        facts: of this run, as they would go into a manifest.
        config: of this run.
        say: is told of differences that are accepted.

    Raises:
        ValueError: all differences that are not.
    """
    allowed = config.checkpoint.allowed_changes
    for line in check_differences(manifest.facts, facts, allowed):
        say(line)
