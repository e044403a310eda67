"""Hostile model text against the isolated workers, and the workers' life and death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r2vpo_megatron.rewards import worker_pool
from r2vpo_megatron.rewards.equivalence import EquivalenceJudge
from r2vpo_megatron.rewards.extraction import canonical_answer
from r2vpo_megatron.rewards.format_checks import FORMAT_CHECKS
from r2vpo_megatron.rewards.math_dapo import MODES, MathDapoReward, compute_score
from r2vpo_megatron.rewards.worker_pool import WorkerPool, WorkerStartError

REPOSITORY = Path(__file__).resolve().parents[2]
MEGABYTE = 1 << 20
GOLD = "\\sqrt{2}"  # no plain number: spelling decides nothing, the workers are asked
LIMIT_SECONDS = 0.3  # shorter than in use, for the test's sake
WORST_SECONDS = 5.0  # of CPU time, for what takes a tenth of it; quadratic time would be hours


@pytest.fixture(scope="module")
def judge() -> Iterator[EquivalenceJudge]:
    with WorkerPool(2, limit_seconds=LIMIT_SECONDS) as pool:
        yield EquivalenceJudge(pool)


def _is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _wait_until_dead(process_ids: list[int], seconds: float = 10.0) -> list[int]:
    deadline = time.monotonic() + seconds
    while (alive := [each for each in process_ids if _is_alive(each)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.02)
    return alive


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "9^{9^{9^9}}",
        "9^9^9^9",
        "((9^9)^{9^9})^{9^9}",
        "10^{10^{10}}!",
        "100000!!!!",
        "\\binom{10^9}{10^8}",
        "9" * 400 + "^{" + "9" * 90 + "}",
        "(" * 200 + "2" + ")" * 200,
        "{" * 250 + "}" * 249,
        "\\frac{" * 70 + "1",
        "\\sqrt{" * 60 + "2" + "}" * 60,
        "\\int_0^{10^9} x^{x^x} dx",
        "\\sum_{n=1}^{10^{12}} \\frac{1}{n^3}",
        "\\{" + ",".join(map(str, range(120))) + "\\}",
        "(" + ",".join(["1"] * 200) + ")",
        "\\begin{pmatrix}" + "&".join(["x"] * 100) + "\\end{pmatrix}",
        "[0,1]\\cup" * 40 + "[0,1]",
        "\x00\\sqrt{2\x00}\x00+1",
        "\ud800\udfff\\pi",
        '\\pi"}\n{"equal": true}\n',
        '{"equal": true}',
        "\u202e2\\sqrt{}\u0301",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_hostile_answers_are_wrong_within_the_limit(judge: EquivalenceJudge, answer: str) -> None:
    start = time.monotonic()
    verdict = judge.judge([(answer, GOLD)])[0]
    assert not verdict.equal
    assert time.monotonic() - start < LIMIT_SECONDS + 3.0  # and a slow machine's new worker
    # The pool still works; on a busy machine this, too, may take longer than the limit.
    assert any(judge.judge([("\\frac{2}{\\sqrt2}", GOLD)])[0].equal for _ in range(5))


def test_what_takes_too_long_or_too_much_is_counted() -> None:
    with WorkerPool(2, limit_seconds=20.0, memory_limit_bytes=192 * MEGABYTE) as pool:
        judge = EquivalenceJudge(pool)
        answers = ["2\\sqrt2/2", "2^{10^{10}}", "9" * 100_000, "\\sqrt{2}+1", "\\frac{1"]
        verdicts = judge.judge([(answer, GOLD) for answer in answers])
        assert [verdict.failure for verdict in verdicts] == ["", "memory", "too_long", "", ""]
        assert [verdict.equal for verdict in verdicts] == [True, False, False, False, False]
        counts = {name: pool.counts[name] for name in ("verdicts", "memory", "unreadable")}
        assert counts == {"verdicts": 4, "memory": 1, "unreadable": 1}
        reward = MathDapoReward("symbolic", judge)
        result = reward.judge_texts(["Answer: 2^{10^{10}}"], [GOLD])[0]
        assert (result.score, result.failure, result.parsed) == (-1.0, "memory", True)


@pytest.mark.slow
def test_only_a_timeout_that_used_its_time_is_remembered() -> None:
    with WorkerPool(1, limit_seconds=1.0) as pool:
        judge = EquivalenceJudge(pool)
        assert judge.judge([("\\pi", "e"), ("\\pi+\\pi", "2\\pi")])[1].equal
        for number in range(3, 90):  # half a second of CPU or more, before the one that counts
            judge.judge([(f"({number}+x)^9-\\frac{{1}}{{x}}", f"(x+{number})^9-x^{{-1}}")])
        pid = pool.process_ids()[1]
        os.kill(pid, signal.SIGSTOP)  # a machine too busy to run the worker
        verdict = judge.judge([("3\\pi", "\\pi+2\\pi")])[0]
        assert (verdict.failure, verdict.is_lasting) == ("timeout", False)
        assert not _wait_until_dead([pid])
        assert judge.judge([("3\\pi", "\\pi+2\\pi")])[0].equal  # asked again
        assert any(judge.judge([("9^{9^{9^9}}", GOLD)])[0].is_lasting for _ in range(5))
        start = time.monotonic()
        assert judge.judge([("9^{9^{9^9}}", GOLD)])[0].failure == "timeout"
        assert time.monotonic() - start < 0.5


@pytest.mark.slow
def test_the_limit_of_a_verdict_is_two_seconds() -> None:
    with WorkerPool(1) as pool:
        assert not pool.judge([("\\pi", "e")])[0].failure  # starting is not the verdict's time
        start = time.monotonic()
        assert pool.judge([("9^{9^{9^9}}", GOLD)])[0].failure == "timeout"
        assert 1.9 < time.monotonic() - start < 3.0
        assert pool.counts["timeout"] == 1


def test_code_in_an_answer_is_not_run(judge: EquivalenceJudge, tmp_path: Path) -> None:
    target = tmp_path / "written"
    attempts = [
        f"__import__('os').system('touch {target}')",
        f"\\text{{__import__('os').system('touch {target}')}}",
        f"open('{target}','w').write('x')",
        f"Integer(__import__('pathlib').Path('{target}').touch())",
        f"\\operatorname{{exec}}(\"open('{target}','w')\")",
        f"1+__import__('os').system('touch {target}')",
        f"1;\nimport os;os.system('touch {target}')",
    ]
    verdicts = judge.judge([(text, GOLD) for text in attempts])
    verdicts += judge.judge([(GOLD, text) for text in attempts])
    assert not any(verdict.equal for verdict in verdicts)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_has_no_file_no_network_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_FOR_THIS_TEST", "hidden")
    with WorkerPool(1) as pool:
        pool.judge([("\\pi", "e")])
        template, worker = pool.process_ids()
        limits = Path(f"/proc/{worker}/limits").read_text()
        for name, soft in (
            ("Max address space", str(1024 * MEGABYTE)),
            ("Max open files", "0"),
            ("Max file size", "0"),
            ("Max core file size", "0"),
            ("Max processes", "0"),
        ):
            line = next(line for line in limits.splitlines() if line.startswith(name))
            assert line.removeprefix(name).split()[:2] == [soft, soft]
        assert b"SECRET_FOR_THIS_TEST" not in Path(f"/proc/{worker}/environ").read_bytes()
        assert os.getpgid(template) == template != os.getpgid(0)
        assert os.readlink(f"/proc/{worker}/cwd") == "/"


def test_the_limits_leave_nothing_to_open(tmp_path: Path) -> None:
    """What would happen, were code run in a worker after all."""
    script = f"""
