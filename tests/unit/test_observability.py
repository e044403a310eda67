from __future__ import annotations

import io
import json
import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r2vpo_megatron.observability import (
    MetricsWriter,
    ProgressLine,
    StageTimers,
    collect_provenance,
    read_metrics,
    write_run_config,
)
from r2vpo_megatron.report.learning_curve import plot_learning_curve


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_record_is_one_line_on_disk_when_write_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", tensorboard=False)
    writer.write(1, {"reward/mean": np.float32(0.5), "updates": 4, "note": "x", "none": None})
    # Read before close: nothing may wait in a buffer.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    writer.close()
    assert text == '{"iteration": 1, "reward/mean": 0.5, "updates": 4, "note": "x", "none": null}\n'


def test_optimizer_steps_have_a_file_of_their_own(tmp_path: Path) -> None:
    with (
        MetricsWriter(tmp_path, tensorboard=False) as iterations,
        MetricsWriter(tmp_path, tensorboard=False, key="update") as updates,
    ):
        updates.write(1, {"iteration": 1, "x": 0.5})
        updates.write(2, {"iteration": 1, "x": 1.5})
        updates.write(2, {"iteration": 1, "x": 2.5})  # run again after a resume
        iterations.write(1, {"x": 1.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1, "x": 1.0}]
    assert read_metrics(tmp_path / "updates.jsonl", key="update") == [
        {"update": 1, "iteration": 1, "x": 0.5},
        {"update": 2, "iteration": 1, "x": 2.5},
    ]
    with pytest.raises(ValueError, match="metrics.jsonl:1: .*with an update"):
        read_metrics(tmp_path / "metrics.jsonl", key="update")


def test_non_finite_numbers_survive_as_strict_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {
        "iteration": 0,
        "a": "NaN",
        "b": "Infinity",
        "c": "-Infinity",
    }
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_drops_a_torn_line_and_replaces_repeated_iterations(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for iteration in (1, 2):
            writer.write(iteration, {"x": iteration})
    with path.open("a") as file:
        file.write('{"iteration": 3, "x"')  # killed while writing
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2]

    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {"x": 20})
        writer.write(3, {"x": 30})
    assert [(r["iteration"], r["x"]) for r in read_metrics(path)] == [(1, 1), (2, 20), (3, 30)]


def test_a_broken_metrics_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\nnot json\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a metrics record"):
        read_metrics(path)


def test_a_record_that_the_disk_has_no_room_for_leaves_nothing_of_it(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"reward/mean": 0.5})
        size = writer.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))  # a part of it fits
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.write(2, {"reward/mean": 0.75})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert writer.path.stat().st_size == size
        writer.write(2, {"reward/mean": 0.75})
    assert [record["iteration"] for record in read_metrics(writer.path)] == [1, 2]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(3, {"reward/mean": 0.25, "note": "text"})
        writer.write(4, {"reward/mean": 0.75})
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(3, 0.25), (4, 0.75)]


def test_stage_times_add_up_and_the_total_covers_the_gaps() -> None:
    clock = FakeClock()
    timers = StageTimers(clock)
    for seconds in (2.0, 3.0):
        with timers.stage("update"):
            clock.now += seconds
    clock.now += 0.5
    with pytest.raises(RuntimeError), timers.stage("push"):
        clock.now += 1.0
        raise RuntimeError
    assert timers.metrics() == {
        "time/update_seconds": 5.0,
        "time/push_seconds": 1.0,
        "time/iteration_seconds": 6.5,
    }
    clock.now += 0.25
    assert timers.metrics() == {"time/iteration_seconds": 0.25}


def test_progress_prints_one_plain_line_per_iteration_off_a_terminal() -> None:
    stream, clock = io.StringIO(), FakeClock()
    with ProgressLine(10, start_iteration=2, stream=stream, clock=clock) as progress:
        progress.stage("rollout")
        clock.now += 30
        progress.update(
            3,
            {
                "reward/mean": 0.5,
                "evaluation/accuracy": 0.25,
                "response/mean_tokens": 41.26,
                "ratio/second_moment": 0.0123,
                "ratio/penalty": 0.04,
                "throughput/tokens_per_second": 2913.4,
            },
        )
        progress.message("checkpoint written")
        clock.now += 10
        progress.update(4, {"reward/mean": 0.75})
    first, message, second = stream.getvalue().splitlines()
    assert first == (
        "iteration 3/10  reward 0.500  held-out 0.250  length 41.3  ratio m2 1.23e-02  "
        "lambda 0.04  tokens/s 2,913  0:03:30 left"
    )
    assert message == "checkpoint written"
    # Held-out accuracy is that of the last evaluation; 2 iterations took 40 s, 6 are left.
    assert second.startswith("iteration 4/10  reward 0.750  held-out 0.250  length 41.3")
    assert second.endswith("0:02:00 left")


