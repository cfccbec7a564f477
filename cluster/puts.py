"""Putting an object only if its name is free, in the ways that stores behind fsspec know, or do not.

The inside of `cluster.drafts`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cluster import remote

_NO_CONDITION = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_heedless: set[tuple[object, str]] = set()  # buckets whose store makes what is there, whatever it is told


def _bucket(fs: Any, name: str) -> tuple[object, str]:
    return getattr(fs, "_fs_token", type(fs)), name.lstrip("/").split("/", 1)[0]


def look_first(fs: Any, name: str) -> None:
    """From now on this process asks the store that holds `name` whether a name is free, before it puts."""
    _heedless.add(_bucket(fs, name))


class _NoCondition(NotImplementedError):
    """The store cannot put only if absent."""


def put_if_absent(fs: Any, name: str, path: str, send: Callable[..., None]) -> bool:
    """Have `send` make `name`, False when it is there; `path` is for people. Raises what the store raises at last."""

    def create() -> bool:
        try:
            send(mode="create")
        except Exception as error:
            if isinstance(error, FileExistsError) or _says(error, "PreconditionFailed", 412):
                return False
            unknown = isinstance(error, OSError) and error.errno in _NO_CONDITION
            if isinstance(error, NotImplementedError | TypeError) or unknown or _says(error, "NotImplemented", 501):
                raise _NoCondition from error
            raise
        return True

    if _bucket(fs, name) not in _heedless:
        with suppress(_NoCondition):
            return remote.persistently(create, path)
    fs.invalidate_cache()
    if remote.persistently(lambda: remote.exists(fs, name), path):
        return False
    remote.persistently(send, path)
    return True


def _says(error: BaseException | None, code: str, status: int) -> bool:
    """Whether the store's answer behind an error is of that kind: s3fs drops it where the server's wording is not
    that of AWS, and keeps it as the cause."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            found = response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if found[0] in (code, str(status)) or found[1] == status:
                return True
        error = error.__cause__
    return False
