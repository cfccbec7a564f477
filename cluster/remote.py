"""Object stores through fsspec: what a network fails is tried again, with growing waits, and told in one line.

Not tried again: what is missing, forbidden or unsupported, and credentials that are not there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # then twice as long each time, each +-50 %: ranks that failed together should not come back so
_FINAL = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    # of our own making
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
)


class RemoteFailure(OSError):
    """What a store's own library raised, after the last attempt."""


def open_store(path: str) -> tuple[Any, str]:
    """fsspec's file system and the name inside it. Its import is put off: most runs are local.

    ImportError or ValueError for a kind of URL that nothing installed serves.
    """
    import fsspec

    fs, name = fsspec.core.url_to_fs(path)
    return fs, str(name)


def persistently(action: Callable[[], T]) -> T:
    """The result of `action`, which is called again when it fails in a way that may pass.

    Raises what the last attempt raised: an OSError, RemoteFailure for the errors of a store's own library.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except _FINAL:
            raise
        except Exception as error:
            hopeless = "Credential" in type(error).__name__
            if attempt == ATTEMPTS - 1 or hopeless:
                if isinstance(error, OSError):
                    raise
                raise RemoteFailure(f"{type(error).__name__}: {error}") from error
            time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")
