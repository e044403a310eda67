"""The two converters as commands: what they print, and kills, full disks and rivals."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from r2vpo_megatron.conversion import journal
from tests.random_checkpoints import make_hf_folder
from tests.unit.test_model_spec import PANGU_7B

ROOT = Path(__file__).parents[2]
NUM_KILLS = 20
PIECE_SECONDS = 0.001  # so that kills fall between and within pieces


def _tool(name: str) -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int] = module.main
    return main


to_megatron = _tool("convert_hf_to_megatron")
to_hf = _tool("convert_megatron_to_hf")


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _start_slow(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a tool in a forked process that writes slowly and says nothing; return its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        write_all = journal.write_all

        def slowly(stream, buffer):
            half = len(buffer) // 2
            write_all(stream, buffer[:half])
            time.sleep(PIECE_SECONDS / 2)
            write_all(stream, buffer[half:])

        journal.write_all = slowly
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = main(arguments)
    finally:
        os._exit(code)


def _exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hf/, megatron/ and back/, converted without any disturbance."""
    root = tmp_path_factory.mktemp("converted")
    make_hf_folder(root / "hf", num_files=3)
    arguments = ["--hf", str(root / "hf"), "--output", str(root / "megatron")]
    assert to_megatron([*arguments, "--tensor-parallel", "2", "--pipeline-parallel", "2"]) == 0
    arguments = ["--megatron", str(root / "megatron"), "--output", str(root / "back")]
    assert to_hf([*arguments, "--hf-reference", str(root / "hf")]) == 0
    return root


def _arguments(direction: str, root: Path, output: Path) -> list[str]:
    if direction == "to_megatron":
        sources = ["--hf", str(root / "hf"), "--tensor-parallel", "2", "--pipeline-parallel", "2"]
    else:
        sources = ["--megatron", str(root / "megatron"), "--hf-reference", str(root / "hf")]
    return [*sources, "--output", str(output)]


def test_the_published_7b_config_is_planned(tmp_path: Path, capsys) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(PANGU_7B))
    arguments = ["--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--dry-run"]
    assert to_megatron(arguments) == 0
    printed = capsys.readouterr().out
    assert "8,030,887,936" in printed and "16,061,784,576" in printed
    assert os.listdir(tmp_path) == ["hf"]
    assert to_megatron(arguments[:-1]) == 2  # there is nothing to convert
    assert "has neither model.safetensors nor" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


def test_commands_are_quiet_but_for_one_line(converted: Path, tmp_path: Path) -> None:
    arguments = [*_arguments("to_megatron", converted, tmp_path / "out"), "--verify"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_hf_to_megatron.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"wrote {tmp_path / 'out'}: 4 files of weights")
    assert done.stdout.startswith("verified: ")


