"""Who may write an output folder: whether its place is free, and a lock between processes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems


def take_lock(path: Path) -> int | None:
    """Lock a file, made if need be; the lock is held until the descriptor is closed.

    A file system without locks gives none, and two processes are not kept apart there. The owner
    removes the file before it closes the descriptor; one that a killed owner left is taken over.

    Returns:
        Its descriptor; None if another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass  # removed between open and lock: try again
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def check_free(output: Path) -> None:
    """Raise ValueError unless the output folder is missing or empty, and no mount point."""
    if os.path.ismount(output):
        raise ValueError(
            f"output folder {output}: is a mount point, and a finished folder cannot take its "
            "place; name a folder inside it"
        )
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ValueError(f"output folder {output}: exists and is not empty; name a new one")


def partial_folder(output: Path) -> Path:
    """Where the files of an output folder are until all are written."""
    return output.with_name(f".{output.name}.converting")


def journal_aside(output: Path) -> Path:
    """Where the journal of a folder is while the folder is given its name."""
    return output.with_name(f".{output.name}.converting.journal")
