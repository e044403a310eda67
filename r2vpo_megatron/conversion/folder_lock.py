"""A lock between processes: a file that its owner removes at the end."""

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
