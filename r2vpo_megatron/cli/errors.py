"""One place that decides how a command ends: its message and its exit code.

0: done. 1: the run failed. 2: the user's input is at fault. 130: stopped by Ctrl-C.
143: stopped by SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from r2vpo_megatron.observability.redaction import redact

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
TRACEBACK_FLAG = "--traceback"
OTHERS_WRITE = 0o022  # file mode bits: what a run writes, it alone may change

# Importable name of an optional package -> extra of this project that brings it.
PACKAGE_EXTRAS = {
    "vllm": "cpu, cuda or npu",
    "vllm_ascend": "npu",
    "torch_npu": "npu",
    "tensorboard": "report",
    "matplotlib": "report",
    "pyarrow": "data",
    "datasets": "data",
}

# What a user's mistake raises before a run starts. Everything else is a fault of the code, and its
# traceback is what one needs to see.
_USER_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)


class RunFailed(Exception):
    """A run that had started ended with an error; its traceback is kept in a file.

    Args:
        error: What ended it; an exception of a Ray task carries the worker's own as `cause`.
        path: Where to write the traceback; only a short message is printed.
        hint: What can be done now, in a line.
    """

    def __init__(self, error: BaseException, path: Path, hint: str = "") -> None:
        cause = getattr(error, "cause", None)
        root = cause if isinstance(cause, BaseException) else error
        text = str(root).strip() or "no message"
        message = f"the run failed: {type(root).__name__}: {text.splitlines()[0]}"
        # A folder that cannot be written must not hide the error itself.
        with contextlib.suppress(OSError):
            path.write_text(_format_traceback(error), encoding="utf-8")
            message += f"\ntraceback: {path}"
        if hint:
            message += f"\n{hint}"
        super().__init__(redact(message))


def run_command(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command and turn what it raises into a short message and an exit code.

    Whatever the user's umask, group and others cannot write to files that the command makes.
    Secrets of the environment are hidden in messages and tracebacks.

    Args:
        command: Takes the arguments without `--traceback`, returns the exit code.
        arguments: Of the command line; `sys.argv[1:]` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = TRACEBACK_FLAG in arguments
    mask_before = os.umask(0o077)
    os.umask(mask_before | OTHERS_WRITE)  # for this process and all that it starts
    try:
        return command([argument for argument in arguments if argument != TRACEBACK_FLAG])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # the command's end, whatever it was; nothing goes unreported
        message = user_message(error)
        if message is None or show_traceback:
            print(_format_traceback(error), end="", file=sys.stderr)
        if message is not None:
            print(f"error: {redact(message)}", file=sys.stderr)
        return EXIT_BAD_INPUT if message and not isinstance(error, RunFailed) else EXIT_FAILED
    finally:
        os.umask(mask_before)


def _format_traceback(error: BaseException) -> str:
    return redact("".join(traceback.format_exception(error)))


def user_message(error: BaseException) -> str | None:
    """Say in a line or two what happened, or None where only a traceback can tell."""
    if isinstance(error, RunFailed):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if not isinstance(error, _USER_MISTAKES):
        return None
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _missing_package(error: ModuleNotFoundError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if package in ("", "r2vpo_megatron"):
        return None  # a fault of ours, not an absent package
    extra = PACKAGE_EXTRAS.get(package)
    if extra is None:
        return f"the package {package} is not installed: `make setup` installs all that is needed"
    return (
        f"the package {package} is not installed. It comes with the extra {extra}, "
        f"for example: pip install 'r2vpo-megatron[{extra.partition(',')[0]}]'"
    )
