"""Runs a module's tests once with each backend that this machine has whatever it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kernels

BACKENDS = ("reference", "cpu")


def on_each_backend() -> tuple[Any, Callable[[str], Callable[..., Any]]]:
    """A fixture to bind in a test module, and a function that gives an operator of `kernels` on its backend."""
    chosen: list[str] = []

    @pytest.fixture(params=BACKENDS, autouse=True, scope="module")
    def backend(request: pytest.FixtureRequest) -> Iterator[str]:
        chosen.append(request.param)
        yield request.param
        chosen.clear()

    def run(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: getattr(kernels, name)(*args, **{"backend": chosen[0], **kwargs})

    return backend, run