def test_progress_says_what_is_not_known_yet() -> None:
    stream = io.StringIO()
    ProgressLine(5, stream=stream).update(0, {"evaluation/accuracy": 0.2})
    assert stream.getvalue() == (
        "iteration 0/5  reward -  held-out 0.200  length -  ratio m2 -  lambda -  tokens/s -  "
        "- left\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_its_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with ProgressLine(2, stream=stream) as progress:
        progress.update(1, {"reward/mean": 0.5})
        progress.stage("rollout")
        progress.message("a message")
        progress.update(2, {"reward/mean": 0.625})
    output = stream.getvalue()
    assert "\x1b[2K" in output  # erase line
    assert "a message" in output
    assert "(rollout)" in output
    assert output.rindex("iteration 2/2  reward 0.625") > output.rindex("iteration 1/2")
    assert output.endswith("\x1b[?25h")  # the cursor is given back


def test_run_config_holds_recipe_config_versions_and_commit(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    path = write_run_config(tmp_path / "run", {"train": {"seed": 3}}, "recipes/x.py:f", model_dir)
    written = json.loads(path.read_text())
    assert path == tmp_path / "run" / "config.json"
    assert written["recipe"] == "recipes/x.py:f"
    assert written["config"] == {"train": {"seed": 3}}
    assert written["model_dir"] == str(model_dir)
    packages = written["provenance"]["packages"]
    assert packages["numpy"] == np.__version__
    assert written["provenance"]["python"] == sys.version.split()[0]


def test_provenance_names_the_commit_and_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert collect_provenance(tmp_path)["git"] is None
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "first", "--no-verify")
    commit = git("rev-parse", "HEAD")
    assert collect_provenance(tmp_path)["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert collect_provenance(tmp_path)["git"] == {"commit": commit, "dirty": True}


def _write_run(path: Path, final_reward: float) -> Path:
    with MetricsWriter(path, tensorboard=False) as writer:
        for iteration in range(4):
            metrics = {
                "reward/mean": 0.2 + (final_reward - 0.2) * iteration / 3,
                "ratio/second_moment": 0.0 if iteration == 0 else 0.01,
                "ratio/penalty": 0.04,
                "response/mean_tokens": 40.0,
            }
            writer.write(iteration, metrics)
    return path / "metrics.jsonl"


def test_learning_curve_draws_the_numbers(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    low = plot_learning_curve(_write_run(tmp_path / "a", 0.3), tmp_path / "low.png")
    high = plot_learning_curve(_write_run(tmp_path / "b", 0.9), tmp_path / "high.png")
    same = plot_learning_curve(tmp_path / "a" / "metrics.jsonl", tmp_path / "same.png")
    pixels = image.imread(low)
    assert pixels.std() > 0.05  # not a blank page
    np.testing.assert_array_equal(pixels, image.imread(same))
    assert not np.array_equal(pixels, image.imread(high))


@pytest.mark.filterwarnings("error")
def test_learning_curve_of_a_run_that_has_barely_begun(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"evaluation/accuracy": 0.2})
    first = plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "a.png").read_bytes()
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"reward/mean": math.nan, "ratio/second_moment": 0, "ratio/penalty": 0})
    second = plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "b.png").read_bytes()
    assert first != second


def test_learning_curve_of_an_empty_run_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="holds no iteration"):
        plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "x.png")


def test_importing_it_loads_no_framework() -> None:
    code = (
        "import sys, r2vpo_megatron.observability, r2vpo_megatron.report.learning_curve, "
        "r2vpo_megatron.cli.train, r2vpo_megatron.cli.explain; "
        "print(sorted({'torch', 'ray', 'vllm', 'matplotlib', 'megatron'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_records_beyond_where_a_run_went_back_to_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    numbers = [0, 1, 2, 3, 4, 2, 3]
    lines = [json.dumps({"iteration": number, "x": place}) for place, number in enumerate(numbers)]
    path.write_text("\n".join(lines) + "\n")
    assert [(r["iteration"], r["x"]) for r in read_metrics(path)] == [
        (0, 0),
        (1, 1),
        (2, 5),
        (3, 6),
    ]
