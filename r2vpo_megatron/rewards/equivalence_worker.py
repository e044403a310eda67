"""The processes that judge model text. Run as a file by `worker_pool`; imports nothing of ours.

    trainer ==control==> template ==fork==> worker        one of each is enough; a pool has several
       |                                      |
       +=============== socket ===============+           one JSON message a request and a verdict

The template imports sympy once and has parsed a few answers, so a worker that was killed is
replaced in milliseconds. It alone kills and reaps workers: no process id is used after it was
freed. It ends when the trainer does: at the end of its socket, or when its parent changes (a fork
of the trainer may hold a copy of the socket). Workers end with it (PR_SET_PDEATHSIG).

A worker has no file, network or process to reach: RLIMIT_NOFILE 0 forbids every new descriptor.
Text is parsed by a grammar, never evaluated as Python.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.sets import FiniteSet
from math_verify.grader import should_treat_as_complex, verify

MAX_MESSAGE_BYTES = 1 << 16
PARENT_CHECK_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
NUM_COMPARED_DIGITS = 40
# A decimal stands for an irrational number that it agrees with to this relative difference.
DECIMAL_TOLERANCE = 1e-5
# Parsed before the first fork: fills the grammar's caches and imports what sympy imports late.
WARM_UP_PAIRS = (
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac{3}{4}}"),
    (r"2^{10}-1", "1024-1"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)\cup[3,\infty)"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2,1+\sqrt{5},1-\sqrt{5}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"y=2x+3", r"2x-y+3=0"),
    (r"6-5i", r"(1-i)(2+3i)"),
    (r"(3,\frac{\pi}{2})", r"(3,1)"),
    (r"\arccos\frac{7}{18}", r"\pi-\arctan\frac{12}{5}"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"x\leq 3", r"x<3"),
    (r"\log_2 8", r"\binom{4}{2}+3!"),
    (r"0.5772", r"\sqrt[3]{2}"),
    (r"\int_0^1 x e^{x} dx", r"\lim_{x\to 0} \frac{\sin x}{x}"),
    (r"\sum_{k=1}^n k", r"\frac{n(n+1)}{2}"),
    (r"x^2+y^2=1", r"y^2=1-x^2"),
)
_NORMALIZATION = NormalizationConfig(
    basic_latex=True,
    units=False,  # `spelling` removes them; this would take the t of "34t" for tons
    malformed_operators=True,
    nits=True,
    boxed="none",
    equations=False,
)


@functools.lru_cache(maxsize=512)
def parse(text: str) -> Any:
    """The sympy object that `text` denotes.

    Raises:
        Exception: it denotes none; the grammar raises whatever it comes to.
    """
    latex = normalize_latex(text, config=_NORMALIZATION)
    value = latex2sympy(
        latex,
        is_real=not should_treat_as_complex(latex),
        convert_degrees=False,
        normalization_config=None,
    )
    units = [symbol for symbol in value.free_symbols if symbol.name == "i"]
    return value.subs(dict.fromkeys(units, sympy.I)) if units else value


def judge(expected: Any, found: Any) -> bool:
    """Whether both denote the same, by math-verify with two of its tolerances taken back."""
    if _is_ordered(expected) != _is_ordered(found) and (_is_list(expected) or _is_list(found)):
        return False
    if _is_clearly_different(expected, found):
        return False
    return bool(verify(expected, found, timeout_seconds=None, raise_on_error=True))


def _is_ordered(value: Any) -> bool:
    """Written with its own brackets: a point or an interval, which is not the list of its parts."""
    return isinstance(value, sympy.Tuple | sympy.Interval | sympy.MatrixBase)


def _is_list(value: Any) -> bool:
    return isinstance(value, FiniteSet | sympy.FiniteSet)


def _is_clearly_different(expected: Any, found: Any) -> bool:
    """Compare two numbers relative to their size; math-verify compares absolutely.

    It takes all numbers below 1e-15 for one another, and all decimals below 1e-6.
    """
    if not (isinstance(expected, sympy.Expr) and isinstance(found, sympy.Expr)):
        return False
    if expected.free_symbols or found.free_symbols:
        return False
    values = [value.doit().evalf(NUM_COMPARED_DIGITS) for value in (expected, found)]
    if not all(isinstance(value, sympy.Float | sympy.Integer | sympy.Rational) for value in values):
        return False
    has_decimal = expected.has(sympy.Float) or found.has(sympy.Float)
    tolerance = DECIMAL_TOLERANCE if has_decimal else 10.0 ** (5 - NUM_COMPARED_DIGITS)
    largest = max(abs(value) for value in values)
    return bool(abs(values[0] - values[1]) > tolerance * largest)


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """One verdict: {"equal": bool}, with "unreadable" where a side is no formula, or a failure.

    What the grammar and sympy raise on text that denotes nothing has no list: RecursionError,
    AttributeError, NotImplementedError were seen.
    """
    try:
        expected, found = parse(request["gold"]), parse(request["prediction"])
    except MemoryError:
        return {"failure": "memory"}
    except Exception:  # see above
        return {"equal": False, "unreadable": True}
    try:
        return {"equal": judge(expected, found)}
    except MemoryError:
        return {"failure": "memory"}
    except Exception:  # see above
        return {"equal": False}


def limit_worker(memory_limit_bytes: int) -> None:
    """Give up every resource that a verdict does not need; children of this would inherit it."""
    limits = {
        resource.RLIMIT_AS: memory_limit_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,  # not enforced for root
    }
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def allow_cpu(seconds: int) -> None:
    """Let this process use so much more CPU time; the kernel ends it beyond, whoever sleeps."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = used + seconds
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def serve(connection: socket.socket, settings: dict[str, Any]) -> None:
    """Answer requests until the other end closes."""
    connection.send(json.dumps({"pid": os.getpid()}).encode())
    while message := connection.recv(MAX_MESSAGE_BYTES):
        allow_cpu(settings["cpu_limit_seconds"])
        reply = answer_request(json.loads(message))
        connection.send(json.dumps(reply | {"cpu_seconds": time.process_time()}).encode())


