"""One process at a time in a folder: two runs that write the same files would spoil both.

The lock is on a file of its own, opened for writing: NFS passes those on to the server, and keeps locks of a folder to
the machine that asks.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.storage import StorageError, make_folder

LOCK = ".lock"


@contextmanager
def locked_folder(folder: str, what: str) -> Iterator[None]:
    """Make the local `folder` and keep others out for the time of the block; the lock ends with the process.

    StorageError when it cannot be made or written, or when another process holds it; `what` names what that one is.
    """
    make_folder(folder)
    path = os.path.join(folder, LOCK)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise StorageError(f"{path}: cannot be made: {error.strerror}; make the folder writable") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(
                    f"{folder}: another process is working on {what}: wait for it, stop it, or choose another name"
                ) from None
            # some network file systems cannot lock: then nobody is kept out
        yield
    finally:
        os.close(handle)
