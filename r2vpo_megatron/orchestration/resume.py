"""Where a run goes on: its folder, its newest sound checkpoint, and whether it is the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo_megatron.checkpoint.run_differences import check_differences
from r2vpo_megatron.checkpoint.run_folder import (
    CHECKPOINTS_FOLDER,
    MANIFEST_FILE,
    Manifest,
    list_checkpoints,
    newest_sound,
    verify_checkpoint,
)
from r2vpo_megatron.config import RunConfig

AUTO = "auto"


@dataclass(frozen=True)
class ResumePoint:
    """A run that is there already.

    Attributes:
        run_dir: its folder.
        manifest: of the checkpoint to go on from; None where it has not come to one.
    """

    run_dir: Path
    manifest: Manifest | None


def find_resume_point(config: RunConfig, say: Callable[[str], None]) -> ResumePoint | None:
    """What `checkpoint.resume` names; None for a new run.

    Args:
        config: of this run.
        say: is told of checkpoints that are damaged and passed over.

    Raises:
        ValueError: the value leads to no run, its run is another than output.run_name, or the one
            checkpoint that it names is damaged.
    """
    resume = config.checkpoint.resume
    if not resume:
        return None
    if resume == AUTO:
        return _find_by_name(config, say)
    folder = Path(resume).resolve()
    if (folder / MANIFEST_FILE).is_file():
        point = ResumePoint(folder.parent.parent, verify_checkpoint(folder))
    elif (folder / CHECKPOINTS_FOLDER).is_dir():
        point = ResumePoint(folder, newest_sound(folder / CHECKPOINTS_FOLDER, say))
        if point.manifest is None:
            raise ValueError(f"checkpoint.resume = {resume!r}: none of its checkpoints is sound")
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


def _find_by_name(config: RunConfig, say: Callable[[str], None]) -> ResumePoint | None:
    if not config.output.run_name:
        raise ValueError(
            "output.run_name = '' is not valid with checkpoint.resume = 'auto': the name of the "
            "run that goes on, or begins"
        )
    run_dir = (Path(config.output.dir) / config.output.run_name).resolve()
    if not run_dir.exists():
        return None
    root = run_dir / CHECKPOINTS_FOLDER
    manifest = newest_sound(root, say) if root.is_dir() else None
    if manifest is None and list_checkpoints(root):
        raise ValueError(
            f"checkpoint.resume = 'auto': no checkpoint of {root} can be read as it was written; "
            "valid: a run with a sound one, or another output.run_name to begin anew"
        )
    if manifest is None:
        say(f"{run_dir} has no checkpoint: the run begins anew there")
    return ResumePoint(run_dir, manifest)


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
