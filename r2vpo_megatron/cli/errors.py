"""One place that decides how a command ends: its message and its exit code.

0: done. 1: the run failed. 2: the user's input is at fault. 130: stopped by Ctrl-C.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
TRACEBACK_FLAG = "--traceback"

# Importable name of an optional package -> extra of this project that brings it.
PACKAGE_EXTRAS = {
    "vllm": "cpu, cuda or npu",
    "vllm_ascend": "npu",
    "torch_npu": "npu",
    "tensorboard": "report",
    "matplotlib": "report",
    "pyarrow": "parquet",
}

# What a user's mistake raises, here or in a worker. Everything else is a fault of a run or of the
# code, and its traceback is what one needs to see.
_USER_MISTAKES = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)


def run_command(command: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run a command and turn what it raises into a short message and an exit code.

    Args:
        command: Takes the arguments without `--traceback`, returns the exit code.
        arguments: Of the command line; `sys.argv[1:]` by default.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = TRACEBACK_FLAG in arguments
    try:
        return command([argument for argument in arguments if argument != TRACEBACK_FLAG])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # the command's end, whatever it was; nothing goes unreported
        message = user_message(error)
        if message is None or show_traceback:
            traceback.print_exception(error)
        if message is None:
            return EXIT_FAILED
        print(f"error: {message}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return EXIT_BAD_INPUT


def user_message(error: BaseException) -> str | None:
    """Say in a line or two what the user can change, or None where nothing is known."""
    # An exception of a Ray task carries the one that the task raised.
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return user_message(cause)
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error)
    if not isinstance(error, _USER_MISTAKES):
        return None
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def keep_traceback(error: BaseException, path: Path) -> None:
    """Write the traceback of a failed run to a file and note that in the error.

    Hours of a run may have gone into it, and only a short message may be printed.
    """
    # A folder that cannot be written must not hide the error itself.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        error.add_note(f"traceback: {path}")


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