def test_a_dry_run_of_an_export_writes_nothing(converted: Path, tmp_path: Path, capsys) -> None:
    assert to_hf([*_arguments("to_hf", converted, tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model-00003-of-00003.safetensors" in printed and "inv_freq" in printed
    assert os.listdir(tmp_path) == []


def test_mistakes_cost_one_line_and_exit_code_2(converted: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").write_text("x")
    for main, arguments, message in (
        (to_megatron, _arguments("to_megatron", converted, tmp_path / "taken"), "is not empty"),
        (to_hf, _arguments("to_hf", converted, tmp_path / "taken"), "is not empty"),
        (to_megatron, _arguments("to_megatron", converted, converted / "hf"), "is the folder"),
        (to_hf, _arguments("to_hf", converted, converted / "hf" / "out"), "lies inside"),
        (to_megatron, ["--hf", str(tmp_path / "no"), "--output", "x"], "does not exist"),
        (to_hf, ["--megatron", str(tmp_path / "no"), "--output", "x"], "does not exist"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert _files(tmp_path) == {"taken/precious": b"x"}
    for size in ("0", "5 apples", "-1GB", "0.1B"):
        with pytest.raises(SystemExit):
            to_hf([*_arguments("to_hf", converted, tmp_path / "x"), f"--max-shard-size={size}"])


def test_shards_are_as_large_as_asked_for(converted: Path, tmp_path: Path) -> None:
    arguments = ["--megatron", str(converted / "megatron"), "--output", str(tmp_path / "out")]
    assert to_hf([*arguments, "--max-shard-size", "30KB"]) == 0
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)
    total = sum(path.stat().st_size for path in shards) - headers
    assert index["metadata"]["total_size"] == total


def test_an_interrupt_says_how_to_go_on(
    converted: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all, calls = journal.write_all, []

    def interrupted(stream, buffer):
        calls.append(0)
        if len(calls) == 50:
            signal.raise_signal(signal.SIGINT)
        write_all(stream, buffer)

    monkeypatch.setattr(journal, "write_all", interrupted)
    arguments = _arguments("to_megatron", converted, tmp_path / "out")
    assert to_megatron(arguments) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert to_megatron([*arguments, "--resume"]) == 0
    assert _files(tmp_path / "out") == _files(converted / "megatron")


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_resuming_what_is_complete_is_no_mistake(converted: Path, capsys, direction: str) -> None:
    main = to_megatron if direction == "to_megatron" else to_hf
    output = converted / ("megatron" if direction == "to_megatron" else "back")
    arguments = _arguments(direction, converted, output)
    assert main([*arguments, "--resume"]) == 0
    assert capsys.readouterr().out == f"{output}: already complete\n"
    assert main([*arguments, "--dry-run"]) == 0
    assert f"note: output folder {output}: exists and is not empty" in capsys.readouterr().out
    assert main(arguments) == 2


@pytest.mark.parametrize("direction", ["to_megatron", "to_hf"])
def test_kills_at_random_moments(converted: Path, tmp_path: Path, direction: str) -> None:
    main = to_megatron if direction == "to_megatron" else to_hf
    expected = _files(converted / ("megatron" if direction == "to_megatron" else "back"))
    started = time.monotonic()
    assert _exit_code(_start_slow(main, _arguments(direction, converted, tmp_path / "timed"))) == 0
    whole_seconds = time.monotonic() - started
    chance = random.Random(0)
    kills_within = 0
    for attempt in range(NUM_KILLS):
        output = tmp_path / f"out{attempt}"
        arguments = _arguments(direction, converted, output)
        for _ in range(chance.choice([1, 1, 2, 3])):  # some are killed again while resuming
            child = _start_slow(main, [*arguments, "--resume"])
            delay = chance.uniform(0, whole_seconds)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            killed = _exit_code(child) == -signal.SIGKILL
            if not killed:  # the machine is less busy than it was when the time was taken
                whole_seconds = min(whole_seconds, delay)
            if output.exists():  # it was done, or killed after its end
                assert _files(output) == expected
                break
            kills_within += killed
        if not output.exists():
            assert main([*arguments, "--resume"]) == 0
        assert _files(output) == expected
        assert not output.with_name(f".{output.name}.converting").exists()
        shutil.rmtree(output)
    assert kills_within >= NUM_KILLS // 2


def test_two_at_once(converted: Path, tmp_path: Path, capsys) -> None:
    arguments = _arguments("to_megatron", converted, tmp_path / "out")
    child = _start_slow(to_megatron, arguments)
    while not (tmp_path / ".out.converting").exists():
        time.sleep(0.001)
    for extra in ([], ["--resume"]):
        assert to_megatron([*arguments, *extra]) == 2
        assert "another process is writing it" in capsys.readouterr().err
    assert _exit_code(child) == 0
    assert _files(tmp_path / "out") == _files(converted / "megatron")
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_is_really_full(converted: Path, tmp_path: Path) -> None:
    """A tmpfs of a user namespace has room for the tensors, not for the blobs around them."""
    small = tmp_path / "small"
    small.mkdir()
    arguments = _arguments("to_megatron", converted, small / "out")
    plan = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "convert_hf_to_megatron.py"),
            *arguments,
            "--dry-run",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    line = next(line for line in plan.splitlines() if line.startswith("output "))
    kilobytes = int(line.split()[1].replace(",", "")) // 1024 + 20
    script = (
        f'mount -t tmpfs -o size={kilobytes}k tmpfs "{small}" || exit 77; '
        f'"{sys.executable}" "$@"; code=$?; ls -A "{small}"; exit $code'
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    done = subprocess.run(
        [*command, str(ROOT / "tools" / "convert_hf_to_megatron.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr and "--resume" in done.stderr
    assert done.stdout.split() == [".out.converting"]