def run_worker(connection: socket.socket, template_id: int, settings: dict[str, Any]) -> None:
    """What the forked child does; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == template_id:  # else it died before prctl could bind us to it
            limit_worker(settings["memory_limit_bytes"])
            serve(connection, settings)
            status = 0
    finally:
        os._exit(status)


def run_template(control: socket.socket, settings: dict[str, Any]) -> None:
    """Fork, kill and reap workers as asked, until the trainer is gone."""
    trainer_id = settings["trainer_id"]
    template_id = os.getpid()
    worker_ids: set[int] = set()
    control.send(b"ready")
    while os.getppid() == trainer_id:
        if not select.select([control], [], [], PARENT_CHECK_SECONDS)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 1)
        if not message:
            break
        request = json.loads(message)
        if request["do"] == "kill":
            _end_worker(request["pid"], worker_ids)
            continue
        child = os.fork()
        if child == 0:
            control.close()
            run_worker(socket.socket(fileno=descriptors[0]), template_id, settings)
        os.close(descriptors[0])
        worker_ids.add(child)
    for child in tuple(worker_ids):
        _end_worker(child, worker_ids)


def _end_worker(process_id: int, worker_ids: set[int]) -> None:
    if process_id in worker_ids:
        worker_ids.remove(process_id)
        os.kill(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)


def main() -> None:
    """Import is done; warm up, then serve the control socket whose number is the argument."""
    settings = json.loads(sys.argv[1])
    logging.disable(logging.CRITICAL)
    for prediction, gold in WARM_UP_PAIRS:
        answer_request({"prediction": prediction, "gold": gold})
    parse.cache_clear()
    gc.collect()
    gc.freeze()  # what is here stays shared with the workers
    silent = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(silent, number)
    run_template(socket.socket(fileno=settings["control"]), settings)


if __name__ == "__main__":
    main()
