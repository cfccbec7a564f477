"""The checks of conftest.py: what may be skipped in CI, and what a session may leave behind."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import forbidden_skips, left_children


def test_only_named_reasons_may_skip() -> None:
    skips = [("a::b", "no GPU"), ("a::c", "no ../shared/real"), ("a::d", "could not import 'transformers'")]
    assert forbidden_skips(skips) == [("a::d", "could not import 'transformers'")]


def test_a_child_that_is_left_is_seen() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert child.pid in {left.pid for left in left_children(patience_s=0)}
    finally:
        child.kill()
        child.wait()
    assert child.pid not in {left.pid for left in left_children(patience_s=0)}