import os, socket
from r2vpo_megatron.rewards.equivalence_worker import limit_worker
connection, other = socket.socketpair()
limit_worker(1 << 30)
for attempt in (lambda: open("/etc/passwd"), lambda: open({str(tmp_path / "x")!r}, "w"),
                socket.socket, os.pipe, lambda: os.listdir("/")):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit("not refused")
try:
    child = os.fork()  # root may; what it starts cannot even load its libraries
except OSError:
    child = -1
if child == 0:
    os.execv("/bin/sh", ["/bin/sh", "-c", "echo x > {tmp_path / "y"}"])
if child > 0:
    assert os.waitpid(child, 0)[1] != 0
connection.send(b"still connected")
assert other.recv(100) == b"still connected"
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_ends_a_worker_whose_trainer_sleeps() -> None:
    script = (
        "from r2vpo_megatron.rewards.equivalence_worker import allow_cpu\n"
        "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "allow_cpu(0)\nwhile True: pass\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=60, check=False)
    assert ended.returncode == -signal.SIGXCPU


def test_a_killed_worker_loses_no_verdict() -> None:
    pairs = [(f"{index}\\pi", f"{index}\\pi+0\\pi") for index in range(1, 300)]
    pairs.insert(0, ("(x+y+z)^{150}", "x"))  # long enough to be killed at
    with WorkerPool(2, limit_seconds=20.0) as pool:
        pool.judge([("\\pi", "e")] * 8)
        victims = pool.process_ids()[1:]
        verdicts = []
        thread = threading.Thread(target=lambda: verdicts.extend(pool.judge(pairs)))
        thread.start()
        time.sleep(0.1)
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        thread.join(60)
        assert [verdict.failure for verdict in verdicts] == [""] * 300
        assert [verdict.equal for verdict in verdicts] == [False] + [True] * 299
        assert not _wait_until_dead(victims)  # and reaped: the template leaves no zombies
        os.kill(pool.process_ids()[0], signal.SIGKILL)  # the template, and so every worker
        assert pool.judge(pairs[1:4]) == verdicts[1:4]


