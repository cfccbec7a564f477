"""One process at a time in a folder: two runs that write the same files would spoil both."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.storage import StorageError, make_folder


@contextmanager
def locked_folder(folder: str, what: str) -> Iterator[None]:
    """Make the local `folder` and keep others out for the time of the block; the lock ends with the process.

    StorageError when it cannot be made or written, or when another process holds it; `what` names what that one is.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(
                    f"{folder}: another process is working on {what}: wait for it, stop it, or choose another name"
                ) from None
            # some network file systems cannot lock a folder: then nobody is kept out
        yield
    finally:
        os.close(handle)
