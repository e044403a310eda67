"""What the job scripts do before and around Ray, with stand-ins for Slurm's commands and Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SLURM = REPO / "slurm"
JOBS = sorted(path.name for path in SLURM.glob("*.sh") if path.name not in ("site.sh", "submit.sh"))
SHELL_FILES = [*SLURM.glob("*.sh"), *SLURM.glob("lib/*.sh"), SLURM / "site.sh.example"]


def run(
    *command: str, folder: Path, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run in the repository's root; of this process's environment nothing of Slurm is left."""
    environment = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    environment |= {"SITE": "none", "OUTPUT_DIR": str(folder), "PYTHON": sys.executable}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        command,
        cwd=REPO,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def library(code: str, folder: Path, path: Path | None = None, **variables: str) -> str:
    """What a piece of shell prints that has slurm/lib/ at hand."""
    script = f"set -euo pipefail\nsource slurm/lib/job.sh\n{textwrap.dedent(code)}"
    result = run("bash", "-c", script, folder=folder, path=path, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def command(folder: Path, name: str, body: str) -> None:
    """A stand-in for a command, in shell."""
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{body}\n")
    file.chmod(0o755)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    # One job's script brings all of lib/ with it; CI takes every file by itself.
    files = ("train_pangu7b.sh", "submit.sh", "site.sh.example", "lib/node.sh")
    result = run("shellcheck", "-x", *(str(SLURM / file) for file in files), folder=REPO)
    assert result.stdout == ""
    assert result.returncode == 0


def test_no_process_is_killed_by_name_and_every_job_is_strict():
    for file in SHELL_FILES:
        text = file.read_text()
        assert not re.search(r"\b(pkill|killall|ray stop)\b", text), file
        assert len(text.splitlines()) < 200, file
    for name in JOBS:
        text = (SLURM / name).read_text()
        assert "set -euo pipefail" in text
        for option in ("--signal=B:USR1@", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in text, name


def test_every_variable_is_in_the_table():
    """And nothing else; a new setting without a word of explanation fails here."""
    code = "".join(file.read_text() for file in SLURM.glob("lib/*.sh"))
    names = set(re.findall(r"^ *setting ([A-Z_]+)", code, re.MULTILINE))
    assert len(names) > 40
    documented = re.findall(
        r"^\| `([A-Z0-9_]+)` \|", (SLURM / "README.md").read_text(), re.MULTILINE
    )
    others = {"SITE", "R2VPO_HOME", "CHAIN", "HET", "HET_LEARNER", "HET_ROLLOUT", "JOB"}
    others |= {"TABLE_NAME", "OBJECT_STORE_BYTES"}
    assert set(documented) == names | others
    assert len(documented) == len(set(documented))


WRONG = [
    ({"DEVICE": "tpu"}, "DEVICE=tpu: must be one of: npu cuda cpu"),
    ({"OBJECTIVE": "grop"}, "OBJECTIVE=grop: must be one of: r2vpo grpo grpo_clip_high gppo topr"),
    ({"POLICY": "both"}, "POLICY=both: must be one of: off on"),
    ({"VARIANT": "dial"}, "VARIANT=dial: must be one of:  dual paper_dual async"),
    ({"VARIANT": "async", "POLICY": "on"}, "did you mean"),
    ({"LEARNER_NODES": "0"}, "LEARNER_NODES=0: must be an integer, at least 1"),
    ({"ROLLOUT_NODES": "two"}, "ROLLOUT_NODES=two: must be an integer, at least 1"),
    ({"LEARNER_NODES": "08"}, "LEARNER_NODES=08: must be an integer"),
    ({"DEVICES_PER_NODE": "-1"}, "DEVICES_PER_NODE=-1: must be an integer from 1 to 128"),
    ({"TENSOR_PARALLEL": "3"}, "= 3 x 1 x 1 x 2: must be the 8 devices of the learner"),
    ({"TENSOR_PARALLEL": "16"}, "DATA_PARALLEL=0: must be an integer"),
    ({"ENGINE_TENSOR_PARALLEL": "16"}, "NUM_ENGINES=0: must be an integer"),
    ({"NUM_ENGINES": "3"}, "1 x 3: must be the 8 devices of the rollout"),
    ({"WEIGHT_SYNC": "shared_memory"}, "needs learner and engines on one node"),
    ({"MODEL_PATH": "/no/such"}, "MODEL_PATH=/no/such: no such file or folder"),
    ({"RUN_NAME": "../x"}, "RUN_NAME=../x: must be letters"),
    ({"SCRATCH_DIR": "scratch"}, "SCRATCH_DIR=scratch: must be an absolute path"),
    ({"PYTHON": "/no/python"}, "PYTHON=/no/python: must be a Python from 3.11"),
    ({"MAX_REQUEUES": "x"}, "MAX_REQUEUES=x: must be an integer from 0 to 1000"),
    ({"RAY_PORT": "80"}, "RAY_PORT=80: must be an integer from 1024 to 65000"),
    ({"ARGS": "--train.num-iteration 3"}, "did you mean --train.num-iterations?"),
    ({"ARGS": "--parallel.tensor 4"}, "the learner has 16 ranks"),
    ({"ARGS": "--rollout.top-p 0.9"}, "rollout.top_p = 0.9"),
]


@pytest.mark.parametrize(("variables", "message"), WRONG)
def test_wrong_variables_are_refused_before_anything_starts(variables, message, tmp_path):
    eight = {"DEVICES_PER_NODE": "8", "TENSOR_PARALLEL": "2"}
    result = run("bash", "slurm/train_tiny.sh", folder=tmp_path, **{**eight, **variables})
    assert result.returncode == 2
    assert message in result.stderr
    assert "nothing was started" in result.stderr
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    wrong = {"DEVICE": "tpu", "SEED": "-1", "LEARNER_NODES": "0"}
    result = run("bash", "slurm/train_tiny.sh", folder=tmp_path, **wrong)
    assert all(f"slurm: {name}={value}: " in result.stderr for name, value in wrong.items())


@pytest.mark.parametrize("script", ["evaluate.sh", "convert.sh"])
def test_what_to_work_on_must_be_named(script, tmp_path):
    result = run("bash", f"slurm/{script}", folder=tmp_path)
    assert result.returncode == 2
    assert "=: must be" in result.stderr


def test_a_valid_job_says_what_runs_where_and_starts_nothing(tmp_path):
    layout = {"DEVICES_PER_NODE": "8", "TENSOR_PARALLEL": "2", "LEARNER_NODES": "2"}
    result = run("bash", "slurm/train_tiny.sh", folder=tmp_path, **layout, OBJECTIVE="grpo")
    assert result.returncode == 0, result.stderr
    assert "16 ranks (TP 2, PP 1, CP 1, DP 8) on 16 devices" in result.stdout
    assert "8 engines of TP 1 on 8" in result.stdout
    assert re.search(r"OBJECTIVE +grpo\n", result.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "recipe"),
    [
        ({}, "pangu_7b.py:r2vpo_off_policy"),
        ({"DEVICE": "cuda", "OBJECTIVE": "gppo", "POLICY": "on"}, "gppo_on_policy_gpu80"),
        ({"VARIANT": "async"}, "r2vpo_off_policy_async"),
        ({"DEVICE": "cuda", "VARIANT": "paper_dual"}, "r2vpo_off_policy_paper_dual_gpu80"),
    ],
)
def test_variables_name_the_recipe(variables, recipe, tmp_path):
    result = run("bash", "slurm/train_pangu7b.sh", folder=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert f"{recipe}:\n" in result.stdout
    assert "16 ranks (TP 8, PP 1, CP 1, DP 2) on 16 devices" in result.stdout


@pytest.mark.parametrize("script", ["train_pangu1b.sh", "train_qwen1p5b.sh", "train_tiny.sh"])
def test_every_training_script_is_valid_as_it_is(script, tmp_path):
    for device in ("npu", "cuda"):
        result = run("bash", f"slurm/{script}", folder=tmp_path, DEVICE=device)
        assert result.returncode == 0, result.stderr


def test_the_site_goes_before_the_script_and_the_environment_before_both(tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("INTERFACE=${INTERFACE:-ib0}\nDEVICES_PER_NODE=${DEVICES_PER_NODE:-4}\n")

    def shown(**variables: str) -> dict[str, str]:
        result = run("bash", "slurm/train_tiny.sh", folder=tmp_path, **variables)
        words = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")]
        return {line[0]: line[1] for line in words if len(line) > 1}

    assert shown(SITE=str(site))["INTERFACE"] == "ib0"
    assert shown(SITE=str(site), INTERFACE="eth9")["INTERFACE"] == "eth9"


def test_the_table_names_its_runs(tmp_path):
    result = run(
        "bash",
        "-c",
        "for SLURM_ARRAY_TASK_ID in 0 1 2 9 10 29; do export SLURM_ARRAY_TASK_ID; "
        "JOB=train_tiny bash slurm/table.sh | grep -E '^  RUN_NAME'; done",
        folder=tmp_path,
    )
    assert [line.split()[1] for line in result.stdout.splitlines()] == [
        "train_tiny-r2vpo-off-seed0",
        "train_tiny-r2vpo-on-seed0",
        "train_tiny-grpo-off-seed0",
        "train_tiny-topr-on-seed0",
        "train_tiny-r2vpo-off-seed1",
        "train_tiny-topr-on-seed2",
    ], result.stderr


NPUS = """\
JobId=7 JobName=x
     Nodes=node[1-2] CPU_IDs=0-31 Mem=1 GRES=gpu:1(IDX:5),npu:910b:3(IDX:0-1,6)
     Nodes=node3 CPU_IDs=0-31 Mem=1 GRES=npu:2(IDX:3,7)
"""


def test_the_npus_that_slurm_gave(tmp_path):
    (tmp_path / "job").write_text(NPUS)
    command(
        tmp_path,
        "scontrol",
        f"""case "$2 $3" in
            "job -d") cat {tmp_path}/job ;;
            "hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
            *) echo "$3" ;;
        esac""",
    )
    code = 'for host in node1 node2 node3 node4; do echo "$host:$(granted_npus "$host")"; done'
    said = library(f"SLURM_JOB_ID=7\n{code}", tmp_path, tmp_path)
    assert said.splitlines() == ["node1:0,1,6", "node2:0,1,6", "node3:3,7", "node4:"]


def test_what_each_node_lends(tmp_path):
    code = """
    DEVICE=npu DEVICES_PER_NODE=8 LEARNER_DEVICES_PER_NODE=6 LEARNER_HOSTS=(a b)
    GROUPS_ON=separate; resources_of 1; resources_of 2
    GROUPS_ON=same; resources_of 0
    """
    assert library(code, tmp_path).splitlines() == [
        '{"learner": 8, "rollout": 0, "NPU": 8}',
        '{"learner": 0, "rollout": 8, "NPU": 8}',
        '{"learner": 6, "rollout": 2, "NPU": 8}',
    ]


def test_the_environment_of_a_platform(tmp_path):
    code = "INTERFACE=ib0 DEVICE=npu DETERMINISTIC=1; set_platform; print_environment; env"
    said = library(code, tmp_path, HCCL_BUFFSIZE="99")
    printed = dict(line.split(None, 1) for line in said.splitlines() if line.startswith("  "))
    assert printed["HCCL_SOCKET_IFNAME"] == printed["GLOO_SOCKET_IFNAME"] == "ib0"
    assert printed["HCCL_BUFFSIZE"] == "99"  # what was set stays
    assert printed["LCCL_DETERMINISTIC"] == "1"
    assert "\nHCCL_OP_EXPANSION_MODE=AIV" in said  # and all of it is exported
    assert "NCCL_DEBUG" not in library("DEVICE=cpu INTERFACE=; set_platform; env", tmp_path)


@pytest.mark.parametrize(("signal_name", "reason"), [("USR1", "requeue"), ("TERM", "cancel")])
def test_a_stage_is_told_once_and_its_exit_status_kept(signal_name, reason, tmp_path):
    log = tmp_path / "log"
    code = f"""
    watch_signals
    (until grep -q ready "{log}" 2>/dev/null; do sleep 0.05; done; kill -{signal_name} $$
     sleep 0.2; kill -USR1 $$) &
    status=0
    run_stage "$PYTHON" {tmp_path}/stage.py >"{log}" || status=$?
    echo "$status $STOP_REASON"
    run_stage touch {tmp_path}/later || echo "not begun: $?"
    """
    (tmp_path / "stage.py").write_text(
        textwrap.dedent(
            """
            import signal, sys, time
            def leave(number, frame):
                print("told", flush=True)
                time.sleep(0.6)
                sys.exit(77)
            signal.signal(signal.SIGTERM, leave)
            print("ready", flush=True)
            time.sleep(20)
            """
        )
    )
    said = library(code, tmp_path)
    assert f"77 {reason}" in said
    assert "not begun: 143" in said
    assert not (tmp_path / "later").exists()
    assert log.read_text().count("told") == 1


ENDINGS = [
    # driver's status, reason, restarts, checkpoint at each earlier failure, exit code, requeued?
    (0, "", 0, [], 0, False),
    (143, "requeue", 0, [], 143, True),
    (143, "requeue", 50, [], 143, False),  # MAX_REQUEUES
    (143, "cancel", 0, [], 143, False),
    (143, "", 0, [], 143, False),  # somebody told the driver
    (2, "", 0, [], 2, False),
    (1, "", 0, [], 1, True),
    (1, "", 0, ["c1", "c1", "c1"], 1, False),  # MAX_FAILURES without a new checkpoint
    (1, "", 0, ["c0", "c0", "c1"], 1, True),
    (1, "requeue", 0, ["c1", "c1", "c1"], 1, True),
]


@pytest.mark.parametrize(("status", "reason", "restarts", "failed", "code", "requeued"), ENDINGS)
def test_how_a_job_ends(status, reason, restarts, failed, code, requeued, tmp_path):
    command(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    start = "source slurm/lib/job.sh; COMMAND=(x); begin_run_records; "

    def end(status: int, reason: str, latest: str) -> int:
        (checkpoints / "latest").write_text(latest)
        script = f"{start} STOP_REASON={reason}; end_job {status}"
        variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "RUN_NAME": "run"}
        variables |= {"MAX_REQUEUES": "50", "MAX_FAILURES": "3"}
        return run("bash", "-c", script, folder=tmp_path, path=tmp_path, **variables).returncode

    for latest in failed:
        end(1, "", latest)
    (tmp_path / "scontrol.log").unlink(missing_ok=True)
    assert end(status, reason, "c1") == code
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == ("requeue 7\n" if requeued else "")
    assert (tmp_path / "run.slurm" / "finished").exists() == (status == 0)


def test_submission_hands_on_what_was_asked_for(tmp_path):
    command(tmp_path, "sbatch", 'printf "%s " "$@"; echo "partition=$SBATCH_PARTITION"')
    site = tmp_path / "site.sh"
    site.write_text("SBATCH_PARTITION=fast\n")
    submit = ("bash", "slurm/submit.sh", "slurm/train_tiny.sh")

    def submitted(*options: str, **variables: str) -> list[str]:
        result = run(*submit, *options, folder=tmp_path, path=tmp_path, **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    assert submitted("--time=1", SITE=str(site)) == [
        "--parsable --nodes=2 --time=1 slurm/train_tiny.sh partition=fast"
    ]
    (larger,) = submitted(LEARNER_NODES="4", ROLLOUT_NODES="3")
    assert "--nodes=7 " in larger
    (shared,) = submitted(
        LEARNER_NODES="4", GROUPS_ON="same", DEVICES_PER_NODE="2", LEARNER_DEVICES_PER_NODE="1"
    )
    assert "--nodes=4 " in shared
    chain = submitted(CHAIN="3", RUN_NAME="long", SITE=str(site))
    assert len(chain) == 3
    assert all("--job-name=long --dependency=singleton" in line for line in chain)
    (het,) = submitted(HET="1", HET_ROLLOUT="--gres=gpu:1", ROLLOUT_NODES="3", SITE=str(site))
    assert "--nodes=1 --gres=npu:8 : " in het
    assert "--nodes=3 --ntasks-per-node=1 --exclusive --gres=gpu:1" in het

    refused = run(*submit, folder=tmp_path, path=tmp_path, CHAIN="3")
    assert refused.returncode == 2
    assert "RUN_NAME: must be set" in refused.stderr
    refused = run(*submit, folder=tmp_path, path=tmp_path, DEVICE="tpu")
    assert refused.returncode == 2
    assert "DEVICE=tpu" in refused.stderr


@pytest.mark.parametrize("is_ended_by_slurm", [False, True])
def test_a_lost_node_is_left_to_slurm_for_a_time(is_ended_by_slurm, tmp_path):
    command(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    ends = "(sleep 0.5; kill $step; kill -TERM $$) &" if is_ended_by_slurm else ""
    script = f"""
    source slurm/lib/job.sh
    COMMAND=(x)
    begin_run_records
    watch_signals
    sleep 30 >/dev/null 2>&1 & step=$!
    trap 'kill $step 2>/dev/null || true' EXIT
    SILENT_STEPS=($step)
    {ends}
    end_job 1
    """
    variables = {"SLURM_JOB_ID": "7", "RUN_NAME": "run", "MAX_REQUEUES": "5", "MAX_FAILURES": "3"}
    variables["NODE_SECONDS"] = "20" if is_ended_by_slurm else "1"
    result = run("bash", "-c", script, folder=tmp_path, path=tmp_path, **variables)
    assert "a node does not answer" in result.stdout
    assert result.returncode == (143 if is_ended_by_slurm else 1)
    assert (tmp_path / "scontrol.log").exists() != is_ended_by_slurm
