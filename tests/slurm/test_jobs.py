"""The very scripts that users submit, on a real Slurm of several nodes; see mini_slurm.sh."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.end_to_end.ring_runs import read_iterations
from tests.slurm.mini_cluster import Job, MiniSlurm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
START_SECONDS, RUN_SECONDS = 200.0, 400.0
CHECKPOINT = "checkpoint: {}/run/checkpoints/iteration-00000{}"


def assert_nothing_left(cluster: MiniSlurm, job: Job, output: Path, seconds: float = 20.0) -> None:
    """No process, no scratch folder, no token, no segment of shared memory, on any node."""
    deadline = time.monotonic() + seconds
    while any(left := cluster.processes().values()):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.5)
    for number in range(1, cluster.num_nodes + 1):
        assert cluster.tool("exec", f"node{number}", "ls", "/dev/shm") == ""
    assert not list(Path("/tmp").glob(f"r2vpo-{job.job_id}-*"))
    assert not list(output.rglob("ray_token"))


def on_nodes(processes: dict[str, list[str]], what: str) -> list[str]:
    """Names of the nodes that have a Ray actor of this class, once for each."""
    return [node for node, lines in processes.items() for line in lines if f"ray::{what}" in line]


def test_training_on_four_nodes_is_signalled_and_goes_on(cluster, variables, tmp_path):
    variables |= {"TENSOR_PARALLEL": "2", "ITERATIONS": "15", "DOCTOR": "1"}
    job = cluster.submit("train_pangu7b.sh", **variables)
    job.wait_for(CHECKPOINT.format(tmp_path, 1), START_SECONDS)

    # Two ranks of one tensor parallel group on two nodes, in order, and an engine on each other.
    attempt = tmp_path / "run.slurm" / f"{job.job_id}-0"
    assert stat.S_IMODE((attempt / "ray_token").stat().st_mode) == 0o600
    processes = cluster.processes()
    job.signal("USR1")
    assert on_nodes(processes, "LearnerWorker") == ["node1", "node2"]
    assert on_nodes(processes, "RolloutWorker") == ["node3", "node4"]
    for number, resources in ((2, '"learner": 1, "rollout": 0'), (3, '"learner": 0, "rollout": 1')):
        assert resources in (attempt / f"node{number}.log").read_text()

    # Stopped between iterations, with a checkpoint; and it goes on from there.
    job.wait_for("queued again", 60)
    job.wait_for("goes on from", START_SECONDS)
    assert job.wait_for_end(RUN_SECONDS) == "COMPLETED"
    assert job.show()["Restarts"] == "1"
    assert_nothing_left(cluster, job, tmp_path)

    text = job.text()
    assert text.count("waits for 4 nodes to join Ray") == 2
    assert "SIGTERM: a checkpoint is written" in text
    assert text.count("ports: 4 nodes reach each other on ephemeral ports") == 2
    assert text.count("all-reduce (gloo): 2 ranks") == 2
    records = read_iterations(tmp_path / "run")
    assert [record["iteration"] for record in records] == list(range(16))
    assert (tmp_path / "run" / "hf" / "config.json").is_file()
    assert (tmp_path / "run.slurm" / f"{job.job_id}-1" / "node4-ray").is_dir()

    # A link of a chain that comes too late does nothing, and a longer run is another matter.
    again = cluster.submit("train_pangu7b.sh", **variables)
    assert again.wait_for_end(60) == "COMPLETED"
    assert "has finished already" in again.text()
    assert "waits for" not in again.text()


def test_a_node_is_lost(cluster, variables, tmp_path):
    variables |= {
        "TENSOR_PARALLEL": "2",
        "ITERATIONS": "15",
        "ROLLOUT_NODES": "1",
        "MAX_FAILURES": "1",
    }
    job = cluster.submit("train_pangu7b.sh", **variables)
    job.wait_for(CHECKPOINT.format(tmp_path, 1), START_SECONDS)
    lost = on_nodes(cluster.processes(), "LearnerWorker")[1]
    try:
        cluster.tool("kill-node", lost)
        job.wait_for("goes on from", START_SECONDS)
        assert job.wait_for_end(RUN_SECONDS) == "COMPLETED"
    finally:
        cluster.tool("start-node", lost)
    assert int(job.show()["Restarts"]) >= 1
    records = read_iterations(tmp_path / "run")
    assert records[-1]["iteration"] == 15
    assert_nothing_left(cluster, job, tmp_path)


def test_a_cancelled_job_leaves_nothing_and_is_not_queued_again(cluster, variables, tmp_path):
    job = cluster.submit("train_tiny.sh", **variables, ITERATIONS="500")
    job.wait_for(CHECKPOINT.format(tmp_path, 1), START_SECONDS)
    assert any(cluster.processes().values())
    job.cancel()
    assert job.wait_for_end(30) == "CANCELLED"
    assert_nothing_left(cluster, job, tmp_path)
    assert job.show()["Restarts"] == "0"
    assert job.wait_for_end(0) == "CANCELLED"


def test_a_pre_empted_job_goes_on_afterwards(cluster, variables, tmp_path):
    variables |= {"ITERATIONS": "15", "GROUPS_ON": "same", "LEARNER_DEVICES_PER_NODE": "1"}
    variables |= {"DEVICES_PER_NODE": "2", "WEIGHT_SYNC": "shared_memory"}
    job = cluster.submit("train_tiny.sh", "--nodelist=node1", **variables)
    job.wait_for(CHECKPOINT.format(tmp_path, 1), START_SECONDS)
    urgent = ("sbatch", "--parsable", "-p", "high", "-w", "node1", "--exclusive", "-o", "/dev/null")
    cluster.run(*urgent, "--wrap", "true")
    assert job.wait_for_end(RUN_SECONDS) == "COMPLETED"
    assert job.show()["Restarts"] == "1"
    assert "signalled (requeue)" in job.text()
    assert read_iterations(tmp_path / "run")[-1]["iteration"] == 15
    assert_nothing_left(cluster, job, tmp_path)


def test_a_heterogeneous_job(cluster, variables, tmp_path):
    variables |= {"HET": "1", "HET_LEARNER": "--gres=gpu:1", "HET_ROLLOUT": "--gres=npu:1"}
    job = cluster.submit("train_tiny.sh", **variables, ITERATIONS="1")
    assert job.wait_for_end(RUN_SECONDS) == "COMPLETED", job.text()
    assert read_iterations(tmp_path / "run")[-1]["iteration"] == 1
    assert_nothing_left(cluster, job, tmp_path)


def test_conversion_and_evaluation(cluster, variables, tiny_pangu, tmp_path):
    problems = tmp_path / "sums.jsonl"
    rows = [f'{{"problem": "{n}+1=?", "answer": "{n + 1}"}}\n' for n in range(3)]
    problems.write_text("".join(rows))
    common = {name: variables[name] for name in ("SITE", "OUTPUT_DIR", "MAX_FAILURES")}
    layout = {"INPUT": str(tiny_pangu), "TENSOR_PARALLEL": "2", "RUN_NAME": "megatron"}
    convert = cluster.submit("convert.sh", **common, **layout)
    small = "--benchmark-file=sums={} --samples=2 --max-response-tokens=8 --dtype=float32 "
    small += "--kv-cache-bytes=16777216 --max-prompt-tokens=256 --chat-template=model "
    small += "--no-check-answer-form"
    evaluate = cluster.submit(
        "evaluate.sh",
        **common,
        MODEL=str(tiny_pangu),
        RUN_NAME="scores",
        DEVICE="cpu",
        DEVICES_PER_NODE="1",
        ARGS=small.format(problems),
    )
    assert convert.wait_for_end(RUN_SECONDS) == "COMPLETED", convert.text()
    assert (tmp_path / "megatron" / ".metadata").is_file()
    back = {"INPUT": str(tmp_path / "megatron"), "DIRECTION": "to_hf", "RUN_NAME": "hf"}
    back_again = cluster.submit("convert.sh", **common, **back)
    assert evaluate.wait_for_end(RUN_SECONDS) == "COMPLETED", evaluate.text()
    assert '"sums"' in (tmp_path / "scores" / "results.json").read_text()
    assert back_again.wait_for_end(RUN_SECONDS) == "COMPLETED", back_again.text()
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tiny_pangu, tmp_path / "hf")
    )
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    assert_nothing_left(cluster, evaluate, tmp_path)
