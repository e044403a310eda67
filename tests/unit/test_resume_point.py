"""Where `--resume auto` goes on, and that it never begins anew over checkpoints it cannot read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from r2vpo_megatron.checkpoint.run_folder import begin_checkpoint, seal_checkpoint
from r2vpo_megatron.config import CheckpointConfig, OutputConfig, RunConfig
from r2vpo_megatron.orchestration.resume import find_resume_point


def test_auto_begins_goes_on_or_refuses(tmp_path: Path) -> None:
    output = OutputConfig(dir=str(tmp_path), run_name="run")
    config = replace(RunConfig(), output=output, checkpoint=CheckpointConfig(resume="auto"))
    said: list[str] = []
    assert find_resume_point(config, said.append) is None
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    point = find_resume_point(config, said.append)
    assert point is not None and point.manifest is None and "no checkpoint" in said[-1]

    partial = begin_checkpoint(root, "iteration-000001")
    (partial / "state").write_text("a")
    folder = seal_checkpoint(partial, "iteration-000001", {})
    point = find_resume_point(config, said.append)
    assert point is not None and point.manifest is not None and point.manifest.folder == folder

    (folder / "state").write_text("b")
    with pytest.raises(ValueError, match="resume = 'auto': no checkpoint of .* can be read"):
        find_resume_point(config, said.append)
    assert "state: its content has changed" in said[-1]
    unnamed = replace(config, output=replace(output, run_name=""))
    with pytest.raises(ValueError, match="output.run_name = ''"):
        find_resume_point(unnamed, said.append)
