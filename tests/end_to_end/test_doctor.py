"""The doctor on a whole installation: a Ray of its own, real ranks, and nothing left behind."""

from __future__ import annotations

import re


def test_a_sound_installation_is_found_sound(start, tmp_path):
    run = start("r2vpo_off_policy", command="doctor")
    assert run.process.wait(timeout=240) == 0, run.text()
    run.assert_nothing_left()
    subjects = re.findall(r"^(?:ok|warning) +([^:]+): ", run.text(), flags=re.M)
    assert subjects[:3] == ["architecture", "tokenizer", "prompts"]
    assert {"devices", "packages", "model", f"folder {tmp_path}", "clocks"} <= set(subjects)
    seconds = re.search(r"ok +all-reduce \(gloo\): 2 ranks, 64 MiB in ([\d.]+) ms", run.text())
    assert seconds and float(seconds[1]) > 0
    assert re.search(r"^(no fault|all \d+ findings)", run.text(), flags=re.M)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("output-")]


def test_what_would_fail_is_named_with_what_to_do(start, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("a file, and no folder")
    run = start("r2vpo_off_policy", command="doctor", **{"output.dir": str(taken)})
    assert run.process.wait(timeout=240) == 1, run.text()
    run.assert_nothing_left()
    assert f"FAULT    folder {taken}: " in run.text() and "(output.dir)" in run.text()
    assert "1 fault" in run.text()
    run = start("r2vpo_off_policy", command="doctor", **{"model.path": str(tmp_path / "none")})
    assert run.process.wait(timeout=60) == 1, run.text()
    assert "FAULT    inputs: model folder" in run.text()
    assert taken.read_text() == "a file, and no folder"
