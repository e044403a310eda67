"""Where `--resume auto` goes on, and that it never begins anew over checkpoints it cannot read."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r2vpo_megatron.checkpoint.run_folder import begin_checkpoint, seal_checkpoint
from r2vpo_megatron.config import CheckpointConfig, OutputConfig, RunConfig
from r2vpo_megatron.orchestration.inputs import enter_run
from r2vpo_megatron.orchestration.resume import RunLock, choose_checkpoint, find_resume_point


def test_auto_begins_goes_on_or_refuses(tmp_path: Path) -> None:
    output = OutputConfig(dir=str(tmp_path), run_name="run")
    config = replace(RunConfig(), output=output, checkpoint=CheckpointConfig(resume="auto"))
    said: list[str] = []
    assert find_resume_point(config) is None
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    point = find_resume_point(config)
    assert point is not None and point.run_dir == tmp_path / "run"
    assert choose_checkpoint(point, config, said.append) is None and "no checkpoint" in said[-1]
    named = replace(config, checkpoint=CheckpointConfig(resume=str(tmp_path / "run")))
    assert find_resume_point(named) == point
    with pytest.raises(ValueError, match="no checkpoint of .* can be read"):
        choose_checkpoint(point, named, said.append)

    partial = begin_checkpoint(root, "iteration-000001")
    (partial / "state").write_text("a")
    folder = seal_checkpoint(partial, "iteration-000001", {})
    for resume in ("auto", str(tmp_path / "run"), str(folder)):
        named = replace(config, checkpoint=CheckpointConfig(resume=resume))
        found = find_resume_point(named)
        assert found is not None and found.run_dir == tmp_path / "run"
        manifest = choose_checkpoint(found, named, said.append)
        assert manifest is not None and manifest.folder == folder

    (folder / "state").write_text("b")
    with pytest.raises(ValueError, match="resume = 'auto': no checkpoint of .* can be read"):
        choose_checkpoint(point, config, said.append)
    assert "state: its content has changed" in said[-1]
    unnamed = replace(config, output=replace(output, run_name=""))
    with pytest.raises(ValueError, match="output.run_name = ''"):
        find_resume_point(unnamed)


def test_a_run_that_another_process_is_at_is_left_alone(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from r2vpo_megatron.orchestration.resume import RunLock\n"
        "RunLock(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"{tmp_path}: another process is at work on this run" in refused.stderr
    first.release()
    first.release()
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(command).returncode == 0
    RunLock(tmp_path).release()  # one that a process left is taken over


def test_nothing_is_touched_before_the_lock_is_held(tmp_path: Path) -> None:
    """What a kill left half-way would be put right: not while its writer may be alive."""
    output = OutputConfig(dir=str(tmp_path), run_name="run")
    config = replace(RunConfig(), output=output, checkpoint=CheckpointConfig(resume="auto"))
    root = tmp_path / "run" / "checkpoints"
    (root / ".replaced-iteration-000001").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    lock = RunLock(tmp_path / "run")
    try:
        with pytest.raises(ValueError, match="another process is at work"):
            enter_run(config, "recipe", {}, tmp_path)
    finally:
        lock.release()
    assert [path.name for path in root.iterdir()] == [".replaced-iteration-000001"]
    assert (tmp_path / "run" / "config.json").read_text() == "{}"
    with pytest.raises(ValueError, match="no checkpoint of .* can be read"):
        enter_run(config, "recipe", {}, tmp_path)
    RunLock(tmp_path / "run").release()  # the refusal let go of it
