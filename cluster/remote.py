"""Object stores through fsspec: what a network fails is tried again, with growing waits, and told in one line.

Every failed attempt but the last is told on stderr, as a user waits meanwhile. Not tried again: what is missing,
forbidden or unsupported, and credentials that are not there.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
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
_NO_ANSWER = (ConnectionError, TimeoutError)


class RemoteFailure(OSError):
    """What a store or the way to it failed, how often it was tried, and what came of it at last."""


def open_store(path: str) -> tuple[Any, str]:
    """fsspec's file system and the name inside it. Its import is put off: most runs are local.

    ImportError or ValueError for a kind of URL that nothing installed serves.
    """
    import fsspec

    fs, name = fsspec.core.url_to_fs(path)
    return fs, str(name)


def exists(fs: Any, name: str) -> bool:
    """Whether the store has `name`, in one attempt: for `persistently`. Raises what the store raises."""
    if "http" not in fs.protocol:
        return bool(fs.exists(name))
    # an HTTP store's own `exists` says no when nobody answers; its `info` keeps the reason
    try:
        fs.info(name)
    except FileNotFoundError as error:
        if _reason(error) is not error:
            raise
        return False
    return True


def persistently(action: Callable[[], T], path: str) -> T:
    """The result of `action`, which is called again when it fails in a way that may pass.

    `path` is what it works on, to be named beside a failed attempt. Raises what will not pass as it comes, and
    RemoteFailure for the last attempt's failure and for credentials that are not there.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            reason = _reason(error)
            if isinstance(reason, _FINAL):
                raise
            text = " ".join(f"{type(reason).__name__}: {reason}".split()).removesuffix(":")
            if attempt == ATTEMPTS or "Credential" in type(reason).__name__:
                raise RemoteFailure(_summary(reason, text, attempt)) from reason
            wait = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            warn(f"{path}: attempt {attempt} of {ATTEMPTS} failed ({text}); the next one in {wait:.1f} s")
            time.sleep(wait)
    raise AssertionError("unreachable")


def _reason(error: Exception) -> Exception:
    """The error itself; the cause, where fsspec's HTTP store calls a file missing because its server did not answer."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return cause if status >= 500 else error
    return cause if type(cause).__module__.startswith("aiohttp") or isinstance(cause, _NO_ANSWER) else error


def _summary(reason: Exception, text: str, attempts: int) -> str:
    tried = f"{attempts} attempt{'' if attempts == 1 else 's'}"
    # botocore's and aiohttp's own: EndpointConnectionError, ConnectTimeoutError, ClientConnectorError
    if isinstance(reason, _NO_ANSWER) or "Connect" in type(reason).__name__:
        return f"the server could not be reached in {tried} ({text})"
    return f"{tried} failed ({text})"


def warn(text: str) -> None:
    """A line on stderr."""
    with suppress(OSError, ValueError):  # a stderr that is closed must not end the work
        print(f"warning: {text}", file=sys.stderr, flush=True)