def test_many_threads_share_the_workers(judge: EquivalenceJudge) -> None:
    results: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        pairs = [(f"{number}\\pi+{k}\\pi", f"{number + k + k % 2}\\pi") for k in range(20)]
        results[number] = [verdict.equal for verdict in judge.judge(pairs)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {number: [True, False] * 10 for number in range(1, 9)}


SCRIPT = """
import os, sys, time
from r2vpo_megatron.rewards.equivalence import are_equivalent, shared_judge
if "r2vpo_megatron.rewards.worker_pool" not in sys.modules or "sympy" in sys.modules:
    raise SystemExit("sympy must stay out of the trainer")
assert shared_judge().pool.process_ids() == []
assert are_equivalent("2\\\\pi", "\\\\pi+\\\\pi").equal
mine = shared_judge().pool.process_ids()
read, write = os.pipe()
if os.fork() == 0:
    equal = are_equivalent("3\\\\pi", "\\\\pi+2\\\\pi").equal  # the fork's own workers
    os.write(write, repr((equal, shared_judge().pool.process_ids())).encode())
    sys.exit(0)
equal, others = eval(os.read(read, 1000))
assert equal and not set(others) & set(mine)
os.wait()
assert are_equivalent("4\\\\pi", "\\\\pi+3\\\\pi").equal
print(*(mine + others), flush=True)
"""


def _start(script: str) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, [int(word) for word in process.stdout.readline().split()]


@pytest.mark.slow
def test_no_process_outlives_the_interpreter() -> None:
    process, process_ids = _start(SCRIPT)
    assert process.wait(60) == 0
    assert len(process_ids) == 4
    assert not _wait_until_dead(process_ids)


def test_no_process_outlives_a_killed_interpreter() -> None:
    # Mid-work, and with a fork that keeps copies of the sockets open for a while.
    script = SCRIPT + (
        "\nif os.fork() == 0:\n    time.sleep(4); os._exit(0)\n"
        'are_equivalent("9^{9^{9^9}}", "\\\\pi")\ntime.sleep(60)\n'
    )
    process, process_ids = _start(script)
    time.sleep(0.3)
    process.kill()
    process.wait(60)
    assert len(process_ids) == 4
    assert not _wait_until_dead(process_ids, seconds=3.5)


def test_workers_that_cannot_start_are_an_error_and_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with WorkerPool(1) as pool:
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(WorkerStartError, match="did not start: .*/no/such/python"):
            pool.judge([("\\pi", "e")])
        monkeypatch.undo()
        monkeypatch.setattr(worker_pool, "WORKER_FILE", Path("/no/such/worker.py"))
        with pytest.raises(WorkerStartError, match=r"did not start: .*/no/such/worker\.py"):
            pool.judge([("\\pi", "e")])
        assert pool.process_ids() == []


def test_workers_that_are_always_killed_are_an_error_and_no_endless_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork_worker = worker_pool._Template.fork_worker

    def fork_victim(template: worker_pool._Template) -> worker_pool._Worker:
        worker = fork_worker(template)
        os.kill(worker.process_id, signal.SIGKILL)
        return worker

    with WorkerPool(1) as pool:
        monkeypatch.setattr(worker_pool._Template, "fork_worker", fork_victim)
        monkeypatch.setattr(worker_pool._Template, "is_gone", lambda template: True)
        with pytest.raises(WorkerStartError, match="11 workers in a row were ended"):
            pool.judge([("\\pi", "e")])
        monkeypatch.undo()
        assert pool.judge([("2\\pi", "\\pi+\\pi")])[0].equal


def test_closed_pool_gives_all_back_and_starts_again() -> None:
    with pytest.raises(ValueError, match="num_workers = 0"):
        WorkerPool(0)
    before = len(os.listdir("/proc/self/fd"))
    with WorkerPool(2, limit_seconds=0.3) as pool:
        pool.judge([("9^{9^{9^9}}", "\\pi"), ("\\pi", "e")])
        process_ids = pool.process_ids()
    assert not _wait_until_dead(process_ids)
    assert len(os.listdir("/proc/self/fd")) == before
    pool.limit_seconds = 20.0
    assert pool.judge([("2\\pi", "\\pi+\\pi")])[0].equal
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


NASTY_PIECES = (
    "{",
    "}",
    "\\boxed{",
    "Answer:",
    "answer:\n",
    "**",
    "$",
    " ",
    "\n",
    "\\frac{",
    "1,000",
    "0",
    "\\text{ ",
    "</think>",
    "[unused17]",
    "<|im_end|>",
    "\x00",
    "a b",
)


@pytest.mark.parametrize("piece", NASTY_PIECES, ids=ascii)
def test_a_megabyte_takes_linear_time_in_the_trainer(judge: EquivalenceJudge, piece: str) -> None:
    text = piece * (MEGABYTE // len(piece))
    window = piece * (480 // len(piece))
    for hostile in (text, "\\boxed{" + text, text + "\nAnswer: " + window, window):
        for mode in MODES:
            start = time.process_time()
            results = MathDapoReward(mode, judge).judge_texts([hostile], [""])
            assert time.process_time() - start < WORST_SECONDS, mode
            assert mode == "minerva" or not results[0].acc
        for name, check in FORMAT_CHECKS.items():
            start = time.process_time()
            check(hostile)
            assert time.process_time() - start < WORST_SECONDS, name
        start = time.process_time()
        canonical_answer(hostile)
        assert time.process_time() - start < WORST_SECONDS


def test_a_hundred_thousand_digits_are_wrong_at_once() -> None:
    start = time.perf_counter()
    assert not compute_score("Answer: " + "9" * 100_000, "9")["acc"]
    assert not compute_score("\\boxed{" + "9" * 900 + "}", "9")["acc"]
    assert time.perf_counter() - start < WORST_SECONDS
